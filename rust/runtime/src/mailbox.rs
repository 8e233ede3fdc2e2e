//! Waking readers.

use std::io::{PipeReader, PipeWriter, Write};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use slora_core::RequestId;

/// Told that a request has something new for its reader. Called on the delivery thread: it must not block.
pub trait Wake: Send + Sync {
    /// The request has tokens or an end that were not taken yet.
    fn wake(&self, request: RequestId);
}

/// Collects the requests that have something new, for one reader of many requests.
///
/// The reader waits in [`wait`](Self::wait), or on the pipe of [`with_pipe`](Self::with_pipe), which becomes readable once
/// however many requests a step woke.
#[derive(Debug, Default)]
pub struct Mailbox {
    ready: Mutex<Vec<RequestId>>,
    condvar: Condvar,
    pipe: Option<PipeWriter>,
}

impl Mailbox {
    /// A mailbox whose reader waits on the pipe's other end, as event loops do.
    ///
    /// # Errors
    /// The system has no more file descriptors.
    pub fn with_pipe() -> std::io::Result<(Self, PipeReader)> {
        let (reader, writer) = std::io::pipe()?;
        Ok((Self { pipe: Some(writer), ..Self::default() }, reader))
    }

    /// The requests that have something new, each once; empty if there is none.
    pub fn take(&self) -> Vec<RequestId> {
        std::mem::take(&mut *self.ready.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for a request with something new, or until the time is over.
    pub fn wait(&self, timeout: Duration) -> Vec<RequestId> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut ready, _) = self
            .condvar
            .wait_timeout_while(ready, timeout, |ready| ready.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *ready)
    }
}

impl Wake for Mailbox {
    fn wake(&self, request: RequestId) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = ready.is_empty();
        ready.push(request);
        drop(ready);
        if was_empty {
            self.condvar.notify_all();
            if let Some(mut pipe) = self.pipe.as_ref() {
                // A pipe that nobody reads any more is no concern of the other requests.
                let _ = pipe.write(&[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn several_requests_make_the_pipe_readable_once() {
        let (mailbox, mut reader) = Mailbox::with_pipe().unwrap();
        mailbox.wake(RequestId(1));
        mailbox.wake(RequestId(2));
        assert_eq!(mailbox.take(), [RequestId(1), RequestId(2)]);
        mailbox.wake(RequestId(3));
        let mut bytes = [0; 8];
        assert_eq!(reader.read(&mut bytes).unwrap(), 2);
        assert_eq!(mailbox.wait(Duration::from_secs(5)), [RequestId(3)]);
        assert!(mailbox.wait(Duration::from_millis(1)).is_empty());
    }
}
