//! Loads from disk, shared by accounts: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM '96).

use std::collections::{BTreeSet, HashMap};

use crate::fair::Holder;

/// Where the accounts of one priority stand in the order of loads, apart from their tokens: whose queue is long must not
/// hold up the first load of another, nor wait for ever behind those whose queues are short.
///
/// A load's tag is where its account's last one ended, or `time`: the tag of the last load that was ordered.
#[derive(Debug, Default)]
pub(crate) struct LoadShares {
    time: u128,
    /// Where the next load stands, of accounts for which that is later than `time`; also by it.
    next: HashMap<Holder, u128>,
    by_next: BTreeSet<(u128, Holder)>,
}

impl LoadShares {
    pub fn time(&self) -> u128 {
        self.time
    }

    /// Where the account's next load stands.
    pub fn tag(&self, holder: &Holder) -> u128 {
        self.next.get(holder).map_or(self.time, |next| *next)
    }

    /// The account asked for its next load.
    pub fn charge(&mut self, holder: &Holder, cost: u64) {
        let next = self.tag(holder) + u128::from(cost);
        if next > self.time {
            if let Some(old) = self.next.insert(holder.clone(), next) {
                self.by_next.remove(&(old, holder.clone()));
            }
            self.by_next.insert((next, holder.clone()));
        }
    }

    /// The load with this tag was ordered.
    pub fn ordered(&mut self, tag: u128) {
        self.time = self.time.max(tag);
        while self.by_next.first().is_some_and(|(next, _)| *next <= self.time) {
            if let Some((_, holder)) = self.by_next.pop_first() {
                self.next.remove(&holder);
            }
        }
    }

    /// Nobody waits for a load: nobody is behind or ahead.
    pub fn settle(&mut self) {
        if let Some(last) = self.by_next.last().map(|(next, _)| *next) {
            self.ordered(last);
        }
    }

    /// Asserts what must hold.
    pub fn check(&self) {
        let listed = self.by_next.iter().all(|(next, holder)| self.next.get(holder) == Some(next) && *next > self.time);
        assert!(listed && self.by_next.len() == self.next.len(), "who is ahead is listed once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(shares: &mut LoadShares, tenant: &str, cost: u64) -> u128 {
        let holder = Holder::Tenant(tenant.into());
        let tag = shares.tag(&holder);
        shares.charge(&holder, cost);
        shares.check();
        tag
    }

    #[test]
    fn a_load_stands_where_its_accounts_last_one_ended_or_at_the_last_one_ordered() {
        let mut shares = LoadShares::default();
        assert_eq!([(); 3].map(|()| ask(&mut shares, "a", 10)), [0, 10, 20]);
        assert_eq!([(); 3].map(|()| ask(&mut shares, "b", 5)), [0, 5, 10]);
        shares.ordered(20);
        shares.ordered(10);
        assert_eq!(["b", "c", "a"].map(|tenant| ask(&mut shares, tenant, 1)), [20, 20, 30]);
    }

    #[test]
    fn accounts_that_come_and_go_leave_nothing_behind() {
        let mut shares = LoadShares::default();
        for i in 0..1_000 {
            let tag = ask(&mut shares, &format!("tenant {i}"), 10);
            shares.ordered(tag);
            assert_eq!(shares.next.len(), 1);
            shares.settle();
            assert!(shares.next.is_empty() && shares.time() == tag + 10);
        }
        // Somebody always waits: those who were ahead are forgotten when it is their turn again.
        for i in 0..1_000 {
            ask(&mut shares, "always", 10);
            let tag = ask(&mut shares, &format!("tenant {}", i % 500), 10);
            shares.ordered(tag);
        }
        assert!(shares.next.len() <= 501, "{}", shares.next.len());
    }

    #[test]
    fn without_a_cost_everybody_stands_at_the_beginning() {
        let mut shares = LoadShares::default();
        assert_eq!([(); 3].map(|()| ask(&mut shares, "a", 0)), [0, 0, 0]);
        assert!(shares.next.is_empty());
    }
}
