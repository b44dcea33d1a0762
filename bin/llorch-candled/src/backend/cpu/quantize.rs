//! Rows of activations in the forms that matrix products take.

use crate::backend::cpu::format::Format;
use crate::backend::cpu::lanes::{Kernel, LANES, Lanes, Tier};

/// The form of activations that a format's product takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// Floats, not quantised.
    Floats,
    /// Signed bytes with a scale for each 32 columns.
    By32,
    /// Signed bytes with a scale for each 256 columns.
    By256,
}

impl Grouping {
    /// Returns the form that a product with weights of this format takes.
    pub fn of(format: Format) -> Self {
        match format.block_len() {
            1 => Self::Floats,
            32 => Self::By32,
            _ => Self::By256,
        }
    }
}

/// 32 activations, each about `scale` times its byte.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct Block32 {
    /// Bytes from −127 to 127, four in each integer, the first in the lowest bits.
    pub quads: [i32; 8],
    /// Largest magnitude / 127.
    pub scale: f32,
    /// Sum of the bytes.
    pub sum: i32,
    /// `scale` · `sum`.
    pub scaled_sum: f32,
}

/// 256 activations, each about `scale` times its byte.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct Block256 {
    /// Bytes of each 32 activations, from −127 to 127, four in each integer, the first in the lowest bits.
    pub quads: [[i32; 8]; 8],
    /// Sum of the bytes of each 16.
    pub sums: [i32; 16],
    /// The `sums`, two in each integer as 16-bit numbers, the first in the lower half.
    pub pairs_of_16: [i32; 8],
    /// Sum of the bytes of each 32, two in each integer as 16-bit numbers.
    pub pairs_of_32: [i32; 4],
    /// Largest magnitude / 127.
    pub scale: f32,
}

/// Rows of quantised activations. Meant to be reused: [`resize`](Self::resize) allocates only to grow.
#[derive(Debug, Clone, Default)]
pub struct Rows<B> {
    blocks: Vec<B>,
    rows: usize,
    row_blocks: usize,
}

/// A kind of block that activations are quantised to.
pub trait Quantized: Copy + Default {
    /// Number of activations in a block.
    const LEN: usize;
    /// Quantises a block.
    fn quantize<L: Lanes>(lanes: L, from: &[[f32; LANES]]) -> Self;
}

impl<B: Quantized> Rows<B> {
    /// Returns a matrix without rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `rows` of `columns`, padded with zeros to whole blocks. The content of the rows is unspecified until they
    /// are quantised.
    pub fn resize(&mut self, rows: usize, columns: usize) {
        self.rows = rows;
        self.row_blocks = columns.div_ceil(B::LEN);
        self.blocks.resize(rows * self.row_blocks, B::default());
    }

    /// Returns the blocks of all rows, in order.
    pub fn blocks_mut(&mut self) -> &mut [B] {
        &mut self.blocks
    }

    /// Returns the number of blocks in a row.
    pub fn row_blocks(&self) -> usize {
        self.row_blocks
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Returns whether the number of rows is 0.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Returns the number of columns, including padding.
    pub fn columns(&self) -> usize {
        self.row_blocks * B::LEN
    }

    /// Returns the blocks of a row.
    pub fn row(&self, row: usize) -> &[B] {
        &self.blocks[row * self.row_blocks..][..self.row_blocks]
    }

    /// Returns the blocks of each row, for [`quantize_row`]. Several threads may each take rows.
    pub fn rows_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [B]> {
        self.blocks.chunks_exact_mut(self.row_blocks.max(1))
    }

    /// Quantises rows of `columns` floats.
    ///
    /// # Panics
    ///
    /// Panics if `columns` is 0 or not a multiple of 16, or if `from` isn't whole rows.
    pub fn quantize(&mut self, tier: Tier, from: &[f32], columns: usize) {
        assert_eq!(from.len() % columns, 0, "`from` is not whole rows");
        self.resize(from.len() / columns, columns);
        for (from, to) in from.chunks_exact(columns).zip(self.rows_mut()) {
            quantize_row(tier, from, to);
        }
    }
}

/// Quantises a row of floats.
///
/// A byte is the float · (127 / largest magnitude of the block), rounded to nearest, ties to even. If the largest magnitude is
/// so small that the factor overflows (below 4e-37), scale and bytes are 0. If a float is infinite or NaN, the scale is NaN and
/// the bytes are 0, so that every product with the block is NaN.
///
/// # Panics
///
/// Panics if the length of `from` is not a multiple of 16, or if `to` doesn't have the number of blocks that it needs.
pub fn quantize_row<B: Quantized>(tier: Tier, from: &[f32], to: &mut [B]) {
    let (from, rest) = from.as_chunks();
    assert!(rest.is_empty(), "not a multiple of {LANES} columns");
    assert_eq!(
        to.len(),
        (from.len() * LANES).div_ceil(B::LEN),
        "number of blocks of a row"
    );
    tier.run(QuantizeRow { from, to });
}

struct QuantizeRow<'a, B> {
    from: &'a [[f32; LANES]],
    to: &'a mut [B],
}

