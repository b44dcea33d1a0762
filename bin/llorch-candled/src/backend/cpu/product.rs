//! Products of activations with packed weights: `out[m][n] = Σ activations[m][k] · weights[n][k]`.
//!
//! Every element is computed by the same operations in the same order, whatever the tier, however many rows there are, and
//! however tiles are shared out to threads:
//!
//! - floats: four sums, of the columns with k mod 4 = 0, 1, 2 and 3, by fused multiply-adds in the order of k, then
//!   (0 + 1) + (2 + 3);
//! - quantised formats: one sum, to which each block adds its exact integer sum times the product of both scales by one fused
//!   multiply-add, and then, in formats with minima, the minimum times the sum of the activations by another.

use std::marker::PhantomData;
use std::ops::Range;

use crate::backend::cpu::format::Format;
use crate::backend::cpu::lanes::{Kernel, LANES, Lanes, Tier};
use crate::backend::cpu::pack::{HALVES, PackedMatrix, TILE_ROWS, tile_block_bytes};
use crate::backend::cpu::quantize::{Block32, Block256, Quantized, Rows};

/// Rows of activations, as the format of the weights takes them ([`Grouping::of`](crate::backend::cpu::quantize::Grouping::of)).
#[derive(Debug, Clone, Copy)]
pub enum Activations<'a> {
    /// Row-major floats, with as many columns as the weights.
    Floats(&'a [f32]),
    /// Bytes with a scale for each 32.
    By32(&'a Rows<Block32>),
    /// Bytes with a scale for each 256.
    By256(&'a Rows<Block256>),
}

/// A row-major matrix of results, parts of which several threads write.
#[derive(Debug)]
pub struct Output<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a shared `Output` gives access to memory only by `part`, whose callers keep parts apart.
unsafe impl Sync for Output<'_> {}
// SAFETY: it stands for a `&mut [f32]`, which can be sent.
unsafe impl Send for Output<'_> {}

impl<'a> Output<'a> {
    /// Takes `rows` × `columns` of `values`, in which rows begin every `stride`.
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
            "results have no room"
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
        // SAFETY: while the part lives, this is mutably borrowed, and nothing else gives access.
        unsafe { self.part(tiles) }
    }

    /// Returns the columns of some tiles of the weights.
    ///
    /// # Safety
    ///
    /// While the part lives, no other part may have one of the same tiles.
    ///
    /// # Panics
    ///
    /// Panics if there are no such tiles.
    pub unsafe fn part(&self, tiles: Range<usize>) -> Part<'_> {
        assert!(
            tiles.start <= tiles.end && tiles.end <= self.tiles(),
            "no tiles {tiles:?}"
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

/// The columns of some tiles of an [`Output`].
#[derive(Debug)]
pub struct Part<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    tiles: Range<usize>,
    lifetime: PhantomData<&'a mut f32>,
}

// SAFETY: a part is the only access to its elements, as a `&mut` is.
unsafe impl Send for Part<'_> {}

impl Part<'_> {
    /// Writes a tile's results for a row.
    #[inline(always)]
    fn store<L: Lanes>(&mut self, lanes: L, row: usize, tile: usize, results: L::F) {
        assert!(
            row < self.rows && self.tiles.contains(&tile),
            "outside of the part"
        );
        let column = tile * TILE_ROWS;
        let len = (self.columns - column).min(TILE_ROWS);
        // SAFETY: `Output::new` saw that all elements of these rows and columns are within its slice, and `Output::part`'s
        // callers that only this part has this tile's.
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

/// Computes the products of all rows of activations with the weights of the part's tiles.
///
/// # Panics
///
/// Panics if the activations are not of the kind the weights take, or shapes don't agree.
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
                format => panic!("{format:?} takes quantised activations"),
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
                format => panic!("{format:?} takes other activations"),
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
                format => panic!("{format:?} takes other activations"),
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

/// Returns the `N` bytes at `at`. Both are known when a kernel is compiled, and `bytes` is an array: no check remains.
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

/// How the values of a chunk of 32 columns are stored.
trait Chunk {
    /// Bytes of a chunk.
    const BYTES: usize;
    /// Whether the values have a sign.
    const SIGNED: bool;
    /// Returns columns 8 · `P` to 8 · `P` + 3 and the four after them.
    fn pair<L: Lanes, const P: usize>(lanes: L, chunk: &[u8]) -> [L::B; 2];
}

/// 4-bit values.
struct Nibbles;
/// 5-bit values.
struct Fives;
/// 6-bit values.
struct Sixes;
/// 8-bit values with a sign.
struct Bytes;

impl Chunk for Nibbles {
    const BYTES: usize = 256;
    const SIGNED: bool = false;

    #[inline(always)]
    fn pair<L: Lanes, const P: usize>(lanes: L, chunk: &[u8]) -> [L::B; 2] {
        let both = lanes.load_bytes(at(chunk, 64 * P));
        let low = lanes.splat_byte(15);
        [
            lanes.and_bytes(both, low),
            lanes.and_bytes(lanes.shift_right_pairs::<4>(both), low),
        ]
    }
}

impl Chunk for Fives {
    const BYTES: usize = 320;
    const SIGNED: bool = false;

    #[inline(always)]
    fn pair<L: Lanes, const P: usize>(lanes: L, chunk: &[u8]) -> [L::B; 2] {
        let [first, second] = Nibbles::pair::<L, P>(lanes, chunk);
        // Bit g belongs to group g of four columns. It moves to bit 4.
        let plane = lanes.load_bytes(at(chunk, 256));
        let (even, odd) = match P {
            0 => (
                lanes.shift_left_pairs::<4>(plane),
                lanes.shift_left_pairs::<3>(plane),
            ),
            1 => (
                lanes.shift_left_pairs::<2>(plane),
                lanes.shift_left_pairs::<1>(plane),
            ),
            2 => (plane, lanes.shift_right_pairs::<1>(plane)),
            _ => (
                lanes.shift_right_pairs::<2>(plane),
                lanes.shift_right_pairs::<3>(plane),
            ),
        };
        let bit = lanes.splat_byte(16);
        [
            lanes.or_bytes(first, lanes.and_bytes(even, bit)),
            lanes.or_bytes(second, lanes.and_bytes(odd, bit)),
        ]
    }
}

impl Chunk for Sixes {
    const BYTES: usize = 384;
    const SIGNED: bool = false;

    #[inline(always)]
    fn pair<L: Lanes, const P: usize>(lanes: L, chunk: &[u8]) -> [L::B; 2] {
        let [first, second] = Nibbles::pair::<L, P>(lanes, chunk);
        // Bits 2i and 2i + 1 belong to group i of this half of the chunk. They move to bits 4 and 5.
        let plane = lanes.load_bytes(at(chunk, 256 + 64 * (P / 2)));
        let (even, odd) = match P % 2 {
            0 => (
                lanes.shift_left_pairs::<4>(plane),
                lanes.shift_left_pairs::<2>(plane),
            ),
            _ => (plane, lanes.shift_right_pairs::<2>(plane)),
        };
        let bits = lanes.splat_byte(0x30);
        [
            lanes.or_bytes(first, lanes.and_bytes(even, bits)),
            lanes.or_bytes(second, lanes.and_bytes(odd, bits)),
        ]
    }
}

impl Chunk for Bytes {
    const BYTES: usize = 512;
    const SIGNED: bool = true;

    #[inline(always)]
    fn pair<L: Lanes, const P: usize>(lanes: L, chunk: &[u8]) -> [L::B; 2] {
        [
            lanes.load_bytes(at(chunk, 128 * P)),
            lanes.load_bytes(at(chunk, 128 * P + 64)),
        ]
    }
}

// Closures don't have the instructions of the function they are in, and what they call might not be inlined: so loops, not
// `map`, wherever lanes are computed with.

/// Integers of `T` tiles and `M` rows.
type Sums<L, const T: usize, const M: usize> = [[<L as Lanes>::I; M]; T];

/// Results of `T` tiles and `M` rows.
type Results<L, const T: usize, const M: usize> = [[<L as Lanes>::F; M]; T];

/// Adds the products of 8 columns. One broadcast of activations serves all tiles, one decoding of weights all rows.
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

/// Distance in bytes at which weights are prefetched ahead of products. Tiles follow each other, so most of what is asked for at the end
/// of a tile is needed too.
const AHEAD: usize = 4096;

/// Asks for what lies `ahead` bytes of some weights; for nothing if that is 0. The first of the products with a tile wait for
/// memory, and what the processor fetches by itself is less than what memory could give. What is asked for at a time is little,
/// so that the requests find room.
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

/// Returns how far ahead to ask for weights at `start` bytes of `T` tiles of this length, of which a first product reads
/// several side by side: the end of each is followed by a tile of the next `T`.
#[inline(always)]
fn ahead<const T: usize>(start: usize, tile_bytes: usize) -> usize {
    if start + AHEAD < tile_bytes {
        AHEAD
    } else {
        AHEAD + (T - 1) * tile_bytes
    }
}

/// Weights of a quantised format.
trait Weights {
    /// Blocks of activations that go with its blocks.
    type Activations: Quantized;
    /// A block of a tile.
    type Block;

    /// Returns the blocks of a tile.
    fn blocks(tile: &[u8]) -> &[Self::Block];
    /// Adds the products of a block of each of `T` tiles with the same block of `M` rows. Asks for weights `ahead` bytes of them.
    fn add<L: Lanes, const T: usize, const M: usize>(
        lanes: L,
        ahead: usize,
        weights: [&Self::Block; T],
        rows: [&Self::Activations; M],
        results: &mut Results<L, T, M>,
    );
}

/// Blocks of `BYTES` for 32 columns. `OFFSET` is subtracted from the values; `MINIMUM` says whether there is one.
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
        // No integer overflows: 32 products of a byte raised to at most 255 with one of at most 127, and the start of at most
        // 128 times the sum of 32 such, are below 2²¹.
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

/// Blocks of `BYTES` for 256 columns, with integer scales for each `GROUP` (16 or 32). `OFFSET` is subtracted from the values
/// and scales have a sign; or it is 0, and there are minima.
struct Weights256<C, const BYTES: usize, const GROUP: usize, const OFFSET: i32>(PhantomData<C>);

impl<C: Chunk, const BYTES: usize, const GROUP: usize, const OFFSET: i32>
    Weights256<C, BYTES, GROUP, OFFSET>
{
    /// Where the integer scales are.
    const SCALES: usize = 8 * C::BYTES;
    /// Where the integer minima are.
    const MINIMA: usize = Self::SCALES + 256 / GROUP * LANES;
    /// Where the scale is.
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

    /// Returns what the sums of a group begin with.
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

    /// Adds a group's sums times its scales.
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

    /// Returns the sums of the integer minima times the sums of their groups' activations.
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
        // No integer overflows. A group's sum is within 16 · 127 · (63 + 32) < 2¹⁸ (6 bits with an offset) or
        // 32 · 127 · 31 < 2¹⁷ (5 bits); times a scale of at most 128 for 16 groups, or 63 for 8, that is below 2²⁹. Minima
        // are at most 63, and 256 activations sum up to at most 256 · 127: below 2²².
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

/// Rows that are multiplied with all tiles before the next. Their activations stay in the second-level cache, and the pages
/// they and their results lie in within the reach of the first-level address cache.
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
    /// Multiplies `T` tiles with rows, as many at once as registers hold.
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

    /// Multiplies `T` tiles with `M` rows, the `first` of them or others. Returns `M`.
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
        // Slices of one length: the compiler sees that no block is outside of them.
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

/// Loads the weights of a column from `N` bytes.
trait FloatWeight<const N: usize> {
    fn load<L: Lanes>(lanes: L, bytes: &[u8; N]) -> L::F;
}

/// 32-bit floats.
struct Singles;
/// Half-precision floats.
struct Halves;
/// Upper halves of 32-bit floats.
struct Brains;

impl FloatWeight<64> for Singles {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8; 64]) -> L::F {
        lanes.bytes_as_floats(lanes.load_bytes(bytes))
    }
}

impl FloatWeight<HALVES> for Halves {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8; HALVES]) -> L::F {
        load_halves(lanes, bytes)
    }
}

