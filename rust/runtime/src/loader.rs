//! Loader threads: adapter files → host pages.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use slora_core::{AdapterId, LoadFailure};
use slora_store::{Adapter, HostPages};

use crate::inbox::{Command, Inbox};

/// One adapter on its way; several threads pack its parts.
struct Job {
    id: AdapterId,
    adapter: Arc<Adapter>,
    pages: HostPages,
    /// How many slabs must be ready before the image may be copied from.
    num_slabs: usize,
    started: Instant,
    /// Set by a failure too, so that the other threads stop.
    is_cancelled: AtomicBool,
    next_part: AtomicUsize,
    parts_left: AtomicUsize,
    failure: Mutex<Option<LoadFailure>>,
}

#[derive(Default)]
struct Jobs {
    /// Jobs with parts that nobody has taken yet.
    open: VecDeque<Arc<Job>>,
    /// All that were not answered.
    unanswered: Vec<Arc<Job>>,
    /// Those of them that are packed, into slabs that are not ready.
    packed: Vec<Arc<Job>>,
    num_ready_slabs: usize,
    /// Loaded adapters whose files are yet to be hashed, if they are not gone by then: a load never waits for that.
    unhashed: BTreeMap<AdapterId, Weak<Adapter>>,
    /// One thread does; the others are there for loads.
    is_hashing: bool,
    is_closed: bool,
}

/// Once for an adapter, however often it is loaded before loads leave the time for it.
fn hash_later<A>(unhashed: &mut BTreeMap<AdapterId, Weak<A>>, id: AdapterId, adapter: &Arc<A>) {
    unhashed.retain(|_, adapter| adapter.strong_count() > 0);
    unhashed.insert(id, Arc::downgrade(adapter));
}

enum Work {
    Pack(Arc<Job>, usize),
    Hash(Arc<Adapter>),
}

/// What loader threads share with whoever prepares the host tier's memory.
pub(crate) struct Shared {
    jobs: Mutex<Jobs>,
    /// Hashing stops too.
    is_closing: AtomicBool,
    condvar: Condvar,
    inbox: Arc<Inbox>,
}