impl<B: Quantized> Kernel for QuantizeRow<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (from, to) in self.from.chunks(B::LEN / LANES).zip(self.to) {
            *to = B::quantize(lanes, from);
        }
    }
}

/// Returns the scale of a block, and the factor that converts its floats to bytes.
#[inline(always)]
fn scale_and_factor<L: Lanes>(lanes: L, from: &[[f32; LANES]]) -> (f32, f32) {
    let magnitude = lanes.splat_int(i32::MAX);
    let mut largest = lanes.splat_int(0);
    for from in from {
        let bits = lanes.and_int(lanes.to_bits(lanes.load(from)), magnitude);
        largest = lanes.max_int(largest, bits);
    }
    // As integers, the bits of magnitudes are ordered like the magnitudes, with infinity and NaN above all.
    let largest = f32::from_bits(lanes.largest_int(largest).cast_unsigned());
    let factor = 127.0 / largest;
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if !factor.is_finite() {
        (0.0, 0.0)
    } else {
        (largest / 127.0, factor)
    }
}

/// Returns sixteen bytes, as four quads, and their sum.
#[inline(always)]
fn sixteen<L: Lanes>(lanes: L, from: &[f32; LANES], factor: f32) -> ([i32; 4], i32) {
    // Factor 0 also marks blocks with NaN or infinite floats, whose products with 0 would not be 0.
    if factor == 0.0 {
        return ([0; 4], 0);
    }
    let rounded = lanes.round(lanes.mul(lanes.load(from), lanes.splat(factor)));
    let mut bytes = [0; LANES];
    lanes.store_low_bytes(&mut bytes, rounded);
    let (quads, _) = bytes.as_chunks::<4>();
    let quad = |i: usize| i32::from_le_bytes(quads[i].map(i8::cast_unsigned));
    ([quad(0), quad(1), quad(2), quad(3)], lanes.sum_int(rounded))
}

impl Quantized for Block32 {
    const LEN: usize = 32;

    #[inline(always)]
    fn quantize<L: Lanes>(lanes: L, from: &[[f32; LANES]]) -> Self {
        let (scale, factor) = scale_and_factor(lanes, from);
        let mut block = Self {
            scale,
            ..Self::default()
        };
        for (from, quads) in from.iter().zip(block.quads.as_chunks_mut::<4>().0) {
            let (bytes, sum) = sixteen(lanes, from, factor);
            *quads = bytes;
            block.sum += sum;
        }
        block.scaled_sum = scale * block.sum as f32;
        block
    }
}

impl Quantized for Block256 {
    const LEN: usize = 256;