impl FloatWeight<HALVES> for Brains {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8; HALVES]) -> L::F {
        lanes.load_bf16(&sixteen_bits(bytes))
    }
}

struct FloatProduct<'a, 'o, W, const N: usize> {
    weights: &'a PackedMatrix,
    values: &'a [f32],
    out: &'a mut Part<'o>,
    weight: PhantomData<W>,
}

impl<W: FloatWeight<N>, const N: usize> Kernel for FloatProduct<'_, '_, W, N> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        for first in (0..self.out.rows).step_by(ROWS) {
            let rows = first..(first + ROWS).min(self.out.rows);
            for tile in self.out.tiles.clone() {
                let mut row = rows.start;
                while row < rows.end {
                    let left = rows.end - row;
                    let first = row == rows.start;
                    row += if L::WIDE && left >= 6 {
                        self.block::<L, 6>(lanes, first, tile, row)
                    } else if left >= 2 {
                        self.block::<L, 2>(lanes, first, tile, row)
                    } else {
                        self.block::<L, 1>(lanes, first, tile, row)
                    };
                }
            }
        }
    }
}

impl<'a, 'o, W: FloatWeight<N>, const N: usize> FloatProduct<'a, 'o, W, N> {
    fn new(weights: &'a PackedMatrix, values: &'a [f32], out: &'a mut Part<'o>) -> Self {
        Self {
            weights,
            values,
            out,
            weight: PhantomData,
        }
    }

