//! Attention over a paged cache of keys and values in half precision.
//!
//! A block of the cache holds [`BLOCK`] positions of one head of one layer: keys as `[dimension][position]`, so that a lane is
//! a position while scores are computed, and values as `[group of 16 dimensions][position][dimension]`, so that a lane is a
//! dimension while they are mixed. Scores, sums and mixtures run over positions in ascending order, from a multiple of the
//! block, in fixed lanes; positions that a row doesn't see have weight 0, which changes no sum. So a row's result is
//! independent of the other rows in the batch and of how the prompt was cut.

use super::exp::exp;
use super::lanes::{Kernel, LANES, Lanes};
use crate::engine::model::BLOCK;

/// A lane is a position of a block.
const _: () = assert!(BLOCK == LANES);

/// Elements of a block of keys for one head.
pub const fn key_block_len(head_dim: usize) -> usize {
    head_dim * BLOCK
}

/// Elements of a block of values for one head.
pub const fn value_block_len(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES) * BLOCK
}

/// Writes the key of one position into its block, rounded to half precision.
pub struct StoreKey<'a> {
    /// The key.
    pub key: &'a [f32],
    /// The head's block, `[dimension][position]`.
    pub block: &'a mut [u16],
    /// The position within the block.
    pub slot: usize,
}

impl Kernel for StoreKey<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let rows = self.block.as_chunks_mut::<BLOCK>().0;
        for (part, rows) in self.key.chunks(LANES).zip(rows.chunks_mut(LANES)) {
            for (half, row) in halves(lanes, part).into_iter().zip(rows) {
                row[self.slot] = half;
            }
        }
    }
}

/// Writes the value of one position into its block, rounded to half precision.
pub struct StoreValue<'a> {
    /// The value.
    pub value: &'a [f32],
    /// The head's block, `[group of 16 dimensions][position][dimension]`.
    pub block: &'a mut [u16],
    /// The position within the block.
    pub slot: usize,
}

impl Kernel for StoreValue<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let groups = self
            .block
            .as_chunks_mut::<LANES>()
            .0
            .as_chunks_mut::<BLOCK>()
            .0;
        for (part, group) in self.value.chunks(LANES).zip(groups) {
            group[self.slot] = halves(lanes, part);
        }
    }
}

#[inline(always)]
fn halves<L: Lanes>(lanes: L, part: &[f32]) -> [u16; LANES] {
    let mut whole = [0.0; LANES];
    whole[..part.len()].copy_from_slice(part);
    let mut halves = [0; LANES];
    lanes.store_f16(&mut halves, lanes.load(&whole));
    halves
}

/// The keys and values of one head, layer and sequence in the cache.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// Keys of the layer: for each block of the cache, the blocks of all heads.
    pub keys: &'a [u16],
    /// Values of the layer, likewise.
    pub values: &'a [u16],
    /// Numbers of the sequence's blocks, in the order of positions.
    pub table: &'a [u32],
    /// Number of key and value heads.
    pub heads: usize,
    /// The head.
    pub head: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of latest positions that a row sees, itself included.
    pub window: usize,
}

impl<'a> Seen<'a> {
    #[inline(always)]
    fn key_block(&self, number: u32) -> &'a [[u16; LANES]] {
        let length = key_block_len(self.head_dim);
        let start = (number as usize * self.heads + self.head) * length;
        self.keys[start..start + length].as_chunks().0
    }

    #[inline(always)]
    fn value_block(&self, number: u32) -> &'a [[[u16; LANES]; BLOCK]] {
        let length = value_block_len(self.head_dim);
        let start = (number as usize * self.heads + self.head) * length;
        self.values[start..start + length]
            .as_chunks()
            .0
            .as_chunks()
            .0
    }
}

