//! The waiting queue: by priority, then in the queue's order, except that a request whose adapter is not here yet blocks nobody.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::account::{Account, Holder};
use crate::config::QueueOrder;
use crate::fair::{Class, Walk};

/// Costs are counted in this part of a prompt token at weight 1, so that weights divide finely enough.
const UNITS: f64 = (1u64 << 20) as f64;
/// A generated token costs as much as this many prompt tokens, as in the paper: it takes a pass over all weights and its
/// whole context, where a prompt's tokens share one.
const OUTPUT_COST: u64 = 2;

/// In which order adapters are loaded for requests, and kept in the host tier: by priority, then so that accounts share the
/// loads, then by arrival. Fixed when the request arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn {
    priority: Reverse<i32>,
    tag: u128,
    /// Order of arrival; unique for ever.
    pub seq: u64,
}

impl Turn {
    /// Behind every request's.
    pub const LAST: Self = Self { priority: Reverse(i32::MIN), tag: u128::MAX, seq: u64::MAX };
}

/// A request's place in the queue's order, which it keeps when it is preempted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    pub turn: Turn,
    line: u32,
    /// What a prompt token costs; 0: nobody counts.
    token_cost: u64,
    /// What the prompt costs.
    prompt_cost: u64,
    was_admitted: bool,
}

impl Ticket {
    pub fn priority(&self) -> i32 {
        self.turn.priority.0
    }
}

/// Requests that wait. One is *ready* if it may be admitted as far as its adapter is concerned. Every operation costs the
/// logarithm of the number that waits; none looks at all of them.
#[derive(Debug)]
pub(crate) struct Queue {
    order: QueueOrder,
    /// Of the priorities that unfinished requests have.
    classes: BTreeMap<Reverse<i32>, Class>,
    len: usize,
    num_ready: usize,
    walk: Walk,
    /// The class in which the walk is.
    walk_priority: Reverse<i32>,
}

impl Queue {
    pub fn new(order: QueueOrder) -> Self {
        let (classes, len, num_ready, walk) = Default::default();
        Self { order, classes, len, num_ready, walk, walk_priority: Reverse(i32::MAX) }
    }

