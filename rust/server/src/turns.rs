//! Work for a few threads, which tenants' turns share: whoever sends much waits for its own work, not others for all of it.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::errors::ApiError;

type Work = Box<dyn FnOnce() + Send>;

/// Work that was not begun, or its empty place: whoever leaves takes its work along, and all that the work holds.
#[derive(Clone)]
struct Ticket(Arc<Mutex<Option<Work>>>);

impl Ticket {
    fn take(&self) -> Option<Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The caller's end of a ticket.
struct Caller(Ticket);

impl Drop for Caller {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

/// A queue of work and how many of the blocking threads it may have at once. A thread takes the next work itself: one that
/// waited for somebody to hand it over, on a thread that is busy with other things, would be idle for as long.
pub(crate) struct Turns(Arc<Mutex<Queue>>);

struct Queue {
    max_threads: usize,
    num_threads: usize,
    /// Of each tenant that has some.
    work: HashMap<Arc<str>, VecDeque<Ticket>>,
    /// Those tenants, in the order of their turns.
    tenants: VecDeque<Arc<str>>,
}

impl Queue {
    fn push(&mut self, tenant: &Arc<str>, ticket: Ticket) {
        let own = self.work.entry(tenant.clone()).or_default();
        if own.is_empty() {
            self.tenants.push_back(tenant.clone());
        }
        own.push_back(ticket);
    }

    fn pop(&mut self) -> Option<Ticket> {
        let tenant = self.tenants.pop_front()?;
        let own = self.work.get_mut(&tenant)?;
        let next = own.pop_front();
        if own.is_empty() {
            self.work.remove(&tenant);
        } else {
            self.tenants.push_back(tenant);
        }
        next
    }
}

impl Turns {
    pub fn new(max_threads: usize) -> Self {
        let (work, tenants) = Default::default();
        Self(Arc::new(Mutex::new(Queue { max_threads, num_threads: 0, work, tenants })))
    }

    /// Runs `work` when it is its turn. A caller that leaves while waiting never starts it.
    pub async fn run<T: Send + 'static>(
        &self,
        tenant: &Arc<str>,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (sender, receiver) = oneshot::channel();
        let work = move || {
            // Whoever has left wants no result.
            let _ = sender.send(work());
        };
        let ticket = Ticket(Arc::new(Mutex::new(Some(Box::new(work)))));
        let _caller = Caller(ticket.clone());
        self.push(tenant, ticket);
        receiver.await.unwrap_or_else(|_| Err(ApiError::internal("the work for this request broke")))
    }

    fn push(&self, tenant: &Arc<str>, ticket: Ticket) {
        let mut queue = lock(&self.0);
        queue.push(tenant, ticket);
        if queue.num_threads < queue.max_threads {
            queue.num_threads += 1;
            let queue = self.0.clone();
            tokio::task::spawn_blocking(move || work_off(&queue));
        }
    }
}

fn work_off(queue: &Mutex<Queue>) {
    loop {
        let mut locked = lock(queue);
        let Some(ticket) = locked.pop() else {
            locked.num_threads -= 1;
            return;
        };
        drop(locked);
        if let Some(work) = ticket.take() {
            // Its caller is told by the sender that was dropped.
            let _ = catch_unwind(AssertUnwindSafe(work));
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    fn tenant(name: &str) -> Arc<str> {
        name.into()
    }

    /// The place of whoever left is still in the line when all others have had their turns.
    async fn idle(turns: &Turns) {
        while lock(&turns.0).num_threads > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn a_tenant_with_much_to_do_holds_others_up_for_one_turn() {
        let turns = Arc::new(Turns::new(2));
        let (order, may_begin) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let ask = |name: &'static str| {
            let (turns, order, may_begin) = (turns.clone(), order.clone(), may_begin.clone());
            let work = move || {
                while !may_begin.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                order.lock().unwrap().push(name);
                std::thread::sleep(Duration::from_millis(2));
                Ok(())
            };
            tokio::spawn(async move { turns.run(&tenant(name), work).await })
        };
        let mut tasks: Vec<_> = (0..50).map(|_| ask("many")).collect();
        tokio::task::yield_now().await;
        let left = tasks.pop().unwrap();
        left.abort();
        assert!(left.await.unwrap_err().is_cancelled());
        tasks.push(ask("one"));
        tokio::task::yield_now().await;
        may_begin.store(true, Ordering::Relaxed);
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let order = std::mem::take(&mut *order.lock().unwrap());
        let place = order.iter().position(|name| *name == "one").unwrap();
        assert!(order.len() == 50 && place < 10, "{place} of {}", order.len());
        idle(&turns).await;
        let queue = lock(&turns.0);
        assert!(queue.work.is_empty() && queue.tenants.is_empty(), "those who have nothing are forgotten");
    }

    #[tokio::test]
    async fn work_goes_on_while_the_threads_that_do_http_are_busy() {
        let (turns, num_done) = (Arc::new(Turns::new(2)), Arc::new(AtomicUsize::new(0)));
        for _ in 0..20 {
            let (turns, num_done) = (turns.clone(), num_done.clone());
            let work = move || Ok(num_done.fetch_add(1, Ordering::Relaxed));
            tokio::spawn(async move { turns.run(&tenant("anybody"), work).await });
        }
        tokio::task::yield_now().await;
        let deadline = Instant::now() + Duration::from_secs(60);
        while num_done.load(Ordering::Relaxed) < 20 {
            assert!(Instant::now() < deadline, "{num_done:?} of 20");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[tokio::test]
    async fn whoever_leaves_takes_its_work_along() {
        let turns = Arc::new(Turns::new(1));
        let ((go, wait), held) = (std::sync::mpsc::channel::<()>(), Arc::new(()));
        let (first, second) = (turns.clone(), turns.clone());
        let first = tokio::spawn(async move { first.run(&tenant("anybody"), move || Ok(wait.recv().is_ok())).await });
        let payload = held.clone();
        let second = tokio::spawn(async move { second.run(&tenant("anybody"), move || Ok(payload)).await });
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&held), 2);
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        assert_eq!(Arc::strong_count(&held), 1, "nothing is kept of it, though the only thread is busy");
        go.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn work_that_breaks_ends_its_caller_only() {
        let turns = Turns::new(1);
        let broken = turns.run(&tenant("anybody"), || -> Result<(), ApiError> { panic!("broken") }).await;
        assert_eq!(broken.unwrap_err().code, "internal_error");
        assert_eq!(turns.run(&tenant("anybody"), || Ok(1)).await.unwrap(), 1);
        idle(&turns).await;
    }
}
