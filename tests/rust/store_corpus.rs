//! The fuzz targets' corpus, run through the same entry points as the fuzzer.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::time::Instant;

use slora_store::fuzzing;

/// Runs every input of a target. `good-*` must be accepted, `bad-*` refused; others, which the fuzzer found, need only
/// return.
fn run(target: &str, entry: impl Fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut count = 0;
    for file in fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let start = Instant::now();
        let accepted = entry(&fs::read(&file).unwrap());
        println!("{target}/{name}: {accepted} in {:?}", start.elapsed());
        match name.split_once('-') {
            Some(("good", _)) => assert!(accepted, "{name} is refused"),
            Some(("bad", _)) => assert!(!accepted, "{name} is accepted"),
            _ => {}
        }
        count += 1;
    }
    assert!(count >= 12, "{target} has a corpus of {count}");
}

#[test]
fn headers() {
    run("store_header", |json| fuzzing::header(json).is_ok());
}

#[test]
fn configs() {
    run("store_config", |json| fuzzing::config(json).is_ok());
}

#[test]
fn patterns() {
    run("store_pattern", |input| {
        let input = String::from_utf8_lossy(input);
        let (key, name) = input.split_once('\n').unwrap_or((&input, ""));
        fuzzing::pattern(key, name).unwrap_or(false)
    });
}

/// `store_patterns.tsv` has verdicts of Python's `re.match(rf"(.*\.)?({key})$", name)`, as PEFT calls it: `1`, `0` or
/// `e` (no expression), the key, the name. A key may be refused here, but never be read differently. A longer table can
/// be named in `STORE_PATTERNS`.
#[test]
fn patterns_match_what_they_match_in_python() {
    let table = match std::env::var_os("STORE_PATTERNS") {
        Some(path) => fs::read_to_string(path).unwrap(),
        None => include_str!("store_patterns.tsv").to_owned(),
    };
    let (mut accepted, mut refused) = (0, 0);
    for line in table.lines() {
        let [verdict, key, name] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
        match fuzzing::pattern(key, name) {
            Ok(matches) if verdict != "e" => {
                assert_eq!(matches, verdict == "1", "{key:?} on {name:?}");
                accepted += 1;
            }
            Err(_) if verdict != "e" => refused += 1,
            _ => {}
        }
    }
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 3 * refused, "{accepted} accepted, {refused} refused");
}
