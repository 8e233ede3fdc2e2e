//! An engine whose executor only pretends to compute: what is measured is everything around it.

use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use slora_core::EngineConfig;
use slora_runtime::{HostMemory, Runtime, RuntimeConfig, StepLogprobs, Stepper};
use slora_store::{BaseSpec, Dtype};
use slora_text::TextModel;

/// First of the example's tokens that are letters.
const LETTER_A: u32 = 80;
/// Letters, and steps that can be told from each other.
pub const LETTERS: usize = 26;
const PAGE_BYTES: u64 = 32 << 10;
const NUM_HOST_PAGES: u32 = 1024;

/// When the last step of each letter was made.
pub struct Made {
    epoch: Instant,
    at_ns: [AtomicU64; LETTERS],
}

impl Made {
    fn new() -> Self {
        Self { epoch: Instant::now(), at_ns: [const { AtomicU64::new(0) }; LETTERS] }
    }

    fn set(&self, letter: usize) {
        self.at_ns[letter].store(self.epoch.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// How long ago it was at `now`.
    pub fn since(&self, letter: usize, now: Instant) -> Duration {
        let at = Duration::from_nanos(self.at_ns[letter].load(Ordering::Relaxed));
        now.saturating_duration_since(self.epoch + at)
    }
}

pub fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny").join(path)
}

/// The engine and the thread that runs its steps.
pub struct Fake {
    pub runtime: Arc<Runtime>,
    pub made: Arc<Made>,
    stops: Arc<AtomicBool>,
    thread: Option<JoinHandle<Stepper>>,
}

impl Fake {
    pub fn start(step: Duration, max_running: u32) -> Self {
        let engine = EngineConfig {
            num_pages: 128 * max_running.max(64),
            num_host_pages: NUM_HOST_PAGES,
            max_batch_tokens: 4096,
            max_running,
            max_context: 1024,
            descriptor_words: 4 * 7 * 12,
            vocab_size: 512,
            eos_token_ids: vec![2],
            ..EngineConfig::default()
        };
        let base = BaseSpec {
            num_layers: 4,
            hidden: 256,
            intermediate: 704,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 512,
            dtype: Dtype::Bf16,
            page_bytes: PAGE_BYTES,
            tp_rank: 0,
            tp_size: 1,
            name: None,
            max_adapter_pages: 0,
            max_rank: u32::MAX,
        };
        let bytes = u64::from(NUM_HOST_PAGES) * PAGE_BYTES;
        let slab = Box::leak(vec![0u64; bytes as usize / 8].into_boxed_slice());
        let Some(address) = NonNull::new(slab.as_mut_ptr().cast::<u8>()) else { panic!("a slab has an address") };
        // SAFETY: the slab lives for ever and nobody else knows it.
        let host = unsafe { HostMemory::new(&[(address, bytes as usize)], PAGE_BYTES as usize) };
        let text = TextModel::from_dir(&example("base")).unwrap_or_else(|error| panic!("{error}"));
        let config = RuntimeConfig { engine, base, num_loaders: 1, seed: 1 };
        let started = Runtime::new(config, host, Some(Arc::new(text)));
        let (runtime, stepper) = started.unwrap_or_else(|error| panic!("{error}"));
        let runtime = Arc::new(runtime);
        let (stops, made) = (Arc::new(AtomicBool::new(false)), Arc::new(Made::new()));
        let steps = Steps { runtime: runtime.clone(), stops: stops.clone(), step, made: made.clone() };
        let thread = std::thread::Builder::new().name("step".into()).spawn(move || steps.run(stepper)).ok();
        Self { runtime, made, stops, thread }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Relaxed);
        self.runtime.begin_close();
        if let Some(Ok(mut stepper)) = self.thread.take().map(JoinHandle::join) {
            self.runtime.close(Some(&mut stepper));
        }
    }
}

struct Steps {
    runtime: Arc<Runtime>,
    stops: Arc<AtomicBool>,
    step: Duration,
    made: Arc<Made>,
}

impl Steps {
    fn run(&self, mut stepper: Stepper) -> Stepper {
        let mut buffer = vec![0; stepper.engine().layout().num_words()];
        let mut due = Instant::now();
        while !self.stops.load(Ordering::Relaxed) {
            let Some(counts) = stepper.schedule(&mut buffer) else {
                self.runtime.wait(Duration::from_millis(20));
                due = Instant::now();
                continue;
            };
            // By the clock: what planning took is part of the step, and a late step does not shift the next ones.
            due += self.step;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            due = due.max(Instant::now() - Duration::from_millis(50));
            // Every token of a step is the same letter: it tells a reader when it was made.
            let letter = counts.step as usize % LETTERS;
            let sampled = vec![(LETTER_A + letter as u32) as i32; counts.num_sampled as usize];
            self.made.set(letter);
            stepper.commit(counts.step, &sampled, StepLogprobs::default());
            stepper.copies_done(counts.step);
        }
        stepper
    }
}
