//! Fair queueing within one priority, by virtual token counters ("Fairness in Serving Large Language Models", OSDI '24).

mod walk;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::account::Holder;
use crate::load_shares::LoadShares;
pub(crate) use walk::Walk;

/// The requests of one account.
#[derive(Debug)]
struct Line {
    holder: Holder,
    /// What was spent on the account's requests, divided by their weights.
    counter: u128,
    /// Requests that may be admitted, by order of arrival: place, and what admission costs.
    ready: BTreeMap<u64, (u32, u64)>,
    /// The key under which `active` has the line while it has ready requests: the counter of some time ago.
    listed: u128,
    unfinished: u32,
    /// The last walk that came by.
    walk: u64,
}

/// All requests of one priority.
///
/// An account's counter grows with what is spent on it, and whoever has the least counter is next. So the counters of accounts
/// that always have ready requests differ by no more than one prompt and what the running requests may still generate. An
/// account that comes back is lifted to the least of theirs: having been away saves up nothing. What it was served ahead of
/// them stays counted while it is away.
#[derive(Debug, Default)]
pub(crate) struct Class {
    lines: Vec<Line>,
    vacant: Vec<u32>,
    by_holder: HashMap<Holder, u32>,
    /// Lines with ready requests, by counter; a key that is too low is put right when it comes to the front.
    active: BTreeSet<(u128, u32)>,
    /// Lines without requests whose counters are above the floor. All others without requests are forgotten.
    ahead: BTreeSet<(u128, u32)>,
    floor: u128,
    /// The line that was the last to be active.
    last: Option<u32>,
    /// Requests that were preempted: already paid for, they go before all others.
    resumed: BTreeMap<u64, u32>,
    unfinished: u32,
    pub loads: LoadShares,
}

impl Class {
    /// A request arrives. Returns its line.
    pub fn enter(&mut self, holder: Holder) -> u32 {
        let index = self.find_or_insert(holder);
        let line = &mut self.lines[index as usize];
        if line.unfinished == 0 {
            self.ahead.remove(&(line.counter, index));
        }
        line.unfinished += 1;
        self.unfinished += 1;
        index
    }

    fn find_or_insert(&mut self, holder: Holder) -> u32 {
        if let Some(index) = self.by_holder.get(&holder) {
            return *index;
        }
        let (counter, ready, listed, unfinished, walk) = Default::default();
        let line = Line { holder: holder.clone(), counter, ready, listed, unfinished, walk };
        let index = self.vacant.pop().unwrap_or(self.lines.len() as u32);
        match self.lines.get_mut(index as usize) {
            Some(vacant) => *vacant = line,
            None => self.lines.push(line),
        }
        self.by_holder.insert(holder, index);
        index
    }

    /// The account needs a load from disk. Returns the load's tag, which counts if it `pays` for it.
    pub fn ask_load(&mut self, index: u32, cost: u64, pays: impl FnOnce(u128) -> bool) -> u128 {
        let holder = &self.lines[index as usize].holder;
        let tag = self.loads.tag(holder, cost);
        if pays(tag) {
            self.loads.ask(holder, tag);
        }
        tag
    }

    /// A request has ended, and stands nowhere. Whether it was the last of all.
    pub fn leave(&mut self, index: u32) -> bool {
        let line = &mut self.lines[index as usize];
        line.unfinished -= 1;
        self.unfinished -= 1;
        if line.unfinished == 0 {
            self.ahead.insert((line.counter, index));
            self.floor();
        }
        self.unfinished == 0
    }

    #[inline]
    pub fn charge(&mut self, index: u32, cost: u64) {
        self.lines[index as usize].counter += u128::from(cost);
    }

    pub fn insert(&mut self, index: u32, seq: u64, place: u32, cost: u64) {
        if self.lines[index as usize].ready.is_empty() {
            let floor = self.floor();
            let line = &mut self.lines[index as usize];
            line.counter = line.counter.max(floor);
            line.listed = line.counter;
            self.active.insert((line.listed, index));
        }
        self.lines[index as usize].ready.insert(seq, (place, cost));
    }

    pub fn remove(&mut self, index: u32, seq: u64) -> bool {
        let line = &mut self.lines[index as usize];
        let was_ready = line.ready.remove(&seq).is_some();
        if was_ready && line.ready.is_empty() {
            self.active.remove(&(line.listed, index));
            self.last = Some(index);
        }
        was_ready
    }

    pub fn insert_resumed(&mut self, seq: u64, place: u32) {
        self.resumed.insert(seq, place);
    }

    pub fn remove_resumed(&mut self, seq: u64) -> bool {
        self.resumed.remove(&seq).is_some()
    }

