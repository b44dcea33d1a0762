//! One buffer that several threads write to, each its own parts.

use std::cell::UnsafeCell;
use std::ops::Range;

/// A slice of which threads may borrow disjoint parts mutably.
#[derive(Debug)]
pub struct Shared<'a, T>(&'a [UnsafeCell<T>]);

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: values are reached only through `part`, whose callers see to it that no two parts overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: the same.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes a slice for as long as its parts are borrowed.
    pub fn new(slice: &'a mut [T]) -> Self {
        let whole = std::ptr::from_mut(slice) as *const [UnsafeCell<T>];
        // SAFETY: `UnsafeCell<T>` has the layout of `T`, and the mutable borrow lasts as long as this one.
        Self(unsafe { &*whole })
    }

    /// Borrows a part.
    ///
    /// # Safety
    ///
    /// No other part that overlaps this one may be borrowed at the same time.
    ///
    /// # Panics
    ///
    /// Panics if the range is outside the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        let cells = &self.0[range];
        let first = UnsafeCell::raw_get(cells.as_ptr());
        // SAFETY: the cells are within the slice, and the caller vouches that nobody else borrows them.
        unsafe { std::slice::from_raw_parts_mut(first, cells.len()) }
    }
}
