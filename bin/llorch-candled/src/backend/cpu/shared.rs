//! A buffer of which several threads write disjoint parts.

use std::cell::UnsafeCell;
use std::ops::Range;

/// A slice whose disjoint parts threads may borrow mutably.
#[derive(Debug)]
pub struct Shared<'a, T>(&'a [UnsafeCell<T>]);

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: values are accessed only through `part`, whose callers guarantee that no two parts overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as for `Sync`.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Wraps a slice for as long as its parts are borrowed.
    pub fn new(slice: &'a mut [T]) -> Self {
        let whole = std::ptr::from_mut(slice) as *const [UnsafeCell<T>];
        // SAFETY: `UnsafeCell<T>` has the layout of `T`, and the mutable borrow lasts as long as this one.
        Self(unsafe { &*whole })
    }

    /// Borrows a part.
    ///
    /// # Safety
    ///
    /// No part that overlaps this one may be borrowed at the same time.
    ///
    /// # Panics
    ///
    /// Panics if the range is outside the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        let cells = &self.0[range];
        let first = UnsafeCell::raw_get(cells.as_ptr());
        // SAFETY: the cells are within the slice, and the caller guarantees that no other borrow of them exists.
        unsafe { std::slice::from_raw_parts_mut(first, cells.len()) }
    }
}