    /// Multiplies a tile with `M` rows, the `first` of it or others. Returns `M`.
    #[inline(always)]
    fn block<L: Lanes, const M: usize>(
        &mut self,
        lanes: L,
        first: bool,
        tile: usize,
        row: usize,
    ) -> usize {
        let columns = self.weights.columns();
        let (weights, _) = self.weights.tile(tile).as_chunks::<N>();
        let (fours, rest) = weights.as_chunks::<4>();
        let rows: [_; M] = std::array::from_fn(|m| {
            let (values, rest) = self.values[(row + m) * columns..][..columns].as_chunks::<4>();
            (&values[..fours.len()], rest)
        });
        let mut sums = [[lanes.splat(0.0); 4]; M];
        for (i, weights) in fours.iter().enumerate() {
            prefetch(
                lanes,
                if first { AHEAD } else { 0 },
                [weights.as_flattened()],
            );
            for (j, weight) in weights.iter().enumerate() {
                let weight = W::load(lanes, weight);
                for m in 0..M {
                    sums[m][j] = lanes.mul_add(weight, lanes.splat(rows[m].0[i][j]), sums[m][j]);
                }
            }
        }
        for (j, weight) in rest.iter().enumerate() {
            let weight = W::load(lanes, weight);
            for m in 0..M {
                sums[m][j] = lanes.mul_add(weight, lanes.splat(rows[m].1[j]), sums[m][j]);
            }
        }
        for (m, [a, b, c, d]) in sums.into_iter().enumerate() {
            let result = lanes.add(lanes.add(a, b), lanes.add(c, d));
            self.out.store(lanes, row + m, tile, result);
        }
        M
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::format::{Block, dequantize};
    use crate::backend::cpu::quantize::Grouping;
    use crate::backend::cpu::testing::{Random, fill_extreme, fill_moderate};

    /// Owned activations of the kind a format takes, quantised on the portable tier.
    enum Owned {
        Floats(Vec<f32>),
        By32(Rows<Block32>),
        By256(Rows<Block256>),
    }

    impl Owned {
        fn new(format: Format, values: &[f32], columns: usize) -> Self {
            match Grouping::of(format) {
                Grouping::Floats => Self::Floats(values.to_vec()),
                Grouping::By32 => {
                    let mut rows = Rows::new();
                    rows.quantize(Tier::Portable, values, columns);
                    Self::By32(rows)
                }
                Grouping::By256 => {
                    let mut rows = Rows::new();
                    rows.quantize(Tier::Portable, values, columns);
                    Self::By256(rows)
                }
            }
        }

        fn view(&self) -> Activations<'_> {
            match self {
                Self::Floats(values) => Activations::Floats(values),
                Self::By32(rows) => Activations::By32(rows),
                Self::By256(rows) => Activations::By256(rows),
            }
        }

        /// Returns the numbers that a row stands for.
        fn row(&self, row: usize, columns: usize) -> Vec<f64> {
            let values = |quads: &[i32], scale: f32| -> Vec<f64> {
                let bytes = quads.iter().flat_map(|quad| quad.to_le_bytes());
                bytes
                    .map(|byte| f64::from(byte.cast_signed()) * f64::from(scale))
                    .collect()
            };
            match self {
                Self::Floats(all) => all[row * columns..][..columns]
                    .iter()
                    .copied()
                    .map(f64::from)
                    .collect(),
                Self::By32(rows) => rows
                    .row(row)
                    .iter()
                    .flat_map(|b| values(&b.quads, b.scale))
                    .collect(),
                Self::By256(rows) => {
                    let block = |b: &Block256| values(b.quads.as_flattened(), b.scale);
                    rows.row(row).iter().flat_map(block).collect()
                }
            }
        }
    }

