//! The input of products: rows of activations, quantised as the weights need them.

use crate::backend::cpu::lanes::Tier;
use crate::backend::cpu::pack::PackedMatrix;
use crate::backend::cpu::product::Activations;
use crate::backend::cpu::quantize::{Block32, Block256, Grouping, Quantized, Rows, quantize_row};
use crate::backend::cpu::shared::Shared;

/// The input of a product: rows of floats, quantised in the groupings that the weights need.
#[derive(Default)]
pub(super) struct Input {
    by_32: Rows<Block32>,
    by_256: Rows<Block256>,
}

/// The groupings that some weights need.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    by_32: bool,
    by_256: bool,
}

impl Needs {
    /// Returns the groupings that these weights need.
    pub(super) fn of(weights: &[&PackedMatrix]) -> Self {
        let need = |grouping| {
            weights
                .iter()
                .any(|weights| Grouping::of(weights.format()) == grouping)
        };
        Self {
            by_32: need(Grouping::By32),
            by_256: need(Grouping::By256),
        }
    }
}

/// A writer of the rows of an [`Input`], which several threads may use for different rows.
#[derive(Clone, Copy)]
pub(super) struct InputWriter<'a> {
    tier: Tier,
    by_32: Option<(Shared<'a, Block32>, usize)>,
    by_256: Option<(Shared<'a, Block256>, usize)>,
}

impl Input {
    /// Resizes the input to `rows` of `columns`, and returns its writer.
    pub(super) fn writer(
        &mut self,
        tier: Tier,
        rows: usize,
        columns: usize,
        needs: Needs,
    ) -> InputWriter<'_> {
        InputWriter {
            tier,
            by_32: needs.by_32.then(|| open(&mut self.by_32, rows, columns)),
            by_256: needs.by_256.then(|| open(&mut self.by_256, rows, columns)),
        }
    }

    /// Returns the rows in the form that a product with these weights takes; `floats` are the rows themselves.
    pub(super) fn activations<'a>(
        &'a self,
        weights: &PackedMatrix,
        floats: &'a [f32],
    ) -> Activations<'a> {
        match Grouping::of(weights.format()) {
            Grouping::Floats => Activations::Floats(floats),
            Grouping::By32 => Activations::By32(&self.by_32),
            Grouping::By256 => Activations::By256(&self.by_256),
        }
    }
}

/// Resizes `all`, and returns its blocks and the number of blocks in a row.
fn open<B: Quantized>(all: &mut Rows<B>, rows: usize, columns: usize) -> (Shared<'_, B>, usize) {
    all.resize(rows, columns);
    let length = all.row_blocks();
    (Shared::new(all.blocks_mut()), length)
}

impl InputWriter<'_> {
    /// Writes a row.
    ///
    /// # Safety
    ///
    /// No other thread may write this row at the same time.
    pub(super) unsafe fn row(&self, row: usize, floats: &[f32]) {
        if let Some((blocks, length)) = self.by_32 {
            // SAFETY: the caller guarantees that each row has one writer.
            let blocks = unsafe { blocks.part(row * length..(row + 1) * length) };
            quantize_row(self.tier, floats, blocks);
        }
        if let Some((blocks, length)) = self.by_256 {
            // SAFETY: the caller guarantees that each row has one writer.
            let blocks = unsafe { blocks.part(row * length..(row + 1) * length) };
            quantize_row(self.tier, floats, blocks);
        }
    }
}
