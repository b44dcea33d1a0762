//! Memory for the cache, which the system gives to the process page by page as it is used.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// A slice of bytes, zeros at first, that begins at a page.
///
/// A vector of this size may lie in memory that the allocator has to zero, and then takes all of it at once.
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
        // The system gives no mapping of no bytes.
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
