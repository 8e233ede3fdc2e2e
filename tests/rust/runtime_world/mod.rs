//! A runtime whose executor samples from a script.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use slora_core::EngineConfig;
use slora_runtime::{HostMemory, Runtime, RuntimeConfig, Stepper};
use slora_store::{BaseSpec, Dtype};
use slora_text::TextModel;

const PAGE_BYTES: usize = 32 << 10;
const NUM_HOST_PAGES: usize = 64;

/// A step's time that is over when another one is set.
pub const HELD: Duration = Duration::from_secs(3600);
/// Tokens of one sequence.
pub const MAX_CONTEXT: u32 = 256;

pub fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny").join(path)
}

pub fn copy_adapter(from: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(example("adapters").join(from).join(file), to.join(file)).unwrap();
    }
}

/// The example's base; its page size does not matter to an executor that computes nothing.
fn base() -> BaseSpec {
    let config: Value = serde_json::from_slice(&std::fs::read(example("base/config.json")).unwrap()).unwrap();
    let number = |key: &str| config[key].as_u64().unwrap() as u32;
    BaseSpec {
        num_layers: number("num_hidden_layers"),
        hidden: number("hidden_size"),
        intermediate: number("intermediate_size"),
        num_heads: number("num_attention_heads"),
        num_kv_heads: number("num_key_value_heads"),
        head_dim: number("head_dim"),
        vocab_size: number("vocab_size"),
        dtype: Dtype::F32,
        page_bytes: PAGE_BYTES as u64,
        tp_rank: 0,
        tp_size: 1,
        name: None,
        max_adapter_pages: 64,
        max_rank: u32::MAX,
    }
}

/// A runtime and its step thread, which samples `script[position − 1]` (the last entry for ever after), step by step.
pub struct RuntimeWorld {
    pub runtime: Arc<Runtime>,
    pub text: Arc<TextModel>,
    step_us: Arc<AtomicU64>,
    steps: Option<JoinHandle<()>>,
    _memory: Vec<u64>,
}

impl RuntimeWorld {
    /// A host tier of equal slabs, of which the first few are ready.
    pub fn new(script: &str, engine: EngineConfig, step_time: Duration, num_slabs: usize, num_ready: usize) -> Self {
        let text = Arc::new(TextModel::from_dir(&example("base")).unwrap());
        let script = text.encode(script, false).unwrap();
        let mut memory = vec![0u64; PAGE_BYTES / 8 * NUM_HOST_PAGES];
        let size = PAGE_BYTES * NUM_HOST_PAGES / num_slabs;
        let slabs = memory.chunks_exact_mut(size / 8).map(|slab| NonNull::new(slab.as_mut_ptr().cast::<u8>()).unwrap());
        let slabs: Vec<_> = slabs.map(|address| (address, size)).collect();
        // SAFETY: the memory is the world's, which joins every thread before it goes.
        let host = unsafe { HostMemory::new(&slabs, PAGE_BYTES) }.with_ready_slabs(num_ready);
        let base = base();
        let engine = EngineConfig {
            vocab_size: base.vocab_size,
            descriptor_words: base.num_layers * 84,
            max_context: MAX_CONTEXT,
            eos_token_ids: text.stop_token_ids().to_vec(),
            ..engine
        };
        let config = RuntimeConfig { engine, base, num_loaders: 2, seed: 0 };
        let (runtime, stepper) = Runtime::new(config, host, Some(text.clone())).unwrap();
        let runtime = Arc::new(runtime);
        let step_us = Arc::new(AtomicU64::new(step_time.as_micros() as u64));
        let steps = std::thread::spawn({
            let (runtime, step_us) = (runtime.clone(), step_us.clone());
            move || run_steps(&runtime, stepper, &script, &step_us)
        });
        Self { runtime, text, step_us, steps: Some(steps), _memory: memory }
    }

    /// How long each step takes, the running one included.
    pub fn set_step_time(&self, time: Duration) {
        self.step_us.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub fn wait_until(&self, what: &str, is_so: impl Fn(&slora_core::Stats) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so(&self.runtime.snapshot().engine) {
            assert!(Instant::now() < deadline, "never so: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn close(&mut self) {
        self.runtime.begin_close();
        if let Some(steps) = self.steps.take() {
            let _ = steps.join();
        }
        self.runtime.close(None);
    }
}

impl Drop for RuntimeWorld {
    fn drop(&mut self) {
        self.close();
    }
}

fn run_steps(runtime: &Runtime, mut stepper: Stepper, script: &[u32], step_us: &AtomicU64) {
    let layout = stepper.engine().layout().clone();
    let array = |name: &str| layout.arrays().iter().find(|array| array.name == name).unwrap().offset;
    let (positions, sample_rows) = (array("positions"), array("sample_rows"));
    let mut buffer = vec![0; layout.num_words()];
    while runtime.is_open() {
        let Some(counts) = stepper.schedule(&mut buffer) else {
            runtime.wait(Duration::from_millis(50));
            continue;
        };
        let started = Instant::now();
        while let left = Duration::from_micros(step_us.load(Ordering::Relaxed)).saturating_sub(started.elapsed())
            && !left.is_zero()
            && runtime.is_open()
        {
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
        let token = |i: usize| {
            let position = buffer[positions + buffer[sample_rows + i] as usize] as usize;
            script[position.min(script.len() - 1)] as i32
        };
        let ids: Vec<i32> = (0..counts.num_sampled as usize).map(token).collect();
        stepper.commit(counts.step, &ids, Default::default());
        stepper.copies_done(counts.step);
    }
}