    #[inline(always)]
    fn quantize<L: Lanes>(lanes: L, from: &[[f32; LANES]]) -> Self {
        let (scale, factor) = scale_and_factor(lanes, from);
        let mut block = Self {
            scale,
            ..Self::default()
        };
        let quads = block.quads.as_flattened_mut().as_chunks_mut::<4>().0;
        for ((from, quads), sum) in from.iter().zip(quads).zip(&mut block.sums) {
            (*quads, *sum) = sixteen(lanes, from, factor);
        }
        // Sums are within 32 · 127, so they fit in 16 bits.
        let pair = |low: i32, high: i32| low & 0xFFFF | high << 16;
        let sums = block.sums;
        block.pairs_of_16 = std::array::from_fn(|i| pair(sums[2 * i], sums[2 * i + 1]));
        let sum_of_32 = |i: usize| sums[2 * i] + sums[2 * i + 1];
        block.pairs_of_32 = std::array::from_fn(|i| pair(sum_of_32(2 * i), sum_of_32(2 * i + 1)));
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::Random;

    fn bytes(quads: &[i32]) -> Vec<i8> {
        quads
            .iter()
            .flat_map(|quad| quad.to_le_bytes())
            .map(u8::cast_signed)
            .collect()
    }

    /// Quantises a row on every tier and returns the common result.
    fn quantize<B: Quantized + PartialEq + std::fmt::Debug>(row: &[f32]) -> Vec<B> {
        let mut expected = vec![B::default(); row.len().div_ceil(B::LEN)];
        quantize_row(Tier::Portable, row, &mut expected);
        for tier in Tier::available() {
            let mut blocks = vec![B::default(); expected.len()];
            quantize_row(tier, row, &mut blocks);
            // Compared as text, because NaN doesn't equal itself.
            assert_eq!(format!("{blocks:?}"), format!("{expected:?}"), "{tier:?}");
        }
        expected
    }

    #[test]
    fn blocks_of_32_hold_scale_bytes_and_sums() {
        let mut random = Random::new(7);
        let row: Vec<f32> = (0..80).map(|_| random.float() * 3.0).collect();
        let blocks = quantize::<Block32>(&row);
        assert_eq!(blocks.len(), 3);
        for (block, row) in blocks.iter().zip(row.chunks(32)) {
            let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            assert_eq!(block.scale, largest / 127.0);
            let mut expected: Vec<i8> = row
                .iter()
                .map(|x| (x * (127.0 / largest)).round_ties_even() as i8)
                .collect();
            expected.resize(32, 0);
            assert_eq!(bytes(&block.quads), expected);
            assert_eq!(
                block.sum,
                expected.iter().copied().map(i32::from).sum::<i32>()
            );
            assert_eq!(block.scaled_sum, block.scale * block.sum as f32);
        }
    }

    #[test]
    fn blocks_of_256_hold_sums_of_16_and_32() {
        let mut random = Random::new(8);
        let row: Vec<f32> = (0..272).map(|_| random.float()).collect();
        let blocks = quantize::<Block256>(&row);
        assert_eq!(blocks.len(), 2);
        for block in blocks {
            let bytes = bytes(block.quads.as_flattened());
            let sum = |group: &[i8]| group.iter().copied().map(i32::from).sum::<i32>();
            let sums: Vec<i32> = bytes.chunks(16).map(sum).collect();
            assert_eq!(block.sums.to_vec(), sums);
            let halves = |pairs: &[i32]| -> Vec<i32> {
                let halves = pairs
                    .iter()
                    .flat_map(|&pair| [pair as i16, (pair >> 16) as i16]);
                halves.map(i32::from).collect()
            };
            assert_eq!(halves(&block.pairs_of_16), sums);
            assert_eq!(
                halves(&block.pairs_of_32),
                bytes.chunks(32).map(sum).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn halves_are_rounded_to_even() {
        let mut row = [0.0; 32];
        row[..5].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, -127.0]);
        assert_eq!(
            bytes(&quantize::<Block32>(&row)[0].quads)[..5],
            [127, 0, 2, -2, -127]
        );
    }

    #[test]
    fn zeros_and_tiny_values_have_scale_0() {
        for x in [0.0, -0.0, 1e-38, f32::from_bits(1)] {
            let block = quantize::<Block32>(&[x; 32])[0];
            assert_eq!((block.scale, block.sum), (0.0, 0), "{x}");
        }
        // The largest and the smallest magnitudes that have a scale.
        for x in [f32::MAX, 4e-37] {
            let block = quantize::<Block256>(&[x; 256])[0];
            assert!(
                bytes(block.quads.as_flattened())
                    .iter()
                    .all(|&byte| byte == 127),
                "{x}"
            );
            assert_eq!(block.scale, x / 127.0);
        }
    }

    #[test]
    fn nan_and_infinity_make_the_scale_nan() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = [1.0; 512];
            row[300] = bad;
            let small = quantize::<Block32>(&row);
            let large = quantize::<Block256>(&row);
            assert!(
                small[9].scale.is_nan() && small[9].quads == [0; 8] && small[9].scaled_sum.is_nan()
            );
            assert!(large[1].scale.is_nan() && large[1].sums == [0; 16]);
            assert!(
                small
                    .iter()
                    .enumerate()
                    .all(|(i, block)| i == 9 || block.scale == 1.0 / 127.0)
            );
            assert_eq!(large[0].scale, 1.0 / 127.0);
        }
    }
}