    fn product(tier: Tier, weights: &PackedMatrix, activations: &Owned, rows: usize) -> Vec<f32> {
        let columns = weights.rows();
        let mut values = vec![0.0; rows * columns];
        let mut out = Output::new(&mut values, rows, columns, columns);
        multiply(tier, weights, activations.view(), &mut out.whole());
        values
    }

    fn tiers() -> impl Iterator<Item = Tier> {
        Tier::ALL.into_iter().filter(|tier| tier.is_available())
    }

    /// Returns the magnitudes of what a product adds up for a row of weights: of scale and minimum apart.
    fn magnitudes(format: Format, bytes: &[u8]) -> Vec<f64> {
        let half = |bits| f64::from(half::f16::from_bits(bits).to_f32()).abs();
        let mut all = Vec::new();
        for bytes in bytes.chunks_exact(format.block_bytes()) {
            let block = Block::read(format, bytes);
            for column in 0..format.block_len() {
                let quant = match format {
                    Format::Q8_0 => i32::from(block.quants[column].cast_signed()),
                    _ => i32::from(block.quants[column]) - format.offset(),
                };
                let scaled = half(block.scale) * f64::from(block.scales[column / 16]);
                let minimum = half(block.minimum) * f64::from(block.minima[column / 16]);
                all.push((scaled * f64::from(quant)).abs() + minimum);
            }
        }
        all
    }

