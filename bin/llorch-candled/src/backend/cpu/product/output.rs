//! The results of a product, as parts that several threads write.

use std::marker::PhantomData;
use std::ops::Range;

use crate::backend::cpu::lanes::{LANES, Lanes};
use crate::backend::cpu::pack::TILE_ROWS;

/// A row-major matrix of results, whose parts several threads write.
#[derive(Debug)]
pub struct Output<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a shared `Output` gives access to memory only through `part`, whose callers keep parts disjoint.
unsafe impl Sync for Output<'_> {}
// SAFETY: it represents a `&mut [f32]`, which is `Send`.
unsafe impl Send for Output<'_> {}

impl<'a> Output<'a> {
    /// Wraps `rows` × `columns` of `values`, in which a row begins every `stride` elements.
    ///
    /// # Panics
    ///
    /// Panics if rows overlap or `values` is too short.
    pub fn new(values: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride, "rows overlap");
        let end = rows
            .checked_sub(1)
            .and_then(|last| last.checked_mul(stride)?.checked_add(columns));
        assert!(
            rows == 0 || end.is_some_and(|end| end <= values.len()),
            "`values` is too short for the results"
        );
        Self {
            start: values.as_mut_ptr(),
            rows,
            columns,
            stride,
            lifetime: PhantomData,
        }
    }

    /// Returns the number of tiles of 16 columns.
    pub fn tiles(&self) -> usize {
        self.columns.div_ceil(TILE_ROWS)
    }

    /// Returns all columns.
    pub fn whole(&mut self) -> Part<'_> {
        let tiles = 0..self.tiles();
        // SAFETY: while the part lives, `self` is mutably borrowed, and nothing else gives access.
        unsafe { self.part(tiles) }
    }

    /// Returns the columns that belong to some tiles of the weights.
    ///
    /// # Safety
    ///
    /// While the part lives, no other part may contain any of these tiles.
    ///
    /// # Panics
    ///
    /// Panics if the tiles don't exist.
    pub unsafe fn part(&self, tiles: Range<usize>) -> Part<'_> {
        assert!(
            tiles.start <= tiles.end && tiles.end <= self.tiles(),
            "tiles {tiles:?} don't exist"
        );
        Part {
            start: self.start,
            rows: self.rows,
            columns: self.columns,
            stride: self.stride,
            tiles,
            lifetime: PhantomData,
        }
    }
}

/// The columns that belong to some tiles, in an [`Output`].
#[derive(Debug)]
pub struct Part<'a> {
    start: *mut f32,
    pub(super) rows: usize,
    pub(super) columns: usize,
    stride: usize,
    pub(super) tiles: Range<usize>,
    lifetime: PhantomData<&'a mut f32>,
}

// SAFETY: a part has exclusive access to its elements, as a `&mut` does.
unsafe impl Send for Part<'_> {}

impl Part<'_> {
    /// Writes the results of a tile for a row.
    #[inline(always)]
    pub(super) fn store<L: Lanes>(&mut self, lanes: L, row: usize, tile: usize, results: L::F) {
        assert!(
            row < self.rows && self.tiles.contains(&tile),
            "the row or tile is outside the part"
        );
        let column = tile * TILE_ROWS;
        let len = (self.columns - column).min(TILE_ROWS);
        // SAFETY: `Output::new` checked that all elements of these rows and columns are within its slice, and the callers of
        // `Output::part` guarantee that only this part contains this tile.
        let to = unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.stride + column), len)
        };
        if let Ok(to) = <&mut [f32; LANES]>::try_from(&mut *to) {
            lanes.store(to, results);
        } else {
            let mut all = [0.0; LANES];
            lanes.store(&mut all, results);
            to.copy_from_slice(&all[..len]);
        }
    }
}
