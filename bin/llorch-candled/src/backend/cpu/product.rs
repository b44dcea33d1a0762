//! Products of activations with packed weights: `out[m][n] = Σ activations[m][k] · weights[n][k]`.
//!
//! Every element is computed by the same operations in the same order, on every tier, for any number of rows, and for any
//! distribution of tiles to threads:
//!
//! - floats: four sums, of the columns with k mod 4 = 0, 1, 2 and 3, by fused multiply-adds in the order of k, then
//!   (0 + 1) + (2 + 3);
//! - quantised formats: one sum, to which each block adds its exact integer sum times the product of both scales by one fused
//!   multiply-add, and then, in formats with minima, the minimum times the sum of the activations by another.

mod chunk;
mod float;
#[allow(unsafe_code)]
mod output;

use std::marker::PhantomData;
use std::ops::Range;

use crate::backend::cpu::format::Format;
use crate::backend::cpu::lanes::{Kernel, LANES, Lanes, Tier};
use crate::backend::cpu::pack::{HALVES, PackedMatrix, tile_block_bytes};
use crate::backend::cpu::quantize::{Block32, Block256, Quantized, Rows};
use chunk::{Bytes, Chunk, Fives, Nibbles, Sixes};
use float::{Brains, FloatProduct, Halves, Singles};
pub use output::{Output, Part};