    /// The least counter that an account may begin with: the least of the active ones, or that of the last.
    fn floor(&mut self) -> u128 {
        let least = loop {
            match self.active.first().copied() {
                None => break self.last.map_or(0, |index| self.lines[index as usize].counter),
                Some((key, index)) if key == self.lines[index as usize].counter => break key,
                Some((key, index)) => self.list_anew(key, index),
            }
        };
        self.floor = self.floor.max(least);
        while let Some((_, index)) = self.ahead.first().copied().filter(|(counter, _)| *counter <= self.floor) {
            self.ahead.pop_first();
            self.by_holder.remove(&self.lines[index as usize].holder);
            self.vacant.push(index);
            self.last = self.last.filter(|last| *last != index);
        }
        self.floor
    }

    fn list_anew(&mut self, key: u128, index: u32) {
        let line = &mut self.lines[index as usize];
        line.listed = line.counter;
        self.active.remove(&(key, index));
        self.active.insert((line.listed, index));
    }

    /// Ready requests, in no order.
    pub fn ready(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        let lines = self.lines.iter().flat_map(|line| line.ready.iter().map(|(seq, (place, _))| (*seq, *place)));
        lines.chain(self.resumed.iter().map(|(seq, place)| (*seq, *place)))
    }

    pub fn unfinished(&self) -> u32 {
        self.unfinished
    }

