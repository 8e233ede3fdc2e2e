//! Time that work takes, however busy the machine is with other things.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor time that this thread has had.
pub fn of_thread() -> Duration {
    of(ClockId::ThreadCPUTime)
}

/// Processor time that all threads have had.
pub fn of_process() -> Duration {
    of(ClockId::ProcessCPUTime)
}

fn of(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
