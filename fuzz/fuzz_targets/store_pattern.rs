#![no_main]

// A key, a newline, and a module name.
libfuzzer_sys::fuzz_target!(|input: &str| {
    let (key, name) = input.split_once('\n').unwrap_or((input, ""));
    let _ = slora_store::fuzzing::pattern(key, name);
});