    /// Asserts what must hold.
    pub fn check(&self) {
        let lines = || (0..).zip(&self.lines).filter(|(index, _)| !self.vacant.contains(index));
        let active = lines().filter(|(_, line)| !line.ready.is_empty()).map(|(index, line)| (line.listed, index));
        assert_eq!(active.collect::<BTreeSet<_>>(), self.active, "a line is active exactly if it has ready requests");
        let ahead = lines().filter(|(_, line)| line.unfinished == 0).map(|(index, line)| (line.counter, index));
        assert_eq!(ahead.collect::<BTreeSet<_>>(), self.ahead, "a line without requests is forgotten, or ahead");
        self.loads.check();
        assert_eq!(lines().map(|(_, line)| line.unfinished).sum::<u32>(), self.unfinished, "every request has a line");
        assert_eq!(lines().count(), self.by_holder.len(), "a line has one holder");
        for (index, line) in lines() {
            assert_eq!(self.by_holder.get(&line.holder), Some(&index), "a holder has one line");
            assert!(line.listed <= line.counter || line.ready.is_empty(), "counters only grow");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A class whose requests are told apart by their place, which is also the order of their arrival.
    #[derive(Default)]
    struct Scene {
        class: Class,
        walk: Walk,
        next_place: u32,
    }

    impl Scene {
        fn submit(&mut self, tenant: &str, cost: u64) -> (u32, u32) {
            let line = self.class.enter(Holder::Tenant(tenant.into()));
            let place = self.next_place;
            self.next_place += 1;
            self.class.insert(line, place.into(), place, cost);
            self.class.check();
            (line, place)
        }

        fn first(&mut self) -> Option<u32> {
            self.walk.rewind();
            self.walk.next(&mut self.class)
        }

        fn order(&mut self) -> Vec<u32> {
            self.walk.rewind();
            std::iter::from_fn(|| self.walk.next(&mut self.class)).collect()
        }

        /// It is admitted, and ends when it is told to leave.
        fn admit(&mut self, (line, place): (u32, u32), cost: u64) {
            assert!(self.class.remove(line, place.into()));
            self.class.charge(line, cost);
            self.class.check();
        }

        fn leave(&mut self, line: u32) {
            self.class.leave(line);
            self.class.check();
        }

        fn counter(&self, line: u32) -> u128 {
            self.class.lines[line as usize].counter
        }
    }

    #[test]
    fn the_account_that_was_given_least_goes_first() {
        let mut scene = Scene::default();
        let a = scene.submit("a", 10);
        let others = [scene.submit("a", 10), scene.submit("a", 10), scene.submit("b", 10), scene.submit("c", 4)];
        assert_eq!(scene.order(), [0, 3, 4, 1, 2], "as if each were admitted in turn");
        scene.admit(a, 10);
        assert_eq!(scene.order(), [3, 4, 1, 2]);
        scene.class.charge(others[2].0, 30);
        assert_eq!(scene.order(), [4, 1, 2, 3], "what its running requests generate counts");
    }

    #[test]
    fn having_been_away_saves_up_nothing() {
        let mut scene = Scene::default();
        let old = scene.submit("old", 1);
        scene.admit(old, 1);
        let busy = [scene.submit("busy", 100), scene.submit("busy", 100), scene.submit("busy", 100)];
        scene.admit(busy[0], 100);
        scene.admit(busy[1], 100);
        let (returns, comes) = (scene.submit("old", 1), scene.submit("new", 1));
        let counters = [busy[0].0, returns.0, comes.0].map(|line| scene.counter(line));
        assert_eq!(counters, [201, 201, 201], "they begin where the least of those who wait is");
    }

    #[test]
    fn when_nobody_waits_the_last_one_who_did_sets_the_mark() {
        let mut scene = Scene::default();
        let busy = scene.submit("busy", 10);
        scene.admit(busy, 10);
        scene.class.charge(busy.0, 500);
        let new = scene.submit("new", 1);
        assert_eq!(scene.counter(new.0), 510);
    }

    #[test]
    fn what_an_account_was_served_ahead_is_not_forgotten_while_it_is_away() {
        let mut scene = Scene::default();
        let (ahead, waits) = (scene.submit("ahead", 1), scene.submit("waits", 50));
        scene.admit(ahead, 1_000);
        scene.leave(ahead.0);
        let again = scene.submit("ahead", 1);
        assert_eq!((scene.counter(again.0), scene.first()), (1_000, Some(waits.1)));
        scene.admit(again, 1);
        scene.leave(again.0);
        let more = scene.submit("waits", 50);
        scene.admit(waits, 1_200);
        assert_eq!((scene.submit("waits", 1).0, more.0), (waits.0, waits.0));
        scene.submit("new", 1);
        assert!(scene.class.ahead.is_empty(), "it is once the others have caught up");
        let again = scene.submit("ahead", 1);
        assert_eq!(scene.counter(again.0), 1_200);
    }

    #[test]
    fn accounts_that_come_and_go_leave_nothing_behind() {
        let mut scene = Scene::default();
        // Somebody is always there, and somebody always waits.
        scene.submit("always", 1);
        for i in 0..10_000 {
            let waits = scene.submit("always", 10);
            let one = scene.submit(&format!("tenant {i}"), 10);
            scene.admit(one, 10);
            scene.leave(one.0);
            scene.admit(waits, 10);
            scene.leave(waits.0);
        }
        assert!(scene.class.lines.len() < 8, "{} lines", scene.class.lines.len());
        assert_eq!(scene.class.by_holder.len() + scene.class.vacant.len(), scene.class.lines.len());
    }

    #[test]
    fn preempted_requests_go_first_and_cost_nothing() {
        let mut scene = Scene::default();
        let a = scene.submit("a", 10);
        scene.admit(a, 1_000);
        let b = scene.submit("b", 10);
        scene.class.insert_resumed(a.1.into(), a.1);
        assert_eq!(scene.order(), [a.1, b.1]);
        assert!(scene.class.remove_resumed(a.1.into()) && !scene.class.remove_resumed(a.1.into()));
        assert_eq!(scene.order(), [b.1]);
    }

    #[test]
    fn random_operations_match_a_plain_model() {
        // (account, cost, seq) of waiting requests; counters by account, all of which always have a request.
        for seed in 0..200 {
            let mut random = (0..).map(|i| (f64::from(crate::uniform(seed, i)) * f64::from(u16::MAX)) as u64);
            let mut next = |below: u64| random.next().unwrap_or(0) % below;
            let mut scene = Scene::default();
            let names = ["a", "b", "c", "d"];
            let mut waiting: Vec<(usize, u64, (u32, u32))> = Vec::new();
            let mut counters = [0u128; 4];
            for (account, name) in names.iter().enumerate() {
                waiting.push((account, 7, scene.submit(name, 7)));
            }
            for _ in 0..300 {
                let account = next(4) as usize;
                match next(3) {
                    0 => {
                        let cost = next(20) + 1;
                        waiting.push((account, cost, scene.submit(names[account], cost)));
                    }
                    1 => {
                        let spent = next(9);
                        let line = scene.class.by_holder[&Holder::Tenant(names[account].into())];
                        scene.class.charge(line, spent);
                        counters[account] += u128::from(spent);
                    }
                    _ => {
                        let mut model = (counters, waiting.clone(), Vec::new());
                        while let Some(i) = least(&model.0, &model.1) {
                            let (account, cost, (_, place)) = model.1.remove(i);
                            model.0[account] += u128::from(cost);
                            model.2.push(place);
                        }
                        assert_eq!(scene.order(), model.2, "seed {seed}");
                        let i = least(&counters, &waiting).unwrap_or(0);
                        let (account, cost, request) = waiting[i];
                        let is_only = waiting.iter().filter(|(other, ..)| *other == account).count() == 1;
                        if !is_only {
                            waiting.remove(i);
                            counters[account] += u128::from(cost);
                            scene.admit(request, cost);
                            scene.leave(request.0);
                        }
                    }
                }
            }
        }
    }

    /// The first request of the account with the least counter.
    fn least(counters: &[u128; 4], waiting: &[(usize, u64, (u32, u32))]) -> Option<usize> {
        (0..waiting.len()).min_by_key(|i| (counters[waiting[*i].0], waiting[*i].2.1))
    }
}
