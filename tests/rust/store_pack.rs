//! Images against a reader that follows the descriptor word by word.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use slora_store::{Adapter, BaseSpec, Dtype, MODULE_WORDS, MODULES};

mod processor_time;
mod store_fixture;
use store_fixture::*;

/// A factor's values as the image must hold them: `[rank][elements]`.
type Rows = Vec<Vec<f32>>;

struct Expected {
    rank: u32,
    scale: f32,
    a: Rows,
    b: Rows,
}

/// A random adapter: any layers and modules, one rank for each module through `rank_pattern`, any dtypes, tensors in
/// any order.
fn random_adapter(random: &mut Random, base: &BaseSpec) -> (Checkpoint, HashMap<(u32, usize), Expected>) {
    let mut expected = HashMap::new();
    let mut tensors = Vec::new();
    let mut ranks = Vec::new();
    while expected.is_empty() {
        for layer in (0..base.num_layers).filter(|_| random.below(4) > 0).collect::<Vec<_>>() {
            for (index, module) in MODULES.iter().enumerate() {
                if random.below(3) == 0 {
                    continue;
                }
                let rank = *random.pick(&[1, 2, 3, 8, 24, 64]);
                let (input, output) = widths(base, module);
                let mut values = |n: u32| (0..n).map(|_| random.weight()).collect::<Vec<f32>>();
                let (a, b) = (values(rank * input), values(output * rank));
                let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
                let (a_dtype, b_dtype) = (*random.pick(&dtypes), *random.pick(&dtypes));
                tensors.push(RawTensor::new(&tensor_name(layer, module, 'A'), a_dtype, &[rank, input], &a));
                tensors.push(RawTensor::new(&tensor_name(layer, module, 'B'), b_dtype, &[output, rank], &b));
                ranks.push(format!(r#""{}":{rank}"#, module_path(layer, module)));
                let a = a.chunks(input as usize).map(<[f32]>::to_vec).collect();
                let b =
                    (0..rank as usize).map(|r| b.iter().skip(r).step_by(rank as usize).copied().collect()).collect();
                expected.insert((layer, index), Expected { rank, scale: 6.0 / rank as f32, a, b });
            }
        }
    }
    for i in (1..tensors.len()).rev() {
        tensors.swap(i, random.below(i + 1));
    }
    let config = format!(r#""r":5,"lora_alpha":6,"rank_pattern":{{{}}}"#, ranks.join(","));
    (Checkpoint::new(&config, &tensors), expected)
}

/// Reads one factor by its five words, marking the bytes it used.
fn read_factor(image: &[u8], words: &[i32], rank: u32, elements: usize, base: &BaseSpec, used: &mut [bool]) -> Rows {
    let [first, offset, row_bytes, rows_first, rows_per_page] =
        <[i32; 5]>::try_from(words).unwrap().map(|n| n as usize);
    let page_bytes = base.page_bytes as usize;
    let element_bytes = base.dtype.bytes();
    let row = |i: usize| {
        let (page, offset) = match i.checked_sub(rows_first) {
            None => (first, offset + i * row_bytes),
            Some(j) => (first + 1 + j / rows_per_page, j % rows_per_page * row_bytes),
        };
        assert_eq!(offset % 16, 0, "rows start on 16 bytes");
        assert!(offset + row_bytes <= page_bytes, "a row lies in one page");
        assert!(row_bytes >= elements * element_bytes);
        let start = page * page_bytes + offset;
        for used in &mut used[start..start + elements * element_bytes] {
            assert!(!std::mem::replace(used, true), "rows do not overlap");
        }
        image[start..].chunks(element_bytes).take(elements).map(|bytes| decode(bytes, base.dtype)).collect()
    };
    (0..rank as usize).map(row).collect()
}

fn check_image(adapter: &Adapter, base: &BaseSpec, image: &[u8], expected: &HashMap<(u32, usize), Expected>) {
    let words = adapter.words();
    assert_eq!(words.len(), base.num_layers as usize * MODULES.len() * MODULE_WORDS);
    let mut used = vec![false; image.len()];
    let mut first_layers = vec![u16::MAX; adapter.num_pages() as usize];
    for (index, words) in words.chunks(MODULE_WORDS).enumerate() {
        let (layer, module) = ((index / MODULES.len()) as u32, index % MODULES.len());
        let Some(expected) = expected.get(&(layer, module)) else {
            assert_eq!(words, [0; MODULE_WORDS], "a module without weights has no words");
            continue;
        };
        assert_eq!(words[0], expected.rank as i32);
        assert_eq!(f32::from_bits(words[1] as u32), expected.scale);
        let before = used.clone();
        let (input, output) = (expected.a[0].len(), expected.b[0].len());
        assert_eq!(read_factor(image, &words[2..7], expected.rank, input, base, &mut used), expected.a);
        assert_eq!(read_factor(image, &words[7..12], expected.rank, output, base, &mut used), expected.b);
        for byte in (0..image.len()).filter(|&i| used[i] && !before[i]) {
            let first = &mut first_layers[byte / base.page_bytes as usize];
            *first = (*first).min(layer as u16);
        }
    }
    assert_eq!(&*adapter.page_layers(), first_layers, "the first layer with data in each page");
    assert!(std::iter::zip(image, &used).all(|(&byte, &used)| used || byte == 0), "unused bytes are zero");
}

fn random_base(random: &mut Random) -> BaseSpec {
    let mut base = tiny_base();
    base.dtype = *random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16]);
    // The longest row has 40 elements; the smallest of these pages hold a single one.
    base.page_bytes = *random.pick(&[160, 176, 512, 4096, 1 << 20]);
    base
}

#[test]
fn images_hold_the_source_exactly_where_the_descriptor_says() {
    for seed in 0..300 {
        println!("seed {seed}");
        let random = &mut Random(seed);
        let base = random_base(random);
        let (checkpoint, expected) = random_adapter(random, &base);
        let adapter = checkpoint.open(&base).unwrap();
        let (image, stats) = pack(&adapter, &base).unwrap();
        check_image(&adapter, &base, &image, &expected);
        assert_eq!(stats.bytes_written, image.len() as u64, "every byte of every page is written once");
        assert_eq!(stats.max_rounding_error, 0.0);
        assert_eq!(adapter.report().num_mapped, expected.len() * 2);
    }
}

#[test]
fn many_threads_pack_the_same_image_as_one() {
    for seed in 1000..1040 {
        println!("seed {seed}");
        let random = &mut Random(seed);
        let base = random_base(random);
        let (checkpoint, _) = random_adapter(random, &base);
        let adapter = checkpoint.open(&base).unwrap();
        let mut pages = Pages::of(&adapter, &base);
        let host = pages.lend();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let part = next.fetch_add(1, Ordering::Relaxed);
                        if part >= adapter.num_parts() {
                            break;
                        }
                        adapter.pack_part(part, &host, &AtomicBool::new(false)).unwrap();
                    }
                });
            }
        });
        drop(host);
        assert_eq!(pages.bytes(), pack(&adapter, &base).unwrap().0);
    }
}