/// Attention of `ROWS` query rows: softmax(q · kᵀ) · v.
pub struct Attend<'a, const ROWS: usize> {
    /// Keys and values that the rows attend to.
    pub seen: Seen<'a>,
    /// The queries, scaled: one row each of the width of a head.
    pub queries: [&'a [f32]; ROWS],
    /// The position of each row, ascending.
    pub positions: [usize; ROWS],
    /// Room for scores, which grows as needed.
    pub scratch: &'a mut Vec<f32>,
    /// Destination of the results.
    pub out: [&'a mut [f32]; ROWS],
}

/// The lanes' numbers.
const NUMBERS: [i32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// Score of a position that isn't seen, before it is replaced by weight 0.
const UNSEEN: f32 = -1e30;

impl<const ROWS: usize> Kernel for Attend<'_, ROWS> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            seen,
            queries,
            positions,
            scratch,
            out,
        } = self;
        let (first, last) = (positions[0], positions[ROWS - 1]);
        let begin = (first + 1).saturating_sub(seen.window) / BLOCK;
        let end = last / BLOCK + 1;
        let table = &seen.table[begin..end];
        let width = table.len() * BLOCK;
        let needed = ROWS * (width + seen.head_dim);
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (scores, transposed) = scratch[..needed].split_at_mut(ROWS * width);
        for (i, group) in transposed.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
            *group = std::array::from_fn(|row| queries[row][i]);
        }
        let queries = transposed.as_chunks::<ROWS>().0;

        // Scores are kept as [block][row][position].
        let scores = scores.as_chunks_mut::<BLOCK>().0.as_chunks_mut::<ROWS>().0;
        let mut largest = [lanes.splat(UNSEEN); ROWS];
        let mut poison = [lanes.splat(0.0); ROWS];
        let bounds = |row: usize, block: usize| {
            // Positions of the block that the row sees: from the first of these to before the second.
            let start = ((begin + block) * BLOCK) as i32;
            let seen_to = positions[row] as i32 + 1 - start;
            let seen_from = seen_to.saturating_sub(seen.window.min(i32::MAX as usize) as i32);
            (seen_from, seen_to)
        };
        let numbers = lanes.load_int(&NUMBERS);
        for (block, (number, scores)) in table.iter().zip(scores.iter_mut()).enumerate() {
            let sums = score(lanes, seen.key_block(*number), queries);
            for row in 0..ROWS {
                let (from, to) = bounds(row, block);
                let mut score = sums[row];
                let mut sound = score;
                if from > 0 || to < BLOCK as i32 {
                    let unseen = lanes.splat(UNSEEN);
                    score = lanes.select_below(numbers, from, unseen, score);
                    score = lanes.select_below(numbers, to, score, unseen);
                    sound = lanes.select_below(numbers, from, lanes.splat(0.0), sound);
                    sound = lanes.select_below(numbers, to, sound, lanes.splat(0.0));
                }
                poison[row] = lanes.mul_add(sound, lanes.splat(0.0), poison[row]);
                largest[row] = lanes.max(largest[row], score);
                lanes.store(&mut scores[row], score);
            }
        }
        let largest = largest.map(|largest| lanes.splat(lanes.largest(largest)));
        let mut sums = poison;
        for (block, scores) in scores.iter_mut().enumerate() {
            for row in 0..ROWS {
                let mut weight = exp(lanes, lanes.sub(lanes.load(&scores[row]), largest[row]));
                let (from, to) = bounds(row, block);
                if from > 0 || to < BLOCK as i32 {
                    weight = lanes.select_below(numbers, from, lanes.splat(0.0), weight);
                    weight = lanes.select_below(numbers, to, weight, lanes.splat(0.0));
                }
                sums[row] = lanes.add(sums[row], weight);
                lanes.store(&mut scores[row], weight);
            }
        }
        let factors = sums.map(|sum| 1.0 / lanes.sum(sum));

        // Unwritten positions of the last block are skipped: they may hold NaN of an earlier sequence.
        let in_last = last % BLOCK + 1;
        for group in 0..seen.head_dim.div_ceil(LANES) {
            let mut sums = [lanes.splat(0.0); ROWS];
            for (block, (number, weights)) in table.iter().zip(scores.iter()).enumerate() {
                let values = &seen.value_block(*number)[group];
                if block + 1 < table.len() {
                    sums = mix(lanes, values, weights, BLOCK, sums);
                } else {
                    sums = mix(lanes, values, weights, in_last, sums);
                }
            }
            for row in 0..ROWS {
                let mut chunk = [0.0; LANES];
                lanes.store(&mut chunk, lanes.mul(sums[row], lanes.splat(factors[row])));
                let out = &mut out[row][group * LANES..];
                let width = out.len().min(LANES);
                out[..width].copy_from_slice(&chunk[..width]);
            }
        }
    }
}