/// Rows of activations, in the form that the weights' format takes
/// ([`Grouping::of`](crate::backend::cpu::quantize::Grouping::of)).
#[derive(Debug, Clone, Copy)]
pub enum Activations<'a> {
    /// Row-major floats, with as many columns as the weights.
    Floats(&'a [f32]),
    /// Bytes with a scale for each 32 columns.
    By32(&'a Rows<Block32>),
    /// Bytes with a scale for each 256 columns.
    By256(&'a Rows<Block256>),
}

/// Computes the products of all rows of activations with the weights of the part's tiles.
///
/// # Panics
///
/// Panics if the weights take activations of another kind, or if shapes don't agree.
pub fn multiply(
    tier: Tier,
    weights: &PackedMatrix,
    activations: Activations<'_>,
    out: &mut Part<'_>,
) {
    assert_eq!(weights.rows(), out.columns, "columns of the results");
    match activations {
        Activations::Floats(values) => {
            assert_eq!(
                values.len(),
                out.rows * weights.columns(),
                "the shape of the activations"
            );
            match weights.format() {
                Format::F32 => tier.run(FloatProduct::<Singles, 64>::new(weights, values, out)),
                Format::F16 => tier.run(FloatProduct::<Halves, HALVES>::new(weights, values, out)),
                Format::BF16 => tier.run(FloatProduct::<Brains, HALVES>::new(weights, values, out)),
                format => panic!("{format:?} needs quantised activations"),
            }
        }
        Activations::By32(rows) => {
            check_rows(weights, rows, out);
            match weights.format() {
                Format::Q4_0 => run::<Weights32<Nibbles, 288, 8, false>>(tier, weights, rows, out),
                Format::Q4_1 => run::<Weights32<Nibbles, 320, 0, true>>(tier, weights, rows, out),
                Format::Q5_0 => run::<Weights32<Fives, 352, 16, false>>(tier, weights, rows, out),
                Format::Q5_1 => run::<Weights32<Fives, 384, 0, true>>(tier, weights, rows, out),
                Format::Q8_0 => run::<Weights32<Bytes, 544, 0, false>>(tier, weights, rows, out),
                format => panic!("{format:?} needs activations of another kind"),
            }
        }
        Activations::By256(rows) => {
            check_rows(weights, rows, out);
            match weights.format() {
                Format::Q2_K => run::<Weights256<Nibbles, 2624, 16, 0>>(tier, weights, rows, out),
                Format::Q3_K => run::<Weights256<Nibbles, 2336, 16, 4>>(tier, weights, rows, out),
                Format::Q4_K => run::<Weights256<Nibbles, 2368, 32, 0>>(tier, weights, rows, out),
                Format::Q5_K => run::<Weights256<Fives, 2880, 32, 0>>(tier, weights, rows, out),
                Format::Q6_K => run::<Weights256<Sixes, 3360, 16, 32>>(tier, weights, rows, out),
                format => panic!("{format:?} needs activations of another kind"),
            }
        }
    }
}

fn check_rows<B: Quantized>(weights: &PackedMatrix, rows: &Rows<B>, out: &Part<'_>) {
    assert_eq!(
        rows.columns(),
        weights.columns(),
        "columns of the activations"
    );
    assert_eq!(rows.len(), out.rows, "rows of the activations");
}

fn run<W: Weights>(
    tier: Tier,
    weights: &PackedMatrix,
    activations: &Rows<W::Activations>,
    out: &mut Part<'_>,
) {
    assert_eq!(
        size_of::<W::Block>(),
        tile_block_bytes(weights.format()),
        "the layout of a block"
    );
    tier.run(Product::<W> {
        weights,
        activations,
        out,
    });
}

/// Returns the `N` bytes at `at`. Both are known when a kernel is compiled, and `bytes` is an array, so no check remains.
#[inline(always)]
fn at<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("the layout of a block")
}

/// Loads sixteen half-precision floats.
#[inline(always)]
fn load_halves<L: Lanes>(lanes: L, bytes: &[u8; HALVES]) -> L::F {
    lanes.load_f16(&sixteen_bits(bytes))
}

#[inline(always)]
fn sixteen_bits(bytes: &[u8; HALVES]) -> [u16; LANES] {
    let (pairs, _) = bytes.as_chunks::<2>();
    std::array::from_fn(|lane| u16::from_le_bytes(pairs[lane]))
}

// Closures lack the target features of the function they are in, and functions that they call might not be inlined. So code
// that computes with lanes uses loops instead of `map`.

/// Integers of `T` tiles and `M` rows.
type Sums<L, const T: usize, const M: usize> = [[<L as Lanes>::I; M]; T];

/// Results of `T` tiles and `M` rows.
type Results<L, const T: usize, const M: usize> = [[<L as Lanes>::F; M]; T];

/// Adds the products of 8 columns. One broadcast of activations serves all tiles, and one decoding of weights all rows.
#[inline(always)]
fn dot_pair<L: Lanes, C: Chunk, const P: usize, const T: usize, const M: usize>(
    lanes: L,
    chunks: [&[u8]; T],
    quads: [&[i32; 8]; M],
    sums: &mut Sums<L, T, M>,
) {
    let mut weights = [C::pair::<L, P>(lanes, chunks[0]); T];
    for t in 1..T {
        weights[t] = C::pair::<L, P>(lanes, chunks[t]);
    }
    if L::TWICE && !C::SIGNED {
        for m in 0..M {
            let both = [quads[m][2 * P], quads[m][2 * P + 1]];
            for t in 0..T {
                sums[t][m] = lanes.dot_u6_twice(sums[t][m], weights[t], both);
            }
        }
        return;
    }
    for half in 0..2 {
        for m in 0..M {
            let quad = quads[m][2 * P + half];
            for t in 0..T {
                let sum = sums[t][m];
                sums[t][m] = if C::SIGNED {
                    lanes.dot_i8(sum, weights[t][half], quad)
                } else {
                    lanes.dot_u7(sum, weights[t][half], quad)
                };
            }
        }
    }
}

/// Distance in bytes at which weights are prefetched ahead of products. Tiles are contiguous, so most bytes prefetched at the
/// end of a tile are needed too.
const AHEAD: usize = 4096;

/// Prefetches the bytes at a distance of `ahead` after some weights; does nothing if `ahead` is 0. The first products with a
/// tile wait for memory, and the processor's own prefetcher uses less than the full bandwidth. Each call requests little, so
/// that the requests find room.
#[inline(always)]
fn prefetch<L: Lanes, const T: usize>(lanes: L, ahead: usize, weights: [&[u8]; T]) {
    if ahead > 0 {
        for weights in weights {
            for line in weights.iter().step_by(64) {
                lanes.prefetch(line, ahead);
            }
        }
    }
}

/// Returns the distance at which to prefetch weights at `start` bytes of `T` tiles of this length. A product reads the `T`
/// tiles side by side, so the tile to read after the end of one is `T` tiles further.
#[inline(always)]
fn ahead<const T: usize>(start: usize, tile_bytes: usize) -> usize {
    if start + AHEAD < tile_bytes {
        AHEAD
    } else {
        AHEAD + (T - 1) * tile_bytes
    }
}

/// The weights of a quantised format.
trait Weights {
    /// Kind of block of the activations that these weights take.
    type Activations: Quantized;
    /// Block of a tile, in bytes.
    type Block;

    /// Returns the blocks of a tile.
    fn blocks(tile: &[u8]) -> &[Self::Block];
    /// Adds the products of one block of each of `T` tiles with the matching block of `M` rows. Prefetches weights at a
    /// distance of `ahead` bytes.
    fn add<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        ahead: usize,
        weights: [&Self::Block; T],
        rows: [&Self::Activations; M],
        results: &mut Results<L, T, M>,
    );
}

