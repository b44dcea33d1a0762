//! Layouts of keys and values in the cache.
//!
//! A block of the cache holds [`BLOCK`] positions of one head of one layer. Keys are stored as one row per dimension, so that a
//! lane is a position while scores are computed. Values are stored in groups of 16 dimensions with one row per position, so
//! that a lane is a dimension while values are mixed. The data of a position doesn't depend on the other positions of its
//! block.

use half::f16;
use pool_core::worker::CacheType;

use super::lanes::{LANES, Lanes};
use super::quantize::{Block32, Quantized};
use crate::model::BLOCK;

/// A lane is a position of a block.
const _: () = assert!(BLOCK == LANES);

/// Number of dimensions that share a scale.
const GROUP: usize = Block32::LEN;

/// Returns the bytes of a block of keys for one head.
pub fn key_block_bytes(cache: CacheType, head_dim: usize) -> usize {
    match cache {
        CacheType::F16 => Halves::key_block_bytes(head_dim),
        CacheType::Q8_0 => Bytes::key_block_bytes(head_dim),
    }
}

/// Returns the bytes of a block of values for one head.
pub fn value_block_bytes(cache: CacheType, head_dim: usize) -> usize {
    match cache {
        CacheType::F16 => Halves::value_block_bytes(head_dim),
        CacheType::Q8_0 => Bytes::value_block_bytes(head_dim),
    }
}

/// A storage form of keys and values.
pub trait Layout: Copy + Sync {
    /// Returns the bytes of a block of keys for one head.
    fn key_block_bytes(head_dim: usize) -> usize;
    /// Returns the bytes of a block of values for one head.
    fn value_block_bytes(head_dim: usize) -> usize;
    /// Writes the key of position `slot` of a block.
    fn store_key<L: Lanes>(lanes: L, key: &[f32], block: &mut [u8], slot: usize);
    /// Writes the value of position `slot` of a block.
    fn store_value<L: Lanes>(lanes: L, value: &[f32], block: &mut [u8], slot: usize);
    /// Returns the products of a block's keys with each query.
    fn score<L: Lanes, const ROWS: usize>(
        lanes: L,
        block: &[u8],
        queries: &[[f32; ROWS]],
    ) -> [L::F; ROWS];
    /// Adds the weighted values of a block's first `count` positions to `sums`, for one group of 16 dimensions.
    fn mix<L: Lanes, const ROWS: usize>(
        lanes: L,
        block: &[u8],
        group: usize,
        weights: &[[f32; BLOCK]; ROWS],
        count: usize,
        sums: [L::F; ROWS],
    ) -> [L::F; ROWS];
}

/// Half-precision floats: keys as `[dimension][position]`, values as `[group of 16 dimensions][position][dimension]`.
#[derive(Debug, Clone, Copy)]
pub struct Halves;

/// Returns a block as rows of halves.
fn halves(block: &[u8]) -> &[[u16; LANES]] {
    bytemuck::cast_slice::<_, u16>(block).as_chunks().0
}

/// Returns a block as mutable rows of halves.
fn halves_mut(block: &mut [u8]) -> &mut [[u16; LANES]] {
    bytemuck::cast_slice_mut::<_, u16>(block).as_chunks_mut().0
}

/// Rounds up to 16 floats to half precision; missing ones count as 0.
#[inline(always)]
fn rounded<L: Lanes>(lanes: L, part: &[f32]) -> [u16; LANES] {
    let mut whole = [0.0; LANES];
    whole[..part.len()].copy_from_slice(part);
    let mut halves = [0; LANES];
    lanes.store_f16(&mut halves, lanes.load(&whole));
    halves
}

impl Layout for Halves {
    fn key_block_bytes(head_dim: usize) -> usize {
        head_dim * BLOCK * size_of::<u16>()
    }

    fn value_block_bytes(head_dim: usize) -> usize {
        head_dim.next_multiple_of(LANES) * BLOCK * size_of::<u16>()
    }

    #[inline(always)]
    fn store_key<L: Lanes>(lanes: L, key: &[f32], block: &mut [u8], slot: usize) {
        let rows = halves_mut(block).chunks_mut(LANES);
        for (part, rows) in key.chunks(LANES).zip(rows) {
            for (half, row) in rounded(lanes, part).into_iter().zip(rows) {
                row[slot] = half;
            }
        }
    }

