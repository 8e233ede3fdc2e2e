//! Packing adapters of Llama-3.1-8B's shapes from the page cache, and registering them.
//!
//! `cargo bench -p slora-store`; throughput is bytes of weights read, on one thread.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;
use std::sync::atomic::AtomicBool;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use slora_store::{Adapter, BaseSpec, Dtype, MODULE_WORDS, MODULES, PackStats};

#[path = "../../tests/rust/store_fixture.rs"]
mod store_fixture;
use store_fixture::{Checkpoint, Pages, Random, RawTensor, encode, tensor_name, widths};

fn base(dtype: Dtype) -> BaseSpec {
    BaseSpec {
        num_layers: 8,
        hidden: 4096,
        intermediate: 14336,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        vocab_size: 128_256,
        dtype,
        page_bytes: 2 << 20,
        tp_rank: 0,
        tp_size: 1,
        name: None,
        max_adapter_pages: 4096,
        max_rank: u32::MAX,
    }
}

/// All seven linears of every layer. Weights are random, so that no value is special to a branch.
fn checkpoint(base: &BaseSpec, rank: u32, dtype: Dtype) -> Checkpoint {
    let random = &mut Random(1);
    let mut tensors = Vec::new();
    for layer in 0..base.num_layers {
        for module in MODULES {
            let (input, output) = widths(base, module);
            for (matrix, shape) in [('A', [rank, input]), ('B', [output, rank])] {
                let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| random.weight()).collect();
                tensors.push(RawTensor::new(&tensor_name(layer, module, matrix), dtype, &shape, &values));
            }
        }
    }
    Checkpoint::new(&format!(r#""r":{rank},"lora_alpha":16"#), &tensors)
}

fn pack(adapter: &Adapter, pages: &mut Pages) -> PackStats {
    let (host, cancel) = (pages.lend(), AtomicBool::new(false));
    let mut stats = PackStats::default();
    for part in 0..adapter.num_parts() {
        stats += adapter.pack_part(part, &host, &cancel).unwrap();
    }
    stats
}

/// The first row of the first module's B against the same weights of the file.
fn check(checkpoint: &Checkpoint, adapter: &Adapter, pages: &Pages, base: &BaseSpec, rank: usize, file_dtype: Dtype) {
    let words = &adapter.words()[..MODULE_WORDS];
    let start = words[7] as usize * base.page_bytes as usize + words[8] as usize;
    let file = std::fs::read(checkpoint.weights_path()).unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let b = &file[8 + header_bytes + rank * 4096 * file_dtype.bytes()..];
    let column = b.chunks(file_dtype.bytes()).step_by(rank).take(4096);
    let expected: Vec<u8> = column.flat_map(|x| encode(store_fixture::decode(x, file_dtype), base.dtype)).collect();
    assert_eq!(pages.bytes()[start..start + expected.len()], expected);
}

fn bench_pack(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pack");
    for (from, to, rank) in [
        (Dtype::Bf16, Dtype::Bf16, 8),
        (Dtype::Bf16, Dtype::Bf16, 16),
        (Dtype::Bf16, Dtype::Bf16, 64),
        (Dtype::F32, Dtype::F32, 16),
        (Dtype::F32, Dtype::Bf16, 16),
        (Dtype::F32, Dtype::F16, 16),
    ] {
        let base = base(to);
        let checkpoint = checkpoint(&base, rank, from);
        let adapter = checkpoint.open(&base).unwrap();
        let mut pages = Pages::of(&adapter, &base);
        let stats = pack(&adapter, &mut pages);
        check(&checkpoint, &adapter, &pages, &base, rank as usize, from);
        group.throughput(Throughput::Bytes(stats.bytes_read));
        group.bench_function(format!("{} to {}, rank {rank}", from.name(), to.name()), |bencher| {
            bencher.iter(|| black_box(pack(&adapter, &mut pages)));
        });
    }
    group.finish();
}

fn bench_open(criterion: &mut Criterion) {
    let base = base(Dtype::Bf16);
    let checkpoint = checkpoint(&base, 8, Dtype::Bf16);
    let tensors = checkpoint.open(&base).unwrap().report().num_mapped;
    let mut group = criterion.benchmark_group("register");
    group.throughput(Throughput::Elements(1));
    group.bench_function(format!("{tensors} tensors"), |bencher| {
        bencher.iter(|| black_box(checkpoint.open(&base).unwrap().num_pages()));
    });
    group.finish();
}

criterion_group!(benches, bench_pack, bench_open);
criterion_main!(benches);
