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
        let slabs = slabs
            .iter()
            .map(|&(address, bytes)| {
                let first = num_pages;
                num_pages += (bytes / page_bytes) as u32;
                (first, address)
            })
            .collect();
        Self { slabs, num_pages, page_bytes }
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
        let slab = self.slabs.partition_point(|(first, _)| *first <= page) - 1;
        let (first, address) = self.slabs[slab];
        // SAFETY: the page lies inside the slab: `new` counted only whole pages.
        unsafe { address.add((page - first) as usize * self.page_bytes) }
    }
}