    #[inline(always)]
    fn store_value<L: Lanes>(lanes: L, value: &[f32], block: &mut [u8], slot: usize) {
        let groups = halves_mut(block).as_chunks_mut::<BLOCK>().0;
        for (part, group) in value.chunks(LANES).zip(groups) {
            group[slot] = rounded(lanes, part);
        }
    }

    #[inline(always)]
    fn score<L: Lanes, const ROWS: usize>(
        lanes: L,
        block: &[u8],
        queries: &[[f32; ROWS]],
    ) -> [L::F; ROWS] {
        products(lanes, halves(block), |key| lanes.load_f16(key), queries)
    }

    #[inline(always)]
    fn mix<L: Lanes, const ROWS: usize>(
        lanes: L,
        block: &[u8],
        group: usize,
        weights: &[[f32; BLOCK]; ROWS],
        count: usize,
        sums: [L::F; ROWS],
    ) -> [L::F; ROWS] {
        let values = &halves(block).as_chunks().0[group];
        add_values(
            lanes,
            values,
            |value| lanes.load_f16(value),
            weights,
            count,
            sums,
        )
    }
}

/// Returns the products of keys, one row per dimension, with each query. Even and odd dimensions are summed separately, so that
/// more sums are in flight.
#[inline(always)]
fn products<L: Lanes, T, const ROWS: usize>(
    lanes: L,
    keys: &[T],
    load: impl Fn(&T) -> L::F,
    queries: &[[f32; ROWS]],
) -> [L::F; ROWS] {
    let mut even = [lanes.splat(0.0); ROWS];
    let mut odd = [lanes.splat(0.0); ROWS];
    let (key_pairs, key_rest) = keys.as_chunks::<2>();
    let (query_pairs, query_rest) = queries.as_chunks::<2>();
    for (keys, queries) in key_pairs.iter().zip(query_pairs) {
        let (first, second) = (load(&keys[0]), load(&keys[1]));
        for row in 0..ROWS {
            even[row] = lanes.mul_add(first, lanes.splat(queries[0][row]), even[row]);
            odd[row] = lanes.mul_add(second, lanes.splat(queries[1][row]), odd[row]);
        }
    }
    for (key, query) in key_rest.iter().zip(query_rest) {
        let key = load(key);
        for row in 0..ROWS {
            even[row] = lanes.mul_add(key, lanes.splat(query[row]), even[row]);
        }
    }
    std::array::from_fn(|row| lanes.add(even[row], odd[row]))
}

/// Adds the weighted values of the first `count` positions to `sums`.
#[inline(always)]
fn add_values<L: Lanes, T, const ROWS: usize>(
    lanes: L,
    values: &[T; BLOCK],
    load: impl Fn(&T) -> L::F,
    weights: &[[f32; BLOCK]; ROWS],
    count: usize,
    mut sums: [L::F; ROWS],
) -> [L::F; ROWS] {
    for position in 0..count.min(BLOCK) {
        let value = load(&values[position]);
        for row in 0..ROWS {
            sums[row] = lanes.mul_add(value, lanes.splat(weights[row][position]), sums[row]);
        }
    }
    sums
}

/// Signed bytes with a half-precision scale for each 32 dimensions of a position: the numbers of Q8_0 in GGUF files.
///
/// Keys are stored as `[group of 32 dimensions]`, each with the scales `[position]` and the bytes `[dimension][position]`.
/// Values are stored as `[group of 32 dimensions]`, each with the scales `[position]` and the bytes `[group of 16
/// dimensions][position][dimension]`. The last group may be shorter.
#[derive(Debug, Clone, Copy)]
pub struct Bytes;

/// Bytes that the scales of a group take.
const SCALES: usize = BLOCK * size_of::<u16>();
/// Bytes that a group of keys or values takes.
const GROUP_BYTES: usize = SCALES + GROUP * BLOCK;

/// Splits a group into its scales and rows of bytes.
fn scales_and_rows(group: &[u8]) -> (&[u16; BLOCK], &[[u8; LANES]]) {
    let (scales, rows) = group.split_at(SCALES);
    let (scales, _) = bytemuck::cast_slice::<_, u16>(scales).as_chunks();
    (&scales[0], rows.as_chunks().0)
}