    /// Every sum of n terms that are added one by one is within n half-units of the last place of the sum of magnitudes.
    #[test]
    fn products_agree_with_exact_ones() {
        let mut random = Random::new(1);
        for format in Format::ALL {
            let unit = if format.block_len() == 1 {
                36
            } else {
                format.block_len()
            };
            for (rows, n, blocks) in [(1, 1, 1), (3, 15, 2), (2, 16, 3), (13, 33, 5), (5, 65, 9)] {
                let columns = blocks * unit;
                let mut source = vec![0; n * format.row_bytes(columns)];
                fill_moderate(format, &mut source, &mut random);
                let values: Vec<f32> = (0..rows * columns).map(|_| random.float()).collect();
                let activations = Owned::new(format, &values, columns);
                let weights = PackedMatrix::pack(format, n, columns, &source);
                let out = product(Tier::best(), &weights, &activations, rows);
                for row in 0..rows {
                    let activations = activations.row(row, columns);
                    for column in 0..n {
                        let bytes = &source[column * format.row_bytes(columns)..]
                            [..format.row_bytes(columns)];
                        let mut weights = vec![0.0; columns];
                        dequantize(format, bytes, &mut weights);
                        let magnitudes = match Grouping::of(format) {
                            Grouping::Floats => {
                                weights.iter().map(|&w| f64::from(w).abs()).collect()
                            }
                            _ => magnitudes(format, bytes),
                        };
                        let terms = || activations.iter().zip(&weights);
                        let exact: f64 = terms().map(|(a, &w)| a * f64::from(w)).sum();
                        let sum: f64 = activations
                            .iter()
                            .zip(magnitudes)
                            .map(|(a, m)| a.abs() * m)
                            .sum();
                        // Up to two additions for a block (or one for every fourth column, and two more), and in each term
                        // the rounding of both scales' product, the integer sum, the sum of activations and the weight.
                        let roundings = if unit == 36 {
                            columns / 4 + 2
                        } else {
                            2 * blocks + 4
                        };
                        let tolerance = sum * roundings as f64 * f64::from(f32::EPSILON) / 2.0;
                        let result = f64::from(out[row * n + column]);
                        assert!(
                            (result - exact).abs() <= tolerance,
                            "{format:?} {rows}×{n}×{columns}: {result} instead of {exact} ± {tolerance}"
                        );
                    }
                }
            }
        }
    }

