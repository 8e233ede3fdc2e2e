//! Raw host pages, written by several threads at once: the only `unsafe` of this crate.

use std::ptr::NonNull;

/// The host pages of one image, in image order. Whoever owns the memory lends it for the time of packing.
#[derive(Debug)]
pub struct HostPages {
    pages: Vec<NonNull<u8>>,
    page_bytes: usize,
}

// SAFETY: `new` demands memory that any thread may write for as long as the value lives, and that two threads are never
// given the same part; different parts write different bytes (`Layout::span`).
unsafe impl Send for HostPages {}
// SAFETY: as above.
unsafe impl Sync for HostPages {}

impl HostPages {
    /// Wraps the pages that an image is packed into; `pages[i]` is image page `i`.
    ///
    /// # Safety
    ///
    /// From this call until the value is dropped:
    /// * every pointer is to `page_bytes` initialised bytes, valid for reads and writes from any thread;
    /// * no two pages overlap, and nothing else reads or writes them: each page is exclusively the loader's until all
    ///   parts are finished;
    /// * the value is used with one adapter only, and no part of it is packed by two threads at the same time.
    pub unsafe fn new(pages: Vec<NonNull<u8>>, page_bytes: usize) -> HostPages {
        HostPages { pages, page_bytes }
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Bytes of each page.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Lets `fill` write `len` bytes of page `page` from `offset`.
    ///
    /// **Invariant** (kept by the packer): the range lies in the span of the part that the calling thread packs.
    #[inline]
    pub(crate) fn write(&self, page: u32, offset: usize, len: usize, fill: impl FnOnce(&mut [u8])) {
        let page = self.pages[page as usize];
        assert!(offset <= self.page_bytes && len <= self.page_bytes - offset, "a write stays in its page");
        // SAFETY: the range is inside a page that `new` promised to be valid, initialised and exclusively ours. No other
        // reference to its bytes lives: threads write different parts, parts have disjoint spans, and within a thread
        // the reference ends with `fill`, which cannot reach `self`'s pages in safe code but through another `write`,
        // and no caller nests them.
        fill(unsafe { std::slice::from_raw_parts_mut(page.as_ptr().add(offset), len) });
    }
}
