#![no_main]

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    let _ = slora_store::fuzzing::config(json);
});
