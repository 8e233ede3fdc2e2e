//! An order of use over small integers, least recent first: a linked list inside two arrays, every operation in constant time.

const NONE: u32 = u32::MAX;

/// Members in order of their last [`touch`](Lru::touch).
#[derive(Debug)]
pub(crate) struct Lru {
    next: Vec<u32>,
    previous: Vec<u32>,
    is_member: Vec<bool>,
    first: u32,
    last: u32,
    len: usize,
}

impl Lru {
    pub fn new() -> Self {
        Self { next: Vec::new(), previous: Vec::new(), is_member: Vec::new(), first: NONE, last: NONE, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn contains(&self, item: u32) -> bool {
        self.is_member.get(item as usize).copied().unwrap_or(false)
    }

    /// Makes `item` the most recent member.
    pub fn touch(&mut self, item: u32) {
        self.remove(item);
        let i = item as usize;
        if i >= self.next.len() {
            self.next.resize(i + 1, NONE);
            self.previous.resize(i + 1, NONE);
            self.is_member.resize(i + 1, false);
        }
        self.is_member[i] = true;
        self.previous[i] = self.last;
        self.next[i] = NONE;
        match self.last {
            NONE => self.first = item,
            last => self.next[last as usize] = item,
        }
        self.last = item;
        self.len += 1;
    }

    /// Does nothing if `item` is not a member.
    pub fn remove(&mut self, item: u32) {
        if !self.contains(item) {
            return;
        }
        let i = item as usize;
        let (previous, next) = (self.previous[i], self.next[i]);
        match previous {
            NONE => self.first = next,
            previous => self.next[previous as usize] = next,
        }
        match next {
            NONE => self.last = previous,
            next => self.previous[next as usize] = previous,
        }
        self.is_member[i] = false;
        self.len -= 1;
    }

    /// Members from the least to the most recently used.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(Some(self.first).filter(|item| *item != NONE), |item| {
            Some(self.next[*item as usize]).filter(|item| *item != NONE)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_the_last_touch() {
        let mut lru = Lru::new();
        for item in [3, 1, 4, 1, 5] {
            lru.touch(item);
        }
        assert_eq!(lru.iter().collect::<Vec<_>>(), [3, 4, 1, 5]);
        lru.remove(4);
        lru.remove(9);
        lru.touch(3);
        assert_eq!(lru.iter().collect::<Vec<_>>(), [1, 5, 3]);
        assert_eq!((lru.len(), lru.contains(4), lru.contains(5)), (3, false, true));
    }

    #[test]
    fn random_operations_match_a_plain_vector() {
        let (mut lru, mut model) = (Lru::new(), Vec::<u32>::new());
        for i in 0..10_000_000u32 {
            let item = (crate::uniform(7, i) * 24.0) as u32;
            model.retain(|other| *other != item);
            if crate::uniform(8, i) < 0.6 {
                lru.touch(item);
                model.push(item);
            } else {
                lru.remove(item);
            }
            assert!(lru.iter().eq(model.iter().copied()), "after operation {i}");
            assert_eq!((lru.len(), lru.contains(item)), (model.len(), model.last() == Some(&item)));
        }
    }
}