/// Quantises up to 32 floats. Returns the bits of the scale, and the bytes.
#[inline(always)]
fn quantised<L: Lanes>(lanes: L, part: &[f32]) -> (u16, [u8; GROUP]) {
    let mut whole = [[0.0; LANES]; GROUP / LANES];
    for (whole, part) in whole.iter_mut().zip(part.chunks(LANES)) {
        whole[..part.len()].copy_from_slice(part);
    }
    let block = Block32::quantize(lanes, &whole);
    let bytes = block.quads.map(i32::to_le_bytes);
    (
        f16::from_f32(block.scale).to_bits(),
        std::array::from_fn(|i| bytes[i / 4][i % 4]),
    )
}

/// Writes the scale of a position in a group.
fn store_scale(group: &mut [u8], slot: usize, scale: u16) {
    group[2 * slot..2 * slot + 2].copy_from_slice(&scale.to_ne_bytes());
}

impl Layout for Bytes {
    fn key_block_bytes(head_dim: usize) -> usize {
        head_dim.div_ceil(GROUP) * SCALES + head_dim * BLOCK
    }

    fn value_block_bytes(head_dim: usize) -> usize {
        head_dim.div_ceil(GROUP) * SCALES + head_dim.next_multiple_of(LANES) * BLOCK
    }

    #[inline(always)]
    fn store_key<L: Lanes>(lanes: L, key: &[f32], block: &mut [u8], slot: usize) {
        for (part, group) in key.chunks(GROUP).zip(block.chunks_mut(GROUP_BYTES)) {
            let (scale, bytes) = quantised(lanes, part);
            store_scale(group, slot, scale);
            let (rows, _) = group[SCALES..].as_chunks_mut::<BLOCK>();
            for (byte, row) in bytes.into_iter().zip(rows) {
                row[slot] = byte;
            }
        }
    }

    #[inline(always)]
    fn store_value<L: Lanes>(lanes: L, value: &[f32], block: &mut [u8], slot: usize) {
        for (part, group) in value.chunks(GROUP).zip(block.chunks_mut(GROUP_BYTES)) {
            let (scale, bytes) = quantised(lanes, part);
            store_scale(group, slot, scale);
            let (rows, _) = group[SCALES..].as_chunks_mut::<LANES>();
            let (groups, _) = rows.as_chunks_mut::<BLOCK>();
            for (bytes, group) in bytes.as_chunks().0.iter().zip(groups) {
                group[slot] = *bytes;
            }
        }
    }

    #[inline(always)]
    fn score<L: Lanes, const ROWS: usize>(
        lanes: L,
        block: &[u8],
        queries: &[[f32; ROWS]],
    ) -> [L::F; ROWS] {
        let mut sums = [lanes.splat(0.0); ROWS];
        for (group, queries) in block.chunks(GROUP_BYTES).zip(queries.chunks(GROUP)) {
            let (scales, keys) = scales_and_rows(group);
            let load = |key: &_| lanes.to_float(lanes.load_i8(key));
            let products = products(lanes, keys, load, queries);
            let scales = lanes.load_f16(scales);
            for row in 0..ROWS {
                sums[row] = lanes.mul_add(products[row], scales, sums[row]);
            }
        }
        sums
    }

    #[inline(always)]
    fn mix<L: Lanes, const ROWS: usize>(
        lanes: L,
        block: &[u8],
        group: usize,
        weights: &[[f32; BLOCK]; ROWS],
        count: usize,
        sums: [L::F; ROWS],
    ) -> [L::F; ROWS] {
        const HALF: usize = GROUP / LANES;
        let part = &block[group / HALF * GROUP_BYTES..];
        let (scales, rows) = scales_and_rows(&part[..part.len().min(GROUP_BYTES)]);
        let values = &rows.as_chunks::<BLOCK>().0[group % HALF];
        let scales = lanes.load_f16(scales);
        let mut scaled = [[0.0; BLOCK]; ROWS];
        for (scaled, weights) in scaled.iter_mut().zip(weights) {
            lanes.store(scaled, lanes.mul(lanes.load(weights), scales));
        }
        let load = |value: &_| lanes.to_float(lanes.load_i8(value));
        add_values(lanes, values, load, &scaled, count, sums)
    }
}
