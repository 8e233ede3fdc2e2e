//! Time that work takes, however busy the machine is with other things.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor time that this thread has had.
pub fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