/// Blocks of `BYTES` for 32 columns. `OFFSET` is subtracted from the values. `MINIMUM` is true if the format has minima.
struct Weights32<C, const BYTES: usize, const OFFSET: i32, const MINIMUM: bool>(PhantomData<C>);

impl<C: Chunk, const BYTES: usize, const OFFSET: i32, const MINIMUM: bool> Weights
    for Weights32<C, BYTES, OFFSET, MINIMUM>
{
    type Activations = Block32;
    type Block = [u8; BYTES];

    #[inline(always)]
    fn blocks(tile: &[u8]) -> &[Self::Block] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn add<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        ahead: usize,
        weights: [&Self::Block; T],
        rows: [&Self::Activations; M],
        results: &mut Results<L, T, M>,
    ) {
        prefetch(lanes, ahead, weights.map(|block| block.as_slice()));
        // No integer overflows: 32 products of a byte raised to at most 255 with one of at most 127, and a start value of at
        // most 128 times the sum of 32 such bytes, are below 2²¹.
        let mut start = [lanes.splat_int(0); M];
        for m in 0..M {
            start[m] = match C::SIGNED {
                true => lanes.dot_i8_start(rows[m].sum),
                false => lanes.splat_int(-OFFSET * rows[m].sum),
            };
        }
        let mut sums = [start; T];
        let chunks = weights.map(|block| &block[..C::BYTES]);
        let quads = rows.map(|row| &row.quads);
        dot_pair::<L, C, 0, T, M>(lanes, chunks, quads, &mut sums);
        dot_pair::<L, C, 1, T, M>(lanes, chunks, quads, &mut sums);
        dot_pair::<L, C, 2, T, M>(lanes, chunks, quads, &mut sums);
        dot_pair::<L, C, 3, T, M>(lanes, chunks, quads, &mut sums);
        for t in 0..T {
            let scale = load_halves(lanes, at(weights[t], C::BYTES));
            for m in 0..M {
                let scale = lanes.mul(scale, lanes.splat(rows[m].scale));
                results[t][m] = lanes.mul_add(lanes.to_float(sums[t][m]), scale, results[t][m]);
            }
            if MINIMUM {
                let minimum = load_halves(lanes, at(weights[t], C::BYTES + HALVES));
                for m in 0..M {
                    let sum = lanes.splat(rows[m].scaled_sum);
                    results[t][m] = lanes.mul_add(minimum, sum, results[t][m]);
                }
            }
        }
    }
}

/// Blocks of `BYTES` for 256 columns, with integer scales for each `GROUP` (16 or 32). Either `OFFSET` is subtracted from the
/// values and scales are signed, or `OFFSET` is 0 and there are minima.
struct Weights256<C, const BYTES: usize, const GROUP: usize, const OFFSET: i32>(PhantomData<C>);

