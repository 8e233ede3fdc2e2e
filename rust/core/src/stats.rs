//! Counters of the engine.

/// What the engine has done and holds. Counters grow for ever, gauges (marked *now*) go up and down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages of the device pool.
    pub num_pages: u32,
    /// Now: free pages.
    pub free_pages: u32,
    /// Now: pages with KV cache.
    pub kv_pages: u32,
    /// Now: pages with adapters.
    pub adapter_pages: u32,
    /// Of these, pages of adapters that no running request uses.
    pub idle_adapter_pages: u32,
    /// Pages of the host pool.
    pub num_host_pages: u32,
    /// Now: free host pages.
    pub free_host_pages: u32,
    /// Now: requests that run.
    pub running: u32,
    /// Now: requests that wait.
    pub waiting: u32,
    /// Now: those of them whose adapter is not in the host tier or still being copied.
    pub waiting_for_adapter: u32,
    /// Now: registered adapters, retired versions included.
    pub adapters: u32,
    /// Now: adapters on the device.
    pub resident_adapters: u32,
    /// Now: adapters in the host tier.
    pub host_adapters: u32,
    /// Now: adapters being loaded.
    pub loading_adapters: u32,
    /// Steps planned.
    pub steps: u64,
    /// Token rows planned.
    pub rows: u64,
    /// Requests submitted.
    pub submitted: u64,
    /// Requests that ended.
    pub ended: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Times that the next request waited because no row was left for its adapter's descriptor or its penalty counts.
    pub row_deferrals: u64,
    /// Adapters whose device pages were given back while they stay registered.
    pub adapter_evictions: u64,
    /// Adapters whose host pages were given back likewise.
    pub host_evictions: u64,
    /// Swap-ins, prefetches included.
    pub swap_ins: u64,
    /// Pages swapped in.
    pub swap_in_pages: u64,
    /// Swap-ins before any running request asked.
    pub prefetches: u64,
    /// Loads from disk that finished.
    pub loads: u64,
    /// Loads from disk that failed.
    pub load_failures: u64,
}

impl Stats {
    /// Every figure with its name.
    pub fn named(&self) -> [(&'static str, u64); 28] {
        [
            ("num_pages", self.num_pages.into()),
            ("free_pages", self.free_pages.into()),
            ("kv_pages", self.kv_pages.into()),
            ("adapter_pages", self.adapter_pages.into()),
            ("idle_adapter_pages", self.idle_adapter_pages.into()),
            ("num_host_pages", self.num_host_pages.into()),
            ("free_host_pages", self.free_host_pages.into()),
            ("running", self.running.into()),
            ("waiting", self.waiting.into()),
            ("waiting_for_adapter", self.waiting_for_adapter.into()),
            ("adapters", self.adapters.into()),
            ("resident_adapters", self.resident_adapters.into()),
            ("host_adapters", self.host_adapters.into()),
            ("loading_adapters", self.loading_adapters.into()),
            ("steps", self.steps),
            ("rows", self.rows),
            ("submitted", self.submitted),
            ("ended", self.ended),
            ("generated_tokens", self.generated_tokens),
            ("preemptions", self.preemptions),
            ("row_deferrals", self.row_deferrals),
            ("adapter_evictions", self.adapter_evictions),
            ("host_evictions", self.host_evictions),
            ("swap_ins", self.swap_ins),
            ("swap_in_pages", self.swap_in_pages),
            ("prefetches", self.prefetches),
            ("loads", self.loads),
            ("load_failures", self.load_failures),
        ]
    }
}
