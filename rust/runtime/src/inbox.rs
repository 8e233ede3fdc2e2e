//! Commands on their way to the step thread.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slora_core::{AdapterId, LoadFailure, NewRequest, RequestId};

use crate::output::Channel;
use crate::stepper::Stepper;

/// Commands that one step drains at most: arrivals never stretch a step without limit.
pub(crate) const MAX_DRAINED: usize = 4096;

/// What others want of the step thread.
pub(crate) enum Command {
    Submit(NewRequest, Arc<Channel>),
    Cancel(RequestId),
    /// The text of the request's first generated tokens holds no stop string.
    Checked(RequestId, u32),
    /// A load was answered: nothing, or the reason why not, and how long it took.
    Loaded(AdapterId, Result<(), LoadFailure>, Duration),
    Call(Box<dyn FnOnce(&mut Stepper) + Send>),
}

/// A queue with a limit on what clients may put in; the other commands are at most a few for each request or load.
#[derive(Default)]
pub(crate) struct Inbox {
    queue: Mutex<Queue>,
    condvar: Condvar,
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    num_submits: usize,
    is_closed: bool,
}

/// Why a command was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Full,
    Closed,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `limit`: submits that may wait here.
    pub fn submit(&self, request: NewRequest, channel: Arc<Channel>, limit: usize) -> Result<(), Refused> {
        let mut queue = self.lock();
        if queue.is_closed {
            return Err(Refused::Closed);
        }
        if queue.num_submits >= limit {
            return Err(Refused::Full);
        }
        queue.num_submits += 1;
        queue.commands.push_back(Command::Submit(request, channel));
        drop(queue);
        self.condvar.notify_one();
        Ok(())
    }

    pub fn push(&self, command: Command) -> Result<(), Refused> {
        let mut queue = self.lock();
        if queue.is_closed {
            return Err(Refused::Closed);
        }
        queue.commands.push_back(command);
        drop(queue);
        self.condvar.notify_one();
        Ok(())
    }

    /// Moves up to [`MAX_DRAINED`] commands into `into`.
    pub fn drain(&self, into: &mut Vec<Command>) {
        let mut queue = self.lock();
        let count = queue.commands.len().min(MAX_DRAINED);
        into.extend(queue.commands.drain(..count));
        queue.num_submits -= into.iter().filter(|command| matches!(command, Command::Submit(..))).count();
    }

    /// Waits for a command, the inbox's end, or the time to be over. Whether the inbox is open.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut queue = self.lock();
        while queue.commands.is_empty() && !queue.is_closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            queue = self.condvar.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        !queue.is_closed
    }

    pub fn is_open(&self) -> bool {
        !self.lock().is_closed
    }

    /// Takes nothing more, and returns what was waiting.
    pub fn close(&self) -> VecDeque<Command> {
        let mut queue = self.lock();
        queue.is_closed = true;
        queue.num_submits = 0;
        let commands = std::mem::take(&mut queue.commands);
        drop(queue);
        self.condvar.notify_all();
        commands
    }
}