#[test]
fn shards_of_all_tensor_parallel_ranks_make_up_the_whole() {
    for seed in 2000..2020 {
        println!("seed {seed}");
        let random = &mut Random(seed);
        let whole_base = random_base(random);
        let (checkpoint, whole) = random_adapter(random, &whole_base);
        for tp_rank in 0..2 {
            let base = BaseSpec { tp_rank, tp_size: 2, ..whole_base.clone() };
            let shard = |rows: &Rows| -> Rows {
                let half = rows[0].len() / 2;
                rows.iter().map(|row| row[half * tp_rank as usize..][..half].to_vec()).collect()
            };
            let expected = whole.iter().map(|(&place, whole)| {
                let row_parallel = matches!(MODULES[place.1], "o_proj" | "down_proj");
                let a = if row_parallel { shard(&whole.a) } else { whole.a.clone() };
                let b = if row_parallel { whole.b.clone() } else { shard(&whole.b) };
                (place, Expected { rank: whole.rank, scale: whole.scale, a, b })
            });
            let adapter = Adapter::open_shard(checkpoint.path(), &base).unwrap();
            check_image(&adapter, &base, &pack(&adapter, &base).unwrap().0, &expected.collect());
        }
    }
}

#[test]
fn factors_longer_than_a_chunk_are_packed_whole() {
    let base = BaseSpec {
        hidden: 3000,
        intermediate: 70_000,
        num_layers: 1,
        page_bytes: 1 << 18,
        dtype: Dtype::Bf16,
        ..tiny_base()
    };
    let (input, output) = widths(&base, "down_proj");
    let random = &mut Random(7);
    let rank = 130;
    let mut values = |n: u32| (0..n).map(|_| random.weight()).collect::<Vec<f32>>();
    let (a, b) = (values(rank * input), values(output * rank));
    let tensors = [
        RawTensor::new(&tensor_name(0, "down_proj", 'A'), Dtype::F32, &[rank, input], &a),
        RawTensor::new(&tensor_name(0, "down_proj", 'B'), Dtype::Bf16, &[output, rank], &b),
    ];
    let checkpoint = Checkpoint::new(&format!(r#""r":{rank},"lora_alpha":{rank}"#), &tensors);
    let adapter = checkpoint.open(&base).unwrap();
    let a = a.chunks(input as usize).map(<[f32]>::to_vec).collect();
    let b = (0..rank as usize).map(|r| b.iter().skip(r).step_by(rank as usize).copied().collect()).collect();
    let expected = HashMap::from([((0, 6), Expected { rank, scale: 1.0, a, b })]);
    check_image(&adapter, &base, &pack(&adapter, &base).unwrap().0, &expected);
}

#[test]
fn rounding_to_the_base_dtype_is_reported() {
    let base = BaseSpec { dtype: Dtype::Bf16, ..tiny_base() };
    let mut tensors = pair(&base, 0, "q_proj", 8);
    tensors[1].data[..4].copy_from_slice(&1.001f32.to_le_bytes());
    let adapter = Checkpoint::new(r#""r":8"#, &tensors);
    let (_, stats) = pack(&adapter.open(&base).unwrap(), &base).unwrap();
    assert_eq!(stats.max_rounding_error, 1.001 - 1.0);
    assert_eq!(stats.bytes_read, (8 * 24 + 20 * 8) * 4);
}

#[test]
fn a_cancelled_part_stops() {
    let base = tiny_base();
    let checkpoint = Checkpoint::new(r#""r":8"#, &pair(&base, 0, "q_proj", 8));
    let adapter = checkpoint.open(&base).unwrap();
    let mut pages = Pages::of(&adapter, &base);
    let error = adapter.pack_part(0, &pages.lend(), &AtomicBool::new(true)).unwrap_err();
    assert_eq!((error.code(), error.to_string().as_str()), ("cancelled", "packing was cancelled"));
}

#[test]
fn two_thousand_adapters_register_in_under_two_seconds() {
    let base = BaseSpec { num_layers: 28, max_adapter_pages: 1 << 20, ..tiny_base() };
    let tensors: Vec<RawTensor> =
        (0..28).flat_map(|layer| MODULES.iter().flat_map(move |m| pair(&tiny_base(), layer, m, 8))).collect();
    let original =
        Checkpoint::new(r#""r":8,"target_modules":["q_proj","k_proj","v_proj","o_proj","up_proj"]"#, &tensors);
    let links = tempfile::tempdir().unwrap();
    for i in 0..2000 {
        let folder = links.path().join(i.to_string());
        std::fs::create_dir(&folder).unwrap();
        std::fs::hard_link(original.config_path(), folder.join("adapter_config.json")).unwrap();
        std::fs::hard_link(original.weights_path(), folder.join("adapter_model.safetensors")).unwrap();
    }
    let start = processor_time::of_thread();
    let adapters: Vec<Adapter> =
        (0..2000).map(|i| Adapter::open(&links.path().join(i.to_string()), &base).unwrap()).collect();
    let took = processor_time::of_thread() - start;
    println!("{} adapters of {} tensors: {took:?}", adapters.len(), tensors.len());
    assert!(took.as_secs_f64() < 2.0, "{took:?}");
    adapters[0].check_unchanged().unwrap();
}
