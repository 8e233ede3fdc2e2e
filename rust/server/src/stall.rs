//! How long the engine has had something to do without a step being done.

use std::time::{Duration, Instant};

/// What was seen of that. It is looked at now and then, so that work which is seen first has just come: since the last
/// look there may have been none.
#[derive(Debug, Default)]
pub(crate) struct Stall {
    /// Steps that were done, and since when there has been work behind them.
    since: Option<(u64, Instant)>,
}

impl Stall {
    /// How long a step has taken at least.
    pub fn look(&mut self, has_work: bool, steps: u64, now: Instant) -> Duration {
        let same = self.since.filter(|(before, _)| *before == steps);
        self.since = has_work.then(|| same.unwrap_or((steps, now)));
        self.since.map_or(Duration::ZERO, |(_, since)| now - since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_work_or_with_steps_is_no_stall() {
        let (mut stall, start) = (Stall::default(), Instant::now());
        let mut look = |second: u64, has_work: bool, steps: u64| {
            stall.look(has_work, steps, start + Duration::from_secs(second)).as_secs()
        };
        assert_eq!([look(0, false, 0), look(1, false, 0)], [0, 0]);
        assert_eq!(look(2, true, 0), 0, "it may have come a moment ago");
        assert_eq!([look(3, true, 0), look(4, true, 0)], [1, 2]);
        assert_eq!([look(5, true, 7), look(6, true, 9), look(7, true, 9)], [0, 0, 1]);
        assert_eq!([look(8, false, 9), look(9, true, 9), look(10, true, 9)], [0, 0, 1]);
    }
}
