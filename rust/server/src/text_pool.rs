//! Threads for templates and tokenizing: few, so that no request's text holds up another's HTTP, in two lanes, so that
//! long texts do not hold up short ones either, and in turn, so that no tenant's texts hold up another's.

use std::sync::Arc;

use crate::errors::ApiError;
use crate::turns::Turns;

/// Texts of more bytes go the slow lane.
const LONG_BYTES: usize = 64 << 10;

/// Where text is worked on.
pub(crate) struct TextPool {
    short: Turns,
    long: Turns,
}

impl TextPool {
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        Self { short: Turns::new(threads), long: Turns::new(threads.div_ceil(2)) }
    }

    /// Runs `work` on a thread of the pool. A caller that leaves while waiting never starts it.
    pub async fn run<T: Send + 'static>(
        &self,
        tenant: &Arc<str>,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let lane = if bytes > LONG_BYTES { &self.long } else { &self.short };
        lane.run(tenant, work).await
    }
}
