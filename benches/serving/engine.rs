//! An engine whose executor only pretends to compute: what is measured is everything around it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use slora_core::EngineConfig;
use slora_runtime::{HostMemory, Runtime, RuntimeConfig, StepLogprobs, Stepper};
use slora_store::{BaseSpec, Dtype};
use slora_text::TextModel;

/// First of the example's tokens that are letters.
const LETTER_A: u32 = 80;
/// Letters, and steps that can be told from each other.
pub const LETTERS: usize = 26;
const PAGE_BYTES: u64 = 32 << 10;
const NUM_HOST_PAGES: u32 = 512;
/// A late step is made up for, up to so much.
const MAX_LATE: Duration = Duration::from_millis(50);

/// A file that holds when the last step of each letter was made: the load's process reads it.
pub struct Made(pub File);

impl Made {
    pub fn set(&self, letter: usize) {
        // A figure that is lost shows as a delay that cannot be.
        let _ = self.0.write_all_at(&unix_time_ns().to_le_bytes(), 8 * letter as u64);
    }

    pub fn get(&self, letter: usize) -> u64 {
        let mut bytes = [0; 8];
        let _ = self.0.read_exact_at(&mut bytes, 8 * letter as u64);
        u64::from_le_bytes(bytes)
    }
}

pub fn unix_time_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

pub fn example(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny").join(path);
    path.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The engine and the thread that runs its steps.
pub struct Engine {
    pub runtime: Arc<Runtime>,
    stops: Arc<AtomicBool>,
    thread: Option<JoinHandle<Stepper>>,
}

impl Engine {
    pub fn start(step: Duration, max_running: u32, made: Made) -> Self {
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
        // Not zeros: it is in memory from the start, as a pinned host tier is, and no growth of the server's.
        let slab = Box::leak(vec![1u64; bytes as usize / 8].into_boxed_slice());
        let Some(address) = NonNull::new(slab.as_mut_ptr().cast::<u8>()) else { panic!("a slab has an address") };
        // SAFETY: the slab lives for ever and nobody else knows it.
        let host = unsafe { HostMemory::new(&[(address, bytes as usize)], PAGE_BYTES as usize) };
        let text = TextModel::from_dir(&example("base")).unwrap_or_else(|error| panic!("{error}"));
        let config = RuntimeConfig { engine, base, num_loaders: 1, seed: 1 };
        let started = Runtime::new(config, host, Some(Arc::new(text)));
        let (runtime, stepper) = started.unwrap_or_else(|error| panic!("{error}"));
        let (runtime, stops) = (Arc::new(runtime), Arc::new(AtomicBool::new(false)));
        let steps = Steps { runtime: runtime.clone(), stops: stops.clone(), step, made };
        let thread = std::thread::Builder::new().name("step".into()).spawn(move || steps.run(stepper)).ok();
        Self { runtime, stops, thread }
    }
}

impl Drop for Engine {
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
    made: Made,
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
            due = due.max(Instant::now() - MAX_LATE);
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