/// Returns the products of a block's keys with each query. Even and odd dimensions are summed apart, to have more sums under
/// way.
#[inline(always)]
fn score<L: Lanes, const ROWS: usize>(
    lanes: L,
    keys: &[[u16; LANES]],
    queries: &[[f32; ROWS]],
) -> [L::F; ROWS] {
    let mut even = [lanes.splat(0.0); ROWS];
    let mut odd = [lanes.splat(0.0); ROWS];
    let (key_pairs, key_rest) = keys.as_chunks::<2>();
    let (query_pairs, query_rest) = queries.as_chunks::<2>();
    for (keys, queries) in key_pairs.iter().zip(query_pairs) {
        let (first, second) = (lanes.load_f16(&keys[0]), lanes.load_f16(&keys[1]));
        for row in 0..ROWS {
            even[row] = lanes.mul_add(first, lanes.splat(queries[0][row]), even[row]);
            odd[row] = lanes.mul_add(second, lanes.splat(queries[1][row]), odd[row]);
        }
    }
    for (key, query) in key_rest.iter().zip(query_rest) {
        let key = lanes.load_f16(key);
        for row in 0..ROWS {
            even[row] = lanes.mul_add(key, lanes.splat(query[row]), even[row]);
        }
    }
    std::array::from_fn(|row| lanes.add(even[row], odd[row]))
}

