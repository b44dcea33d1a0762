//! Memory in whole pages: for the cache, which the system provides only as it is used, and large pages for the weights.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// A slice of bytes, initially zero, that begins at a page boundary.
///
/// A vector of this size may be in memory that the allocator has to zero, which would allocate all of it at once.
pub struct Pages {
    map: MmapMut,
    length: usize,
}

impl Pages {
    /// Reserves `length` bytes.
    ///
    /// # Errors
    ///
    /// Fails if the system refuses the address space.
    pub fn new(length: usize) -> io::Result<Self> {
        // The system refuses an empty mapping.
        let map = MmapMut::map_anon(length.max(1))?;
        Ok(Self { map, length })
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[..self.length]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[..self.length]
    }
}

/// Asks the system for large pages behind memory that is not yet in use. Every token reads all weights, and with small pages each
/// 4 KiB of them needs an address translation of its own.
#[cfg(all(target_os = "linux", not(miri)))]
#[allow(unsafe_code)]
pub fn prefer_large_pages(buffer: &mut [u8]) {
    /// A multiple of every system's page size.
    const PAGE: usize = 64 << 10;
    let start = buffer.as_mut_ptr();
    let skipped = start.align_offset(PAGE);
    let whole = buffer.len().saturating_sub(skipped) / PAGE * PAGE;
    if whole > 0 {
        // SAFETY: the range is within the buffer, and the advice changes none of its bytes. If the system does not take the
        // advice, pages stay small.
        unsafe { libc::madvise(start.add(skipped).cast(), whole, libc::MADV_HUGEPAGE) };
    }
}

/// Does nothing: the system chooses the pages.
#[cfg(any(not(target_os = "linux"), miri))]
pub fn prefer_large_pages(_: &mut [u8]) {}
