//! The page pool: the single owner of a tier's pages.

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Owner {
    /// Nothing.
    Free,
    /// KV cache of one request, or of several that share a prefix.
    Kv,
    /// A slice of an adapter's image.
    Adapter,
}

/// Equal pages of one tier, each free or owned, with a reference count.
///
/// Being out of pages is a return value. Allocation is last in, first out: what was just freed is what caches still hold.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    owners: Vec<Owner>,
    references: Vec<u32>,
    /// The last step launched when the page was freed: copies may overwrite it only behind that step.
    freed_step: Vec<u32>,
    counts: [u32; 3],
}

impl PagePool {
    /// A pool of `num_pages` free pages.
    pub fn new(num_pages: u32) -> Self {
        let n = num_pages as usize;
        Self {
            free: (0..num_pages).rev().collect(),
            owners: vec![Owner::Free; n],
            references: vec![0; n],
            freed_step: vec![0; n],
            counts: [num_pages, 0, 0],
        }
    }

    /// All pages.
    pub fn num_pages(&self) -> u32 {
        self.owners.len() as u32
    }

    /// Free pages.
    #[inline]
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Pages of one kind.
    pub fn num_owned(&self, owner: Owner) -> u32 {
        self.counts[owner as usize]
    }

    /// One page with one reference, or `None` if none is free.
    #[inline]
    pub fn allocate(&mut self, owner: Owner) -> Option<u32> {
        debug_assert!(owner != Owner::Free, "a page cannot be allocated to nobody");
        let page = self.free.pop()?;
        let i = page as usize;
        debug_assert!(self.owners[i] == Owner::Free && self.references[i] == 0, "a free page has no owner");
        self.owners[i] = owner;
        self.references[i] = 1;
        self.counts[Owner::Free as usize] -= 1;
        self.counts[owner as usize] += 1;
        Some(page)
    }

    /// Appends `count` pages to `pages`, or none of them if fewer are free.
    pub fn allocate_many(&mut self, owner: Owner, count: u32, pages: &mut Vec<u32>) -> bool {
        if self.num_free() < count {
            return false;
        }
        pages.extend((0..count).map_while(|_| self.allocate(owner)));
        true
    }

    /// One more owner for a page that is in use.
    pub fn share(&mut self, page: u32) {
        assert!(self.references[page as usize] > 0, "a shared page is in use");
        self.references[page as usize] += 1;
    }

    /// One owner less; the last one makes the page free. `step`: the last step launched, which may still name the page.
    #[inline]
    pub fn free(&mut self, page: u32, step: u32) {
        let i = page as usize;
        assert!(self.references[i] > 0, "a page is freed once for each owner");
        self.references[i] -= 1;
        if self.references[i] == 0 {
            self.counts[self.owners[i] as usize] -= 1;
            self.counts[Owner::Free as usize] += 1;
            self.owners[i] = Owner::Free;
            self.freed_step[i] = step;
            self.free.push(page);
        }
    }

    /// The last step launched when the page was last freed; 0: never, or all steps of then have ended.
    #[inline]
    pub fn freed_step(&self, page: u32) -> u32 {
        self.freed_step[page as usize]
    }

    /// All launched steps have ended, and their numbers begin again: no page was freed since.
    pub fn forget_steps(&mut self) {
        self.freed_step.fill(0);
    }

    /// What the page holds.
    pub fn owner(&self, page: u32) -> Owner {
        self.owners[page as usize]
    }

    /// Owners of the page.
    pub fn references(&self, page: u32) -> u32 {
        self.references[page as usize]
    }

    /// **Invariant:** free + KV + adapter pages = all pages; a page is free exactly if nothing refers to it.
    pub fn check(&self) {
        let mut counts = [0u32; 3];
        for (owner, references) in self.owners.iter().zip(&self.references) {
            counts[*owner as usize] += 1;
            assert_eq!(*owner == Owner::Free, *references == 0, "a page is free exactly if nothing refers to it");
        }
        assert_eq!(counts, self.counts, "the counts of pages by owner are right");
        assert_eq!(self.free.len(), counts[Owner::Free as usize] as usize, "the free list holds the free pages");
        let mut listed = vec![false; self.owners.len()];
        for &page in &self.free {
            assert!(self.owners[page as usize] == Owner::Free, "a listed page is free");
            assert!(!std::mem::replace(&mut listed[page as usize], true), "a page is listed once");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_free_again_after_its_last_owner() {
        let mut pool = PagePool::new(2);
        let page = pool.allocate(Owner::Kv).unwrap();
        pool.share(page);
        pool.free(page, 3);
        assert_eq!((pool.num_free(), pool.owner(page)), (1, Owner::Kv));
        pool.free(page, 4);
        assert_eq!((pool.num_free(), pool.owner(page), pool.freed_step(page)), (2, Owner::Free, 4));
        pool.forget_steps();
        assert_eq!(pool.freed_step(page), 0);
        pool.check();
    }

    #[test]
    fn many_pages_are_given_whole_or_not_at_all() {
        let mut pool = PagePool::new(3);
        let mut pages = Vec::new();
        assert!(!pool.allocate_many(Owner::Adapter, 4, &mut pages));
        assert!(pages.is_empty() && pool.num_free() == 3);
        assert!(pool.allocate_many(Owner::Adapter, 3, &mut pages));
        assert_eq!((pages.len(), pool.allocate(Owner::Kv)), (3, None));
        pool.check();
    }

    #[test]
    #[should_panic(expected = "freed once for each owner")]
    fn freeing_twice_is_a_bug() {
        let mut pool = PagePool::new(1);
        let page = pool.allocate(Owner::Kv).unwrap();
        pool.free(page, 0);
        pool.free(page, 0);
    }
}