impl<C: Chunk, const BYTES: usize, const GROUP: usize, const OFFSET: i32>
    Weights256<C, BYTES, GROUP, OFFSET>
{
    /// Offset of the integer scales in a block.
    const SCALES: usize = 8 * C::BYTES;
    /// Offset of the integer minima, if there are any.
    const MINIMA: usize = Self::SCALES + 256 / GROUP * LANES;
    /// Offset of the half-precision scale.
    const SCALE: usize = if OFFSET == 0 {
        Self::MINIMA + 256 / GROUP * LANES
    } else {
        Self::MINIMA
    };

    /// Returns the integer scales of a group.
    #[inline(always)]
    fn group_scale<L: Lanes>(lanes: L, block: &[u8; BYTES], group: usize) -> L::I {
        let scales = at(block, Self::SCALES + LANES * group);
        if OFFSET == 0 {
            lanes.load_u8(scales)
        } else {
            lanes.load_i8(scales)
        }
    }

    /// Returns the start values of a group's sums.
    #[inline(always)]
    fn start<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        rows: [&Block256; M],
        group: usize,
    ) -> Sums<L, T, M> {
        let mut start = [lanes.splat_int(0); M];
        if OFFSET != 0 {
            for m in 0..M {
                start[m] = lanes.splat_int(-OFFSET * rows[m].sums[group]);
            }
        }
        [start; T]
    }

    /// Adds a group's sums, multiplied by its scales, to the totals.
    #[inline(always)]
    fn add_group<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        weights: [&[u8; BYTES]; T],
        group: usize,
        sums: Sums<L, T, M>,
        totals: &mut Sums<L, T, M>,
    ) {
        for t in 0..T {
            let scale = Self::group_scale(lanes, weights[t], group);
            for m in 0..M {
                totals[t][m] = lanes.add_int(totals[t][m], lanes.mul_int(sums[t][m], scale));
            }
        }
    }

    /// Returns the sums of the integer minima multiplied by the sums of their groups' activations.
    #[inline(always)]
    fn minima<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        weights: [&[u8; BYTES]; T],
        rows: [&Block256; M],
    ) -> Sums<L, T, M> {
        let mut totals = [[lanes.splat_int(0); M]; T];
        for four in 0..64 / GROUP {
            for t in 0..T {
                let minima = lanes.load_bytes(at(weights[t], Self::MINIMA + 64 * four));
                let even = lanes.and_bytes(minima, lanes.low_bytes_of_pairs());
                let odd = lanes.and_bytes(
                    lanes.shift_right_pairs::<8>(minima),
                    lanes.low_bytes_of_pairs(),
                );
                for m in 0..M {
                    let pair = |i: usize| match GROUP {
                        16 => rows[m].pairs_of_16[i],
                        _ => rows[m].pairs_of_32[i],
                    };
                    let total = lanes.dot_i16(totals[t][m], even, pair(2 * four));
                    totals[t][m] = lanes.dot_i16(total, odd, pair(2 * four + 1));
                }
            }
        }
        totals
    }
}

impl<C: Chunk, const BYTES: usize, const GROUP: usize, const OFFSET: i32> Weights
    for Weights256<C, BYTES, GROUP, OFFSET>
{
    type Activations = Block256;
    type Block = [u8; BYTES];

    #[inline(always)]
    fn blocks(tile: &[u8]) -> &[Self::Block] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn add<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        ahead: usize,
        weights: [&Self::Block; T],
        rows: [&Self::Activations; M],
        results: &mut Results<L, T, M>,
    ) {
        // No integer overflows. A group's sum is within 16 · 127 · (63 + 32) < 2¹⁸ (6 bits with an offset) or 32 · 127 · 31 <
        // 2¹⁷ (5 bits). Multiplied by a scale of at most 128 for 16 groups, or 63 for 8, the total is below 2²⁹. Minima are at
        // most 63, and 256 activations sum up to at most 256 · 127: below 2²².
        let mut totals = [[lanes.splat_int(0); M]; T];
        for chunk in 0..8 {
            let chunks = weights.map(|block| &block[C::BYTES * chunk..][..C::BYTES]);
            let quads = rows.map(|row| &row.quads[chunk]);
            prefetch(lanes, ahead, chunks);
            let mut sums =
                Self::start::<L, T, M>(lanes, rows, if GROUP == 16 { 2 * chunk } else { chunk });
            dot_pair::<L, C, 0, T, M>(lanes, chunks, quads, &mut sums);
            dot_pair::<L, C, 1, T, M>(lanes, chunks, quads, &mut sums);
            if GROUP == 16 {
                Self::add_group(lanes, weights, 2 * chunk, sums, &mut totals);
                sums = Self::start::<L, T, M>(lanes, rows, 2 * chunk + 1);
            }
            dot_pair::<L, C, 2, T, M>(lanes, chunks, quads, &mut sums);
            dot_pair::<L, C, 3, T, M>(lanes, chunks, quads, &mut sums);
            let last = if GROUP == 16 { 2 * chunk + 1 } else { chunk };
            Self::add_group(lanes, weights, last, sums, &mut totals);
        }
        prefetch(lanes, ahead, weights.map(|block| &block[Self::SCALES..]));
        for t in 0..T {
            let scale = load_halves(lanes, at(weights[t], Self::SCALE));
            for m in 0..M {
                let scale = lanes.mul(scale, lanes.splat(rows[m].scale));
                results[t][m] = lanes.mul_add(lanes.to_float(totals[t][m]), scale, results[t][m]);
            }
        }
        if OFFSET == 0 {
            let minima = Self::minima(lanes, weights, rows);
            for t in 0..T {
                let minimum = load_halves(lanes, at(weights[t], Self::SCALE + HALVES));
                for m in 0..M {
                    let minimum = lanes.mul(minimum, lanes.splat(rows[m].scale));
                    let total = lanes.to_float(minima[t][m]);
                    results[t][m] = lanes.neg_mul_add(total, minimum, results[t][m]);
                }
            }
        }
    }
}