/// Adds the weighted values of a block's first `count` positions.
#[inline(always)]
fn mix<L: Lanes, const ROWS: usize>(
    lanes: L,
    values: &[[u16; LANES]; BLOCK],
    weights: &[[f32; BLOCK]; ROWS],
    count: usize,
    mut sums: [L::F; ROWS],
) -> [L::F; ROWS] {
    for position in 0..count.min(BLOCK) {
        let value = lanes.load_f16(&values[position]);
        for row in 0..ROWS {
            sums[row] = lanes.mul_add(value, lanes.splat(weights[row][position]), sums[row]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::backend::cpu::lanes::Tier;

    /// A cache of a few positions, and queries on it.
    struct Case {
        heads: usize,
        head_dim: usize,
        window: usize,
        table: Vec<u32>,
        keys: Vec<u16>,
        values: Vec<u16>,
        key: Vec<Vec<f32>>,
        value: Vec<Vec<f32>>,
        query: Vec<Vec<f32>>,
    }

    struct Random(u64);

    impl Random {
        fn number(&mut self) -> f32 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0) * 2.0
        }
    }

    impl Case {
        /// Fills the second of two heads; all other places of the cache hold NaN.
        fn new(tier: Tier, length: usize, head_dim: usize, window: usize, seed: u64) -> Self {
            let mut random = Random(seed);
            let heads = 2;
            let blocks = length.div_ceil(BLOCK);
            let table: Vec<u32> = (0..blocks as u32).rev().map(|block| block * 2).collect();
            let nan = f16::NAN.to_bits();
            let mut keys = vec![nan; 2 * blocks * heads * key_block_len(head_dim)];
            let mut values = vec![nan; 2 * blocks * heads * value_block_len(head_dim)];
            let mut row = || (0..head_dim).map(|_| random.number()).collect::<Vec<_>>();
            let (key, value): (Vec<_>, Vec<_>) = (0..length).map(|_| (row(), row())).unzip();
            let query = (0..length).map(|_| row()).collect();
            for position in 0..length {
                let place = table[position / BLOCK] as usize * heads + 1;
                let slot = position % BLOCK;
                let length = key_block_len(head_dim);
                let block = &mut keys[place * length..][..length];
                tier.run(StoreKey {
                    key: &key[position],
                    block,
                    slot,
                });
                let length = value_block_len(head_dim);
                let block = &mut values[place * length..][..length];
                tier.run(StoreValue {
                    value: &value[position],
                    block,
                    slot,
                });
            }
            Self {
                heads,
                head_dim,
                window,
                table,
                keys,
                values,
                key,
                value,
                query,
            }
        }

        fn attend<const ROWS: usize>(&self, tier: Tier, first: usize) -> Vec<Vec<f32>> {
            let mut out = vec![vec![0.0; self.head_dim]; ROWS];
            let mut rows = out.iter_mut();
            let attend = Attend::<ROWS> {
                seen: Seen {
                    keys: &self.keys,
                    values: &self.values,
                    table: &self.table,
                    heads: self.heads,
                    head: 1,
                    head_dim: self.head_dim,
                    window: self.window,
                },
                queries: std::array::from_fn(|row| &*self.query[first + row]),
                positions: std::array::from_fn(|row| first + row),
                scratch: &mut Vec::new(),
                out: std::array::from_fn(|_| &mut **rows.next().unwrap()),
            };
            tier.run(attend);
            out
        }

        fn exact(&self, position: usize) -> Vec<f64> {
            let half = |x: f32| f64::from(f16::from_f32(x).to_f32());
            let seen = (position + 1).saturating_sub(self.window)..=position;
            let score = |at: usize| {
                let products = self.query[position].iter().zip(&self.key[at]);
                products.map(|(q, k)| f64::from(*q) * half(*k)).sum::<f64>()
            };
            let largest = seen.clone().map(score).fold(f64::MIN, f64::max);
            let weights: Vec<_> = seen.clone().map(|at| (score(at) - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mixed = |dimension: usize| {
                let values = seen.clone().zip(&weights);
                values
                    .map(|(at, weight)| weight / sum * half(self.value[at][dimension]))
                    .sum()
            };
            (0..self.head_dim).map(mixed).collect()
        }
    }

    #[test]
    fn a_row_has_the_same_bits_on_every_tier_and_in_every_company() {
        for (length, head_dim, window) in [
            (1, 16, 99),
            (5, 8, 99),
            (70, 64, 1000),
            (70, 24, 20),
            (100, 64, 16),
            (40, 128, 1),
        ] {
            let case = Case::new(Tier::Portable, length, head_dim, window, length as u64);
            let alone: Vec<_> = (0..length)
                .map(|at| case.attend::<1>(Tier::Portable, at).remove(0))
                .collect();
            for (at, row) in alone.iter().enumerate() {
                for (found, exact) in row.iter().zip(case.exact(at)) {
                    assert!((f64::from(*found) - exact).abs() < 2e-5, "{found} {exact}");
                }
            }
            for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
                let same = Case::new(tier, length, head_dim, window, length as u64);
                assert_eq!((&same.keys, &same.values), (&case.keys, &case.values));
                for (at, alone) in alone.iter().enumerate() {
                    assert_eq!(case.attend::<1>(tier, at)[0], *alone, "{tier:?}");
                }
                for at in 0..length.saturating_sub(3) {
                    assert_eq!(case.attend::<4>(tier, at), &alone[at..at + 4], "{tier:?}");
                }
                for at in 0..length.saturating_sub(7) {
                    assert_eq!(case.attend::<8>(tier, at), &alone[at..at + 8], "{tier:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut case = Case::new(Tier::Portable, 20, 16, 99, 3);
        case.query[19][3] = f32::NAN;
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
            assert!(case.attend::<1>(tier, 19)[0].iter().all(|x| x.is_nan()));
            assert!(case.attend::<1>(tier, 18)[0].iter().all(|x| x.is_finite()));
        }
    }
}
