//! What the engine is told once, when it is made.

use crate::request::SubmitError;

/// In which order waiting requests of one priority are admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QueueOrder {
    /// First come, first served.
    #[default]
    Fcfs,
    /// The account that was given least goes first, by its [weight](crate::Account::weight).
    Fair,
}

/// Who gives way among idle adapters when pages are short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eviction {
    /// The least recently used.
    Lru,
    /// Of the least recently used few, the one that is cheapest to bring back for its recent use and size.
    #[default]
    CostAware,
}

/// Sizes and limits of an [`Engine`](crate::Engine).
///
/// Pages are counted, never bytes: a page of the device and of the host pool have the same size.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Pages of the device pool, shared by KV cache and adapters.
    pub num_pages: u32,
    /// Pages of the host pool, which holds adapter images.
    pub num_host_pages: u32,
    /// Tokens whose KV cache fills one page.
    pub page_tokens: u32,
    /// Token rows of one step.
    pub max_batch_tokens: u32,
    /// Requests that run at once. At most `max_batch_tokens` do, so that every one can decode in every step.
    pub max_running: u32,
    /// Requests that wait; one more is refused.
    pub max_waiting: u32,
    /// Distinct adapters among the running requests: rows of the device's descriptor table.
    pub max_adapters: u32,
    /// Tokens of one sequence, prompt and output together.
    pub max_context: u32,
    /// Pages of one adapter's image: the width of the device's adapter page table.
    pub max_adapter_pages: u32,
    /// 32-bit words of one adapter's descriptor.
    pub descriptor_words: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Tokens that end a request (unless it ignores them).
    pub eos_token_ids: Vec<u32>,
    /// Adapters that may be read from disk at the same time.
    pub max_loads: u32,
    /// Pages whose copies may be ordered within one step; larger swap-ins arrive outside the step. `u32::MAX`: no limit.
    pub max_copy_pages: u32,
    /// Who is admitted next.
    pub queue: QueueOrder,
    /// Whether spare pages are spent on the adapters of requests that come next.
    pub prefetch: bool,
    /// Who gives way.
    pub eviction: Eviction,
    /// The highest number of a step. The next one is number 1 again, when nothing in flight has a number.
    pub max_step: u32,
    /// What it costs to bring an adapter page back from the host tier, in nanoseconds.
    pub host_page_cost_ns: u32,
    /// What it costs to bring an adapter page back from disk, in nanoseconds.
    pub disk_page_cost_ns: u32,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            num_pages: 1024,
            num_host_pages: 1024,
            page_tokens: 16,
            max_batch_tokens: 2048,
            max_running: 256,
            max_waiting: 100_000,
            max_adapters: 256,
            max_context: 4096,
            max_adapter_pages: 1024,
            descriptor_words: 84,
            vocab_size: 32_000,
            eos_token_ids: Vec::new(),
            max_loads: 8,
            max_copy_pages: u32::MAX,
            queue: QueueOrder::default(),
            prefetch: true,
            eviction: Eviction::default(),
            max_step: i32::MAX as u32,
            host_page_cost_ns: 40_000,
            disk_page_cost_ns: 2_000_000,
        }
    }
}

/// A configuration with which no engine can work.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A limit is zero.
    #[error("{0} is 0, it must be at least 1")]
    Zero(&'static str),
    /// `page_tokens` is not a power of two.
    #[error("page_tokens is {0}, it must be a power of two")]
    PageTokens(u32),
    /// A limit is so large that positions or array sizes would overflow.
    #[error("{name} is {value}, the limit is {limit}")]
    TooLarge {
        /// Which limit.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What it may be at most.
        limit: u64,
    },
}

impl EngineConfig {
    /// Refuses a request whose prompt and output do not fit the context: whoever has its prompt can do so without the engine.
    pub fn check_len(&self, prompt_len: usize, max_tokens: u32) -> Result<(), SubmitError> {
        let (max_context, needed) = (self.max_context, prompt_len as u64 + u64::from(max_tokens));
        if needed <= u64::from(max_context) {
            return Ok(());
        }
        Err(SubmitError::TooLong { max_context, needed, prompt_len, max_tokens })
    }

    /// Refuses what cannot work and lowers limits that nothing could reach: `max_context` to what the pool holds,
    /// `max_running` and `max_adapters` to what one step can carry.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        let positive = [
            ("num_pages", self.num_pages),
            ("num_host_pages", self.num_host_pages),
            ("max_batch_tokens", self.max_batch_tokens),
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_adapters", self.max_adapters),
            ("max_context", self.max_context),
            ("max_adapter_pages", self.max_adapter_pages),
            ("descriptor_words", self.descriptor_words),
            ("vocab_size", self.vocab_size),
            ("max_loads", self.max_loads),
            ("max_copy_pages", self.max_copy_pages),
            ("max_step", self.max_step),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if !self.page_tokens.is_power_of_two() {
            return Err(ConfigError::PageTokens(self.page_tokens));
        }
        let slots = u64::from(self.num_pages) * u64::from(self.page_tokens);
        let bounded = [
            ("num_pages × page_tokens", slots, i32::MAX as u64),
            ("num_host_pages", u64::from(self.num_host_pages), i32::MAX as u64),
            ("vocab_size", u64::from(self.vocab_size), i32::MAX as u64),
            ("max_batch_tokens", u64::from(self.max_batch_tokens), 1 << 20),
            ("max_step", u64::from(self.max_step), i32::MAX as u64),
        ];
        if let Some(&(name, value, limit)) = bounded.iter().find(|(_, value, limit)| value > limit) {
            return Err(ConfigError::TooLarge { name, value, limit });
        }
        self.max_context = self.max_context.min(slots as u32);
        self.max_running = self.max_running.min(self.max_batch_tokens);
        self.max_adapters = self.max_adapters.min(self.max_running);
        self.max_adapter_pages = self.max_adapter_pages.min(self.num_pages).min(self.num_host_pages);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_lowered_to_what_can_be_reached() {
        let config = EngineConfig { num_pages: 4, max_batch_tokens: 8, max_running: 64, ..EngineConfig::default() };
        let config = config.checked().unwrap();
        assert_eq!((config.max_context, config.max_running, config.max_adapters), (64, 8, 8));
        assert_eq!(config.max_adapter_pages, 4);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let zero = EngineConfig { num_pages: 0, ..EngineConfig::default() };
        assert_eq!(zero.checked().unwrap_err(), ConfigError::Zero("num_pages"));
        let odd = EngineConfig { page_tokens: 24, ..EngineConfig::default() };
        assert_eq!(odd.checked().unwrap_err(), ConfigError::PageTokens(24));
        let large = EngineConfig { num_pages: u32::MAX, ..EngineConfig::default() };
        assert!(matches!(large.checked().unwrap_err(), ConfigError::TooLarge { .. }));
    }
}
