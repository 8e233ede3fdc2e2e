//! The order in which ready requests would be admitted.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Class;

/// A look at the ready requests in the order in which they would be admitted, each counted as if it were. So an account
/// whose requests cannot be admitted yet keeps its turn and does not fill the view.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    id: u64,
    next_resumed: u64,
    position: (u128, u32),
    /// Lines come to: counter, next request, line.
    opened: BinaryHeap<Reverse<(u128, u64, u32)>>,
}

impl Walk {
    /// Starts anew.
    pub fn rewind(&mut self) {
        self.id += 1;
        self.next_resumed = 0;
        self.position = (0, 0);
        self.opened.clear();
    }

    /// The next request.
    pub fn next(&mut self, class: &mut Class) -> Option<u32> {
        if let Some((&seq, &place)) = class.resumed.range(self.next_resumed..).next() {
            self.next_resumed = seq + 1;
            return Some(place);
        }
        loop {
            self.open_lines(class);
            let Reverse((counter, from, index)) = self.opened.pop()?;
            let mut requests = class.lines[index as usize].ready.range(from..);
            let Some((_, &(place, cost))) = requests.next() else { continue };
            if let Some((next, _)) = requests.next() {
                self.opened.push(Reverse((counter + u128::from(cost), *next, index)));
            }
            return Some(place);
        }
    }

    /// Comes to the lines that may have the next request.
    fn open_lines(&mut self, class: &mut Class) {
        while let Some((key, index)) = class.active.range(self.position..).next().copied() {
            if self.opened.peek().is_some_and(|Reverse((counter, ..))| *counter < key) {
                return;
            }
            let line = &mut class.lines[index as usize];
            if line.counter != key {
                class.list_anew(key, index);
                continue;
            }
            self.position = (key, index + 1);
            if std::mem::replace(&mut line.walk, self.id) != self.id {
                let first = line.ready.first_key_value().map_or(0, |(seq, _)| *seq);
                self.opened.push(Reverse((key, first, index)));
            }
        }
    }
}