    fn assert_same(a: &[f32], b: &[f32], what: impl std::fmt::Debug) {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same, "{what:?}: element {i} is {a} and {b}");
        }
    }

    /// Compares all tiers and counts of rows with rows computed one by one on the portable tier.
    fn assert_tiers_agree(format: Format, fill: fn(Format, &mut [u8], &mut Random), most: usize) {
        let mut random = Random::new(2);
        let (n, columns) = (50, format.block_len().max(18) * 2);
        let mut source = vec![0; n * format.row_bytes(columns)];
        fill(format, &mut source, &mut random);
        let weights = PackedMatrix::pack(format, n, columns, &source);
        let values: Vec<f32> = (0..most * columns).map(|_| random.float()).collect();
        let mut expected = Vec::new();
        for row in values.chunks_exact(columns) {
            expected.extend(product(
                Tier::Portable,
                &weights,
                &Owned::new(format, row, columns),
                1,
            ));
        }
        for tier in tiers() {
            for rows in 1..=most {
                let activations = Owned::new(format, &values[..rows * columns], columns);
                let out = product(tier, &weights, &activations, rows);
                assert_same(&out, &expected, (format, tier, rows));
            }
        }
    }

    #[test]
    fn tiers_and_row_counts_agree() {
        for format in Format::ALL {
            assert_tiers_agree(format, fill_moderate, if cfg!(miri) { 2 } else { 30 });
        }
    }

    #[test]
    fn tiers_agree_on_arbitrary_bytes() {
        for format in Format::ALL {
            assert_tiers_agree(format, fill_extreme, if cfg!(miri) { 2 } else { 8 });
        }
    }

    /// Weights and activations whose integer sums are the largest.
    #[test]
    fn integers_do_not_overflow() {
        for format in Format::ALL
            .into_iter()
            .filter(|format| format.block_len() > 1)
        {
            // 0xFF: the largest values without a sign, scales of −1 or 63; 0x7F, 0x80: the largest 8-bit values and scales.
            for byte in [0xFF, 0x7F, 0x80, 0x00] {
                let mut source = vec![byte; 16 * format.block_bytes()];
                let mut random = Random::new(3);
                if format == Format::Q6_K && byte != 0xFF {
                    // Values of 63 or 0 with scales of 127 or −128.
                    let quants = if byte == 0x7F { 0xFF } else { 0 };
                    for block in source.chunks_exact_mut(210) {
                        block[..192].fill(quants);
                    }
                }
                crate::backend::cpu::testing::fill_scales(format, &mut source, &mut random);
                let columns = format.block_len();
                let weights = PackedMatrix::pack(format, 16, columns, &source);
                for value in [1.0, -1.0] {
                    let activations = Owned::new(format, &vec![value; 2 * columns], columns);
                    let numbers = activations.row(0, columns);
                    let expected: Vec<f64> = (0..16)
                        .map(|row| {
                            let bytes = &source[row * format.block_bytes()..];
                            let mut weights = vec![0.0; columns];
                            dequantize(format, &bytes[..format.block_bytes()], &mut weights);
                            weights
                                .iter()
                                .zip(&numbers)
                                .map(|(&w, a)| f64::from(w) * a)
                                .sum()
                        })
                        .collect();
                    for tier in tiers() {
                        for (i, &x) in product(tier, &weights, &activations, 2).iter().enumerate() {
                            let expected = expected[i % 16];
                            let error = (f64::from(x) - expected).abs();
                            let bound = 1e-6
                                * magnitudes(
                                    format,
                                    &source[i % 16 * format.block_bytes()..]
                                        [..format.block_bytes()],
                                )
                                .iter()
                                .sum::<f64>();
                            assert!(
                                error <= bound,
                                "{format:?} {tier:?} {byte:x}: {x}, not {expected}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut random = Random::new(4);
        for format in Format::ALL {
            let columns = format.block_len().max(16) * 2;
            let mut source = vec![0; 20 * format.row_bytes(columns)];
            fill_moderate(format, &mut source, &mut random);
            let weights = PackedMatrix::pack(format, 20, columns, &source);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values: Vec<f32> = (0..3 * columns).map(|_| random.float()).collect();
                values[columns + 5] = bad;
                let activations = Owned::new(format, &values, columns);
                for tier in tiers() {
                    let out = product(tier, &weights, &activations, 3);
                    let finite = |row: usize| out[20 * row..][..20].iter().all(|x| x.is_finite());
                    assert!(finite(0) && finite(2), "{format:?} {tier:?}");
                    assert!(
                        !out[20..40].iter().any(|x| x.is_finite()),
                        "{format:?} {tier:?}"
                    );
                    if format.block_len() > 1 {
                        assert!(
                            out[20..40].iter().all(|x| x.is_nan()),
                            "{format:?} {tier:?}"
                        );
                    }
                }
            }
        }
    }

    /// Parts and tiles that several threads pack and multiply give what one does, also where rows are apart.
    #[test]
    fn threads_share_tiles() {
        let mut random = Random::new(5);
        let (format, n, columns, rows, stride) = (Format::Q5_0, 16 * 7 + 3, 96, 7, 128);
        let mut source = vec![0; n * format.row_bytes(columns)];
        fill_moderate(format, &mut source, &mut random);
        let values: Vec<f32> = (0..rows * columns).map(|_| random.float()).collect();
        let activations = Owned::new(format, &values, columns);
        let mut weights = PackedMatrix::new(format, n, columns);
        std::thread::scope(|scope| {
            for part in weights.parts_mut(3) {
                let source = &source;
                scope.spawn(move || part.pack(source));
            }
        });
        let expected = product(
            Tier::best(),
            &PackedMatrix::pack(format, n, columns, &source),
            &activations,
            rows,
        );
        let mut results = vec![7.0; (rows - 1) * stride + n];
        let out = Output::new(&mut results, rows, n, stride);
        std::thread::scope(|scope| {
            for tiles in [0..3, 3..4, 4..4, 4..8] {
                let (weights, out, activations) = (&weights, &out, activations.view());
                scope.spawn(move || {
                    // SAFETY: each thread has tiles of its own.
                    let mut part = unsafe { out.part(tiles) };
                    multiply(Tier::best(), weights, activations, &mut part);
                });
            }
        });
        for (row, expected) in results.chunks(stride).zip(expected.chunks_exact(n)) {
            assert_same(&row[..n], expected, "threads");
            assert!(row[n..].iter().all(|&x| x == 7.0), "written between rows");
        }
    }
}
