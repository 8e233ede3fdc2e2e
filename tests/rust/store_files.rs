//! Folders and files that must be refused, before and after registration.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use slora_store::{Adapter, MODULES};

mod store_fixture;
use store_fixture::*;

#[test]
fn folders_that_are_refused() {
    let base = tiny_base();
    let checkpoint = Checkpoint::empty();
    let missing = checkpoint.path().join("missing");
    expect(Adapter::open(&missing, &base).map(|_| ()), "not_found", &["missing"]);
    expect(refusal(&checkpoint, &base), "missing_config", &["adapter_config.json"]);
    checkpoint.write_config("{}");
    expect(Adapter::open(&checkpoint.config_path(), &base).map(|_| ()), "not_a_folder", &["regular file", "hint"]);
    expect(refusal(&checkpoint, &base), "missing_weights", &["adapter_model.safetensors"]);
    fs::write(checkpoint.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
    expect(refusal(&checkpoint, &base), "pickle_only", &["adapter_model.bin", "hint"]);

    let two = Checkpoint::empty();
    for name in ["b", "a"] {
        fs::create_dir(two.path().join(name)).unwrap();
        fs::write(two.path().join(name).join("adapter_config.json"), "{}").unwrap();
    }
    expect(refusal(&two, &base), "ambiguous_folder", &["(a, b)", "hint"]);
    for number in 0..8 {
        let folder = two.path().join(number.to_string());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("adapter_config.json"), "{}").unwrap();
    }
    expect(refusal(&two, &base), "ambiguous_folder", &["(0, 1, 2, 3, 4, 5, 6, 7, …)"]);

    let cycle = Checkpoint::empty();
    symlink(cycle.config_path(), cycle.config_path()).unwrap();
    expect(refusal(&cycle, &base), "io", &["adapter_config.json"]);
}

#[test]
fn what_is_not_a_regular_file_is_never_waited_for() {
    let base = tiny_base();
    for weights in [false, true] {
        let path = |c: &Checkpoint| if weights { c.weights_path() } else { c.config_path() };
        let fresh = || {
            let checkpoint = Checkpoint::new("", &good_pair());
            fs::remove_file(path(&checkpoint)).unwrap();
            checkpoint
        };
        let folder = fresh();
        fs::create_dir(path(&folder)).unwrap();
        expect(refusal(&folder, &base), "not_a_regular_file", &["a folder"]);

        let fifo = fresh();
        assert!(std::process::Command::new("mkfifo").arg(path(&fifo)).status().unwrap().success());
        expect(refusal(&fifo, &base), "not_a_regular_file", &["a fifo"]);

        let device = fresh();
        symlink("/dev/zero", path(&device)).unwrap();
        expect(refusal(&device, &base), "not_a_regular_file", &["a device"]);

        let socket = fresh();
        let _listener = std::os::unix::net::UnixListener::bind(path(&socket)).unwrap();
        expect(refusal(&socket, &base), "not_a_regular_file", &["a socket"]);
    }
}

#[test]
fn files_that_change_after_registration_are_refused() {
    let base = tiny_base();
    type Change = fn(&Checkpoint);
    let table: [(&str, Change); 6] = [
        ("size", |c| fs::OpenOptions::new().write(true).open(c.weights_path()).unwrap().set_len(500).unwrap()),
        ("inode", |c| {
            let copy = c.path().join("copy");
            fs::copy(c.weights_path(), &copy).unwrap();
            fs::rename(copy, c.weights_path()).unwrap();
        }),
        ("modification time", |c| {
            let file = fs::OpenOptions::new().write(true).open(c.weights_path()).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }),
        ("removed", |c| fs::remove_file(c.weights_path()).unwrap()),
        ("kind", |c| {
            fs::remove_file(c.weights_path()).unwrap();
            fs::create_dir(c.weights_path()).unwrap();
        }),
        ("size", |c| c.write_config("{}")),
    ];
    for (what, change) in table {
        println!("{what}");
        let checkpoint = Checkpoint::new("", &good_pair());
        let adapter = checkpoint.open(&base).unwrap();
        adapter.check_unchanged().unwrap();
        change(&checkpoint);
        expect(adapter.check_unchanged(), "changed", &[what, "registered"]);
        let mut pages = Pages::of(&adapter, &base);
        let packed = adapter.pack_part(0, &pages.lend(), &AtomicBool::new(false));
        expect(packed.map(|_| ()), "changed", &[what]);
    }
}

#[test]
fn a_file_replaced_while_it_is_packed_never_mixes() {
    let base = tiny_base();
    let [old, new] = [0.25, 0.5].map(|value| {
        let modules = (0..3).flat_map(|layer| MODULES.iter().flat_map(move |m| pair(&tiny_base(), layer, m, 8)));
        let tensors: Vec<RawTensor> =
            modules.map(|t| RawTensor { data: value_bytes(value, t.data.len()), ..t }).collect();
        Checkpoint::new("", &tensors)
    });
    let images = [&old, &new].map(|c| pack(&c.open(&base).unwrap(), &base).unwrap().0);
    let place = Checkpoint::new("", &[]);
    let replace = |by: &Checkpoint| {
        // Links, so that no inode number is used again.
        let link = place.path().join("link");
        fs::hard_link(by.weights_path(), &link).unwrap();
        fs::rename(link, place.weights_path()).unwrap();
    };
    replace(&old);
    let (done, mut packed, mut refused) = (AtomicBool::new(false), 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                replace(&new);
                replace(&old);
            }
        });
        for _ in 0..2000 {
            match place.open(&base).and_then(|adapter| pack(&adapter, &base)) {
                Ok((image, _)) => {
                    assert!(images.contains(&image));
                    packed += 1;
                }
                Err(error) => {
                    assert_eq!(error.code(), "changed", "{error}");
                    refused += 1;
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    println!("{packed} packed, {refused} refused");
    assert!(refused > 0);
}

fn value_bytes(value: f32, bytes: usize) -> Vec<u8> {
    value.to_le_bytes().iter().copied().cycle().take(bytes).collect()
}

#[test]
fn files_that_lie_elsewhere_are_refused_where_roots_are_given() {
    let base = tiny_base();
    let (inside, outside) = (Checkpoint::new("", &good_pair()), Checkpoint::new("", &good_pair()));
    let roots = [inside.path().canonicalize().unwrap()];
    assert!(Adapter::open_beneath(inside.path(), &base, &roots).is_ok());
    let refused = |roots| Adapter::open_beneath(inside.path(), &base, roots).map(|_| ());
    expect(refused(&[]), "outside_roots", &["adapter_config.json"]);
    fs::remove_file(inside.weights_path()).unwrap();
    symlink(outside.weights_path(), inside.weights_path()).unwrap();
    expect(refused(&roots), "outside_roots", &["adapter_model.safetensors"]);
    assert!(inside.open(&base).is_ok(), "without roots links are followed");
}
