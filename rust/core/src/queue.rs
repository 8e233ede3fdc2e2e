//! The waiting queue: first come, first served, except that a request whose adapter is not here yet blocks nobody.

use std::collections::BTreeMap;

/// Requests by order of arrival. `seq` is the order of arrival, which a preempted request keeps.
///
/// A request is *ready* if it may be admitted as far as its adapter is concerned. Every operation costs the logarithm of the
/// number that waits; none looks at all of them.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    ready: BTreeMap<u64, u32>,
    len: usize,
}

impl Queue {
    /// Requests that wait, ready or not.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn num_ready(&self) -> usize {
        self.ready.len()
    }

    pub fn push(&mut self, seq: u64, request: u32, is_ready: bool) {
        self.len += 1;
        if is_ready {
            self.ready.insert(seq, request);
        }
    }

    pub fn remove(&mut self, seq: u64) {
        self.len -= 1;
        self.ready.remove(&seq);
    }

    /// Its adapter is here, or no longer.
    pub fn set_ready(&mut self, seq: u64, request: u32, is_ready: bool) {
        if is_ready {
            self.ready.insert(seq, request);
        } else {
            self.ready.remove(&seq);
        }
    }

    /// The first ready request behind `seq`.
    pub fn next_ready(&self, after: Option<u64>) -> Option<(u64, u32)> {
        let start = after.map_or(0, |seq| seq + 1);
        self.ready.range(start..).next().map(|(seq, request)| (*seq, *request))
    }

    pub fn ready(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.ready.iter().map(|(seq, request)| (*seq, *request))
    }
}