/// Threads that answer every load with [`Command::Loaded`]. How many loads are open is the engine's limit.
pub(crate) struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Loader {
    /// `num_ready_slabs`: of the host tier, for now; see [`Shared::slabs_ready`].
    pub fn new(num_threads: usize, num_ready_slabs: usize, inbox: Arc<Inbox>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            jobs: Mutex::new(Jobs { num_ready_slabs, ..Jobs::default() }),
            is_closing: AtomicBool::new(false),
            condvar: Condvar::new(),
            inbox,
        });
        let threads = (0..num_threads.max(1))
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("slora-load-{i}")).spawn(move || shared.run())
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { shared, threads })
    }

    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// `num_slabs`: the first so many hold all the pages.
    pub fn start(&self, id: AdapterId, adapter: Arc<Adapter>, pages: HostPages, num_slabs: usize) {
        let num_parts = adapter.num_parts();
        let job = Arc::new(Job {
            id,
            adapter,
            pages,
            num_slabs,
            started: Instant::now(),
            is_cancelled: AtomicBool::new(false),
            next_part: AtomicUsize::new(0),
            parts_left: AtomicUsize::new(num_parts),
            failure: Mutex::new(None),
        });
        let mut jobs = self.shared.lock();
        jobs.open.push_back(job.clone());
        jobs.unanswered.push(job);
        drop(jobs);
        self.shared.condvar.notify_all();
    }

    /// Stops a load soon; it is still answered.
    pub fn cancel(&self, id: AdapterId) {
        for job in self.shared.lock().unanswered.iter().filter(|job| job.id == id) {
            job.is_cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Stops all loads and waits for the threads: nobody writes to host pages afterwards.
    pub fn close(&mut self) {
        let mut jobs = self.shared.lock();
        jobs.is_closed = true;
        jobs.unanswered.iter().for_each(|job| job.is_cancelled.store(true, Ordering::Relaxed));
        self.shared.is_closing.store(true, Ordering::Relaxed);
        drop(jobs);
        self.shared.condvar.notify_all();
        for thread in self.threads.drain(..) {
            // A loader that panicked has answered its load already.
            let _ = thread.join();
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(work) = self.next_work() {
            match work {
                Work::Pack(job, part) => self.pack(job, part),
                // A file that cannot be read any more has no hash; the next load says why.
                Work::Hash(adapter) => {
                    let _ = adapter.hash(&self.is_closing);
                    self.lock().is_hashing = false;
                }
            }
        }
    }

    fn pack(&self, job: Arc<Job>, part: usize) {
        let pack = || job.adapter.pack_part(part, &job.pages, &job.is_cancelled);
        let failure = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(pack)) {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(LoadFailure { code: error.code(), message: error.to_string().into() }),
            Err(_) => Some(LoadFailure { code: "internal", message: "the loader panicked".into() }),
        };
        if let Some(failure) = failure {
            let mut first = job.failure.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(failure);
            job.is_cancelled.store(true, Ordering::Relaxed);
        }
        if job.parts_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish(job);
        }
    }

    /// Answers a packed job once its slabs are ready. No thread waits for that, and a failure is told at once.
    fn finish(&self, job: Arc<Job>) {
        let has_failed = job.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        let mut jobs = self.lock();
        if !has_failed && job.num_slabs > jobs.num_ready_slabs {
            jobs.packed.push(job);
            return;
        }
        drop(jobs);
        self.answer(&job);
    }

    /// The first `num_slabs` slabs may be copied from.
    pub fn slabs_ready(&self, num_slabs: usize) {
        let mut jobs = self.lock();
        jobs.num_ready_slabs = jobs.num_ready_slabs.max(num_slabs);
        let (done, rest) = std::mem::take(&mut jobs.packed).into_iter().partition(|job| job.num_slabs <= num_slabs);
        jobs.packed = rest;
        drop(jobs);
        let done: Vec<Arc<Job>> = done;
        done.iter().for_each(|job| self.answer(job));
    }

    /// The next thing to do, loads before hashes; `None`: the pool is closed.
    fn next_work(&self) -> Option<Work> {
        let mut jobs = self.lock();
        loop {
            if jobs.is_closed {
                return None;
            }
            if let Some(job) = jobs.open.front().cloned() {
                let part = job.next_part.fetch_add(1, Ordering::Relaxed);
                if part + 1 >= job.adapter.num_parts() {
                    jobs.open.pop_front();
                }
                return Some(Work::Pack(job, part));
            }
            if !jobs.is_hashing
                && let Some((_, adapter)) = jobs.unhashed.pop_first()
            {
                let Some(adapter) = adapter.upgrade() else { continue };
                jobs.is_hashing = true;
                return Some(Work::Hash(adapter));
            }
            jobs = self.condvar.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn answer(&self, job: &Job) {
        let result = match job.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => Ok(()),
            Some(failure) => Err(failure),
        };
        let mut jobs = self.lock();
        jobs.unanswered.retain(|other| other.id != job.id);
        if result.is_ok() && job.adapter.sha256().is_none() {
            hash_later(&mut jobs.unhashed, job.id, &job.adapter);
        }
        drop(jobs);
        self.condvar.notify_one();
        // A closed inbox: nobody waits for the adapter any more.
        let _ = self.inbox.push(Command::Loaded(job.id, result, job.started.elapsed()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_files_wait_to_be_hashed_than_there_are_adapters() {
        let (mut unhashed, adapters) = (BTreeMap::new(), [Arc::new(()), Arc::new(())]);
        for _ in 0..100 {
            for (index, adapter) in (0..).zip(&adapters) {
                hash_later(&mut unhashed, AdapterId { index, generation: 1 }, adapter);
            }
        }
        assert_eq!(unhashed.len(), 2);
        for generation in 2..100 {
            hash_later(&mut unhashed, AdapterId { index: 0, generation }, &Arc::new(()));
        }
        assert!(unhashed.len() <= 3, "{} of adapters that are gone", unhashed.len());
    }
}