    /// Requests that wait, ready or not.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn num_ready(&self) -> usize {
        self.num_ready
    }

    /// A request arrives; it waits once it is pushed.
    pub fn enter(&mut self, account: &Account, adapter: Option<&Arc<str>>, seq: u64, prompt_len: u32) -> Ticket {
        let (holder, token_cost) = match self.order {
            QueueOrder::Fcfs => (Holder::Everyone, 0),
            QueueOrder::Fair => (Holder::of(account, adapter), (UNITS / account.weight) as u64),
        };
        let prompt_cost = token_cost * u64::from(prompt_len);
        let priority = Reverse(account.priority);
        let class = self.classes.entry(priority).or_default();
        let line = class.enter(holder);
        let turn = Turn { priority, tag: class.loads.time(), seq };
        Ticket { turn, line, token_cost, prompt_cost, was_admitted: false }
    }

    /// The request that arrives needs a load from disk; `first`: the turn of the first who waits for the same one. Whoever
    /// is before all others pays for the load, of which each costs as much as a token.
    pub fn ask_load(&mut self, ticket: &mut Ticket, first: Option<Turn>) {
        let turn = ticket.turn;
        let pays = |tag| first.is_none_or(|first| Turn { tag, ..turn } < first);
        ticket.turn.tag = self.class(ticket).ask_load(ticket.line, ticket.token_cost, pays);
    }

    /// A load was ordered in this turn.
    pub fn load_ordered(&mut self, turn: Turn) {
        if let Some(class) = self.classes.get_mut(&turn.priority) {
            class.loads.ordered(turn.tag);
        }
    }

    /// Nobody waits for a load to be ordered.
    pub fn all_loads_ordered(&mut self) {
        self.classes.values_mut().for_each(|class| class.loads.settle());
    }

    /// A request ends, and does not wait any more.
    pub fn leave(&mut self, ticket: &Ticket) {
        if self.class(ticket).leave(ticket.line) {
            // Nobody is left to whom anything would be owed.
            self.classes.remove(&ticket.turn.priority);
        }
    }

    pub fn push(&mut self, ticket: &Ticket, place: u32, is_ready: bool) {
        self.len += 1;
        if is_ready {
            self.set_ready(ticket, place, true);
        }
    }

    pub fn remove(&mut self, ticket: &Ticket) {
        self.len -= 1;
        self.num_ready -= usize::from(self.remove_ready(ticket));
    }

    /// Its adapter is here, or no longer.
    pub fn set_ready(&mut self, ticket: &Ticket, place: u32, is_ready: bool) {
        if !is_ready {
            self.num_ready -= usize::from(self.remove_ready(ticket));
            return;
        }
        self.num_ready += 1;
        let (is_resumed, seq) = (self.is_resumed(ticket), ticket.turn.seq);
        let class = self.class(ticket);
        if is_resumed {
            class.insert_resumed(seq, place);
        } else {
            class.insert(ticket.line, seq, place, ticket.prompt_cost);
        }
    }

    fn remove_ready(&mut self, ticket: &Ticket) -> bool {
        let (is_resumed, seq) = (self.is_resumed(ticket), ticket.turn.seq);
        let class = self.class(ticket);
        if is_resumed { class.remove_resumed(seq) } else { class.remove(ticket.line, seq) }
    }

    /// By order of arrival, a preempted request's place says enough.
    fn is_resumed(&self, ticket: &Ticket) -> bool {
        ticket.was_admitted && self.order == QueueOrder::Fair
    }

    /// A request starts to run. What it costs to compute a preempted one again is not its account's fault.
    pub fn admitted(&mut self, ticket: &mut Ticket) {
        if !std::mem::replace(&mut ticket.was_admitted, true) {
            self.class(ticket).charge(ticket.line, ticket.prompt_cost);
        }
    }

    /// A token was generated.
    #[inline]
    pub fn generated(&mut self, ticket: &Ticket) {
        if ticket.token_cost > 0 {
            self.class(ticket).charge(ticket.line, OUTPUT_COST * ticket.token_cost);
        }
    }

    fn class(&mut self, ticket: &Ticket) -> &mut Class {
        match self.classes.get_mut(&ticket.turn.priority) {
            Some(class) => class,
            None => unreachable!("an unfinished request's priority has its class"),
        }
    }

    /// The next [`next`](Self::next) is the first ready request.
    pub fn rewind(&mut self) {
        self.walk.rewind();
        self.walk_priority = Reverse(i32::MAX);
    }

    /// The next ready request, in the order in which they are admitted.
    pub fn next(&mut self) -> Option<u32> {
        loop {
            let (priority, class) = self.classes.range_mut(self.walk_priority..).next()?;
            if let Some(place) = self.walk.next(class) {
                self.walk_priority = *priority;
                return Some(place);
            }
            self.walk_priority = Reverse(priority.0 - 1);
            self.walk.rewind();
        }
    }

    /// Ready requests, in no order.
    pub fn ready(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.classes.values().flat_map(Class::ready)
    }

    /// Asserts what must hold; `unfinished`: requests, waiting or not.
    pub fn check(&self, unfinished: u32) {
        assert_eq!(self.ready().count(), self.num_ready, "ready requests are counted");
        assert!(self.classes.values().all(|class| class.unfinished() > 0), "a class goes away with its last request");
        let counted: u32 = self.classes.values().map(Class::unfinished).sum();
        assert_eq!(counted, unfinished, "every unfinished request is in a class");
        self.classes.values().for_each(Class::check);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(tenant: &str, weight: f64, priority: i32) -> Account {
        Account { tenant: Some(tenant.into()), weight, priority }
    }

    /// Submits requests of 10 prompt tokens, ready at once; their places count up.
    fn submit(queue: &mut Queue, accounts: &[Account]) -> Vec<Ticket> {
        let submit = |(i, account): (usize, &Account)| {
            let ticket = queue.enter(account, None, i as u64, 10);
            queue.push(&ticket, i as u32, true);
            ticket
        };
        accounts.iter().enumerate().map(submit).collect()
    }

    fn order(queue: &mut Queue) -> Vec<u32> {
        queue.rewind();
        std::iter::from_fn(|| queue.next()).collect()
    }

    #[test]
    fn priority_goes_before_either_order() {
        let accounts = [account("a", 1.0, 0), account("a", 1.0, -1), account("b", 1.0, 2), account("a", 1.0, 2)];
        for queue_order in [QueueOrder::Fcfs, QueueOrder::Fair] {
            let mut queue = Queue::new(queue_order);
            let tickets = submit(&mut queue, &accounts);
            assert_eq!(order(&mut queue), [2, 3, 0, 1]);
            queue.check(4);
            queue.remove(&tickets[3]);
            queue.set_ready(&tickets[2], 2, false);
            assert_eq!((order(&mut queue), queue.len(), queue.num_ready()), (vec![0, 1], 3, 2));
        }
    }

    #[test]
    fn without_a_fair_queue_accounts_do_not_matter() {
        let mut queue = Queue::new(QueueOrder::Fcfs);
        let accounts = [account("a", 1.0, 0), account("a", 0.5, 0), account("b", 100.0, 0), account("c", 1.0, 0)];
        let tickets = submit(&mut queue, &accounts);
        queue.generated(&tickets[0]);
        assert_eq!(order(&mut queue), [0, 1, 2, 3]);
        assert!(tickets.iter().is_sorted_by_key(|ticket| ticket.turn));
    }

    #[test]
    fn weights_divide_what_is_spent() {
        let mut queue = Queue::new(QueueOrder::Fair);
        let (light, heavy) = (account("light", 1.0, 0), account("heavy", 3.0, 0));
        let accounts: Vec<Account> = (0..40).map(|i| if i % 2 == 0 { light.clone() } else { heavy.clone() }).collect();
        submit(&mut queue, &accounts);
        let first: Vec<u32> = order(&mut queue).into_iter().take(24).collect();
        assert_eq!(first.iter().filter(|place| **place % 2 == 1).count(), 18);
    }

    #[test]
    fn a_generated_token_costs_as_much_as_two_of_a_prompt() {
        let mut queue = Queue::new(QueueOrder::Fair);
        let accounts = ["a", "b", "a", "b"].map(|tenant| account(tenant, 1.0, 0));
        let mut tickets = submit(&mut queue, &accounts);
        for (ticket, num_tokens) in tickets.iter_mut().zip([4, 0]) {
            queue.remove(ticket);
            queue.admitted(ticket);
            (0..num_tokens).for_each(|_| queue.generated(ticket));
        }
        assert_eq!(order(&mut queue), [3, 2]);
        for _ in 0..5 {
            queue.generated(&tickets[1]);
        }
        assert_eq!(order(&mut queue), [2, 3]);
    }

    #[test]
    fn a_prompt_is_paid_for_once_however_often_it_is_computed() {
        let mut queue = Queue::new(QueueOrder::Fair);
        let mut tickets = submit(&mut queue, &["a", "b", "a", "b"].map(|tenant| account(tenant, 1.0, 0)));
        for ticket in &mut tickets[..2] {
            queue.remove(ticket);
            queue.admitted(ticket);
        }
        queue.generated(&tickets[1]);
        queue.push(&tickets[0], 0, true);
        assert_eq!(order(&mut queue), [0, 2, 3], "it goes before everybody");
        queue.remove(&tickets[0]);
        queue.admitted(&mut tickets[0]);
        assert_eq!(order(&mut queue), [2, 3]);
        queue.check(4);
    }

    #[test]
    fn adapters_are_loaded_for_light_accounts_before_a_long_queue() {
        let mut queue = Queue::new(QueueOrder::Fair);
        let mut accounts = vec![account("heavy", 1.0, 0); 100];
        accounts.push(account("light", 1.0, 0));
        accounts.push(account("urgent", 1.0, 1));
        let mut tickets = submit(&mut queue, &accounts);
        tickets.iter_mut().for_each(|ticket| queue.ask_load(ticket, None));
        let mut by_turn: Vec<usize> = (0..102).collect();
        by_turn.sort_unstable_by_key(|i| tickets[*i].turn);
        assert_eq!(by_turn[..4], [101, 0, 100, 1]);
    }

    #[test]
    fn whoever_waits_for_anothers_load_does_not_pay_for_it() {
        let mut queue = Queue::new(QueueOrder::Fair);
        let mut tickets = submit(&mut queue, &["a", "a", "b", "a"].map(|tenant| account(tenant, 1.0, 0)));
        queue.ask_load(&mut tickets[0], None);
        queue.ask_load(&mut tickets[1], None);
        // The same load as the second: it is before it, and pays. The last comes behind that, for nothing.
        let first = tickets[1].turn;
        queue.ask_load(&mut tickets[2], Some(first));
        let first = tickets[2].turn;
        queue.ask_load(&mut tickets[3], Some(first));
        let tags: Vec<u128> = tickets.iter().map(|ticket| ticket.turn.tag / UNITS as u128).collect();
        assert_eq!(tags, [1, 2, 1, 3]);
        let mut more = submit(&mut queue, &["a", "b"].map(|tenant| account(tenant, 1.0, 0)));
        more.iter_mut().for_each(|ticket| queue.ask_load(ticket, None));
        assert_eq!(more.iter().map(|ticket| ticket.turn.tag / UNITS as u128).collect::<Vec<_>>(), [3, 2]);
    }
}
