//! The host tier's memory: slabs that somebody else allocated, cut into pages.

use std::ptr::NonNull;

use slora_store::HostPages;

/// Slabs of whole pages. Page numbers count through the slabs in order; what is left of a slab is unused.
#[derive(Debug)]
pub struct HostMemory {
    /// First page number of each slab, and its address.
    slabs: Vec<(u32, NonNull<u8>)>,
    num_pages: u32,
    page_bytes: usize,
    num_ready_slabs: usize,
}

// SAFETY: `new` demands memory that any thread may write for as long as the value lives.
unsafe impl Send for HostMemory {}
// SAFETY: as above; the bytes are only reached through `pages`, whose contract gives each page to one owner.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Wraps slabs given as (address, bytes).
    ///
    /// # Safety
    /// Every slab is initialised, valid for reads and writes from any thread until the value and everything made from it is
    /// dropped, and disjoint from the others. Nobody else writes to it.
    pub unsafe fn new(slabs: &[(NonNull<u8>, usize)], page_bytes: usize) -> Self {
        let mut num_pages = 0;
        let num_ready_slabs = slabs.len();
        let slabs = slabs
            .iter()
            .map(|&(address, bytes)| {
                let first = num_pages;
                num_pages += (bytes / page_bytes) as u32;
                (first, address)
            })
            .collect();
        Self { slabs, num_pages, page_bytes, num_ready_slabs }
    }

    /// Only the first `num_slabs` may be copied to the device for now: a load into others is answered when
    /// [`Runtime::slabs_ready`](crate::Runtime::slabs_ready) says so.
    pub fn with_ready_slabs(self, num_slabs: usize) -> Self {
        Self { num_ready_slabs: num_slabs, ..self }
    }

    pub(crate) fn num_ready_slabs(&self) -> usize {
        self.num_ready_slabs
    }

    /// How many slabs, from the first on, hold all of the pages.
    pub(crate) fn num_slabs_of(&self, pages: &[u32]) -> usize {
        pages.iter().map(|page| self.slab_of(*page) + 1).max().unwrap_or(0)
    }

    /// Pages of all slabs.
    pub fn num_pages(&self) -> u32 {
        self.num_pages
    }

    /// The memory of an image's pages, for its loader.
    ///
    /// **Invariant** (the engine's): the pages are allocated to this image alone until its load is answered.
    pub(crate) fn pages(&self, pages: &[u32]) -> HostPages {
        let pages = pages.iter().map(|page| self.page(*page)).collect();
        // SAFETY: the slabs are valid as `new` demands; the engine gives a page to one image at a time, and to the loader
        // until the load is answered, so no two `HostPages` in use overlap.
        unsafe { HostPages::new(pages, self.page_bytes) }
    }

    fn page(&self, page: u32) -> NonNull<u8> {
        assert!(page < self.num_pages, "a host page is one of the tier's");
        let (first, address) = self.slabs[self.slab_of(page)];
        // SAFETY: the page lies inside the slab: `new` counted only whole pages.
        unsafe { address.add((page - first) as usize * self.page_bytes) }
    }
    fn slab_of(&self, page: u32) -> usize {
        self.slabs.partition_point(|(first, _)| *first <= page) - 1
    }
}
