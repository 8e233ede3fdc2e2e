//! Loads from disk, shared by accounts: self-clocked fair queueing (Golestani, INFOCOM '94).

use std::collections::{BTreeSet, HashMap};

use crate::account::Holder;

/// Where the accounts of one priority stand in the order of loads, apart from their tokens: whose queue is long must not
/// hold up the first load of another, nor wait for ever behind those whose queues are short.
///
/// A load's tag is its cost behind that of its account's last one, or behind `time`: the tag of the last load that was
/// ordered. So whoever is new stands behind those whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct LoadShares {
    time: u128,
    /// The last load's tag, of accounts for which that is later than `time`; also by it.
    last: HashMap<Holder, u128>,
    by_last: BTreeSet<(u128, Holder)>,
}

impl LoadShares {
    pub fn time(&self) -> u128 {
        self.time
    }

    /// Where the account's next load stands.
    pub fn tag(&self, holder: &Holder, cost: u64) -> u128 {
        self.last.get(holder).map_or(self.time, |last| *last) + u128::from(cost)
    }

    /// The account asked for its next load, which has this tag.
    pub fn ask(&mut self, holder: &Holder, tag: u128) {
        if tag > self.time {
            if let Some(old) = self.last.insert(holder.clone(), tag) {
                self.by_last.remove(&(old, holder.clone()));
            }
            self.by_last.insert((tag, holder.clone()));
        }
    }

    /// The load with this tag was ordered.
    pub fn ordered(&mut self, tag: u128) {
        self.time = self.time.max(tag);
        while self.by_last.first().is_some_and(|(last, _)| *last <= self.time) {
            if let Some((_, holder)) = self.by_last.pop_first() {
                self.last.remove(&holder);
            }
        }
    }

    /// Nobody waits for a load: loads that were asked for and are not wanted any more do not count.
    pub fn settle(&mut self) {
        if let Some(last) = self.by_last.last().map(|(last, _)| *last) {
            self.ordered(last);
        }
    }

    /// Asserts what must hold.
    pub fn check(&self) {
        let is_listed = |(last, holder): &(u128, Holder)| self.last.get(holder) == Some(last) && *last > self.time;
        assert!(self.by_last.iter().all(is_listed) && self.by_last.len() == self.last.len(), "who is ahead is listed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(shares: &mut LoadShares, tenant: &str, cost: u64) -> u128 {
        let holder = Holder::Tenant(tenant.into());
        let tag = shares.tag(&holder, cost);
        shares.ask(&holder, tag);
        shares.check();
        tag
    }

    #[test]
    fn a_load_stands_behind_its_accounts_last_one_and_the_last_one_ordered() {
        let mut shares = LoadShares::default();
        assert_eq!([(); 3].map(|()| ask(&mut shares, "a", 10)), [10, 20, 30]);
        assert_eq!([(); 3].map(|()| ask(&mut shares, "b", 5)), [5, 10, 15]);
        shares.ordered(20);
        shares.ordered(10);
        assert_eq!(["b", "c", "a"].map(|tenant| ask(&mut shares, tenant, 1)), [21, 21, 31]);
    }

    #[test]
    fn accounts_that_come_and_go_leave_nothing_behind() {
        let mut shares = LoadShares::default();
        for i in 0..1_000 {
            let tag = ask(&mut shares, &format!("tenant {i}"), 10);
            shares.ordered(tag);
            assert!(shares.last.is_empty());
            // These two are cancelled before they are ordered.
            ask(&mut shares, &format!("tenant {i}"), 10);
            ask(&mut shares, "always", 10);
            shares.settle();
            assert!(shares.last.is_empty());
        }
    }

    #[test]
    fn without_a_cost_everybody_stands_at_the_beginning() {
        let mut shares = LoadShares::default();
        assert_eq!([(); 3].map(|()| ask(&mut shares, "a", 0)), [0, 0, 0]);
        assert!(shares.last.is_empty());
    }
}