/// Rows that are multiplied with all tiles before the next rows. Their activations stay in the second-level cache, and the
/// pages of activations and results stay within reach of the first-level TLB.
const ROWS: usize = 48;

struct Product<'a, 'o, W: Weights> {
    weights: &'a PackedMatrix,
    activations: &'a Rows<W::Activations>,
    out: &'a mut Part<'o>,
}

impl<W: Weights> Kernel for Product<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        for first in (0..self.activations.len()).step_by(ROWS) {
            let rows = first..(first + ROWS).min(self.activations.len());
            let mut tile = self.out.tiles.start;
            while tile < self.out.tiles.end {
                if L::WIDE && rows.len() > 1 && tile + 1 < self.out.tiles.end {
                    self.tiles::<L, 2>(lanes, tile, rows.clone());
                    tile += 2;
                } else {
                    self.tiles::<L, 1>(lanes, tile, rows.clone());
                    tile += 1;
                }
            }
        }
    }
}

impl<W: Weights> Product<'_, '_, W> {
    /// Multiplies `T` tiles with rows, as many rows at once as fit in registers.
    #[inline(always)]
    fn tiles<L: Lanes, const T: usize>(&mut self, lanes: L, tile: usize, rows: Range<usize>) {
        let mut row = rows.start;
        while row < rows.end {
            let (left, first) = (rows.end - row, row == rows.start);
            row += if T == 2 && left >= 6 && left != 8 {
                self.block::<L, T, 6>(lanes, first, tile, row)
            } else if left >= 4 {
                self.block::<L, T, 4>(lanes, first, tile, row)
            } else if left >= 2 {
                self.block::<L, T, 2>(lanes, first, tile, row)
            } else {
                self.block::<L, T, 1>(lanes, first, tile, row)
            };
        }
    }

    /// Multiplies `T` tiles with `M` rows. `first` is true for the first rows with these tiles, which prefetch weights. Returns
    /// `M`.
    #[inline(always)]
    fn block<L: Lanes, const T: usize, const M: usize>(
        &mut self,
        lanes: L,
        first: bool,
        tile: usize,
        row: usize,
    ) -> usize {
        let weights: [_; T] = std::array::from_fn(|t| W::blocks(self.weights.tile(tile + t)));
        let blocks = weights[0].len();
        let weights = weights.map(|tile| &tile[..blocks]);
        // Slices of equal length, so that the compiler sees that no block is out of bounds.
        let rows: [_; M] = std::array::from_fn(|m| &self.activations.row(row + m)[..blocks]);
        let mut results = [[lanes.splat(0.0); M]; T];
        let (block_bytes, tile_bytes) = (size_of::<W::Block>(), size_of_val(weights[0]));
        for block in 0..blocks {
            let ahead = match first {
                true => ahead::<T>(block * block_bytes, tile_bytes),
                false => 0,
            };
            let weights = weights.map(|tile| &tile[block]);
            W::add(
                lanes,
                ahead,
                weights,
                rows.map(|row| &row[block]),
                &mut results,
            );
        }
        for (t, results) in results.into_iter().enumerate() {
            for (m, result) in results.into_iter().enumerate() {
                self.out.store(lanes, row + m, tile + t, result);
            }
        }
        M
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests;
