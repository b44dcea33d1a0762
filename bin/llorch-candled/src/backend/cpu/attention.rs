//! Attention over a paged cache of keys and values.
//!
//! Scores, sums and mixtures run over positions in ascending order, from a multiple of the block size, in fixed lanes.
//! Positions that a row doesn't see have weight 0, which changes no sum. So a row's result depends neither on the other rows in
//! the batch nor on how the prompt was split.

use super::cache::Layout;
use super::exp::exp;
use super::lanes::{Kernel, LANES, Lanes};
use crate::model::BLOCK;

/// Kernel that writes the key and value of one position and head into their blocks.
pub struct Store<'a, C> {
    /// Storage form of the blocks.
    pub layout: C,
    /// Key of the position, as wide as a head.
    pub key: &'a [f32],
    /// Value of the position, as wide as a head.
    pub value: &'a [f32],
    /// Block of the head's keys.
    pub keys: &'a mut [u8],
    /// Block of the head's values.
    pub values: &'a mut [u8],
    /// Position within the block.
    pub slot: usize,
}

impl<C: Layout> Kernel for Store<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        C::store_key(lanes, self.key, self.keys, self.slot);
        C::store_value(lanes, self.value, self.values, self.slot);
    }
}

/// The keys and values of one head, layer and sequence in the cache.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// Keys of the layer: for each block of the cache, the blocks of all heads.
    pub keys: &'a [u8],
    /// Values of the layer, in the order of the keys.
    pub values: &'a [u8],
    /// Numbers of the sequence's blocks, in the order of positions.
    pub table: &'a [u32],
    /// Number of key and value heads.
    pub heads: usize,
    /// Index of the head among the key and value heads.
    pub head: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of latest positions that a row sees, including itself.
    pub window: usize,
}

impl<'a> Seen<'a> {
    /// Returns the head's part of a block. Each head has `length` bytes of a block.
    #[inline(always)]
    fn block(&self, all: &'a [u8], number: u32, length: usize) -> &'a [u8] {
        let start = (number as usize * self.heads + self.head) * length;
        &all[start..start + length]
    }
}

/// Kernel that computes the attention of `ROWS` query rows: softmax(q · kᵀ) · v.
pub struct Attend<'a, C, const ROWS: usize> {
    /// Storage form of the cache.
    pub layout: C,
    /// Keys and values that the rows attend to.
    pub seen: Seen<'a>,
    /// Scaled queries, each as wide as a head.
    pub queries: [&'a [f32]; ROWS],
    /// Positions of the rows, ascending.
    pub positions: [usize; ROWS],
    /// Scratch memory for scores, which grows as needed.
    pub scratch: &'a mut Vec<f32>,
    /// Destination of the results.
    pub out: [&'a mut [f32]; ROWS],
}

/// Numbers of the lanes.
const NUMBERS: [i32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// Score of an unseen position, before it is replaced by weight 0.
const UNSEEN: f32 = -1e30;

impl<C: Layout, const ROWS: usize> Kernel for Attend<'_, C, ROWS> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            seen,
            queries,
            positions,
            scratch,
            out,
            ..
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

        // Scores are stored as [block][row][position].
        let scores = scores.as_chunks_mut::<BLOCK>().0.as_chunks_mut::<ROWS>().0;
        let mut largest = [lanes.splat(UNSEEN); ROWS];
        let mut poison = [lanes.splat(0.0); ROWS];
        let bounds = |row: usize, block: usize| {
            // Range of the block's positions that the row sees: from the first number to before the second.
            let start = ((begin + block) * BLOCK) as i32;
            let seen_to = positions[row] as i32 + 1 - start;
            let seen_from = seen_to.saturating_sub(seen.window.min(i32::MAX as usize) as i32);
            (seen_from, seen_to)
        };
        let numbers = lanes.load_int(&NUMBERS);
        let key_bytes = C::key_block_bytes(seen.head_dim);
        for (block, (number, scores)) in table.iter().zip(scores.iter_mut()).enumerate() {
            let sums = C::score(lanes, seen.block(seen.keys, *number, key_bytes), queries);
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
                // `exp` would hide a seen score that is NaN or infinite. Its product with 0 is NaN, and so is the sum of weights.
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

        // Skip unwritten positions of the last block: they may contain NaN from an earlier sequence.
        let in_last = last % BLOCK + 1;
        let value_bytes = C::value_block_bytes(seen.head_dim);
        for group in 0..seen.head_dim.div_ceil(LANES) {
            let mut sums = [lanes.splat(0.0); ROWS];
            for (block, (number, weights)) in table.iter().zip(scores.iter()).enumerate() {
                let count = if block + 1 < table.len() {
                    BLOCK
                } else {
                    in_last
                };
                let values = seen.block(seen.values, *number, value_bytes);
                sums = C::mix(lanes, values, group, weights, count, sums);
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

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::backend::cpu::cache::{Bytes, Halves};
    use crate::backend::cpu::lanes::Tier;
    use crate::backend::cpu::pages::Pages;
    use crate::backend::cpu::testing::Random;

    /// A cache of a few positions, and queries to it.
    struct Case<C> {
        layout: C,
        heads: usize,
        head_dim: usize,
        window: usize,
        table: Vec<u32>,
        keys: Pages,
        values: Pages,
        key: Vec<Vec<f32>>,
        value: Vec<Vec<f32>>,
        query: Vec<Vec<f32>>,
    }

    /// Returns memory filled with bytes that make every float and every scale NaN.
    fn not_numbers(length: usize) -> Pages {
        let mut pages = Pages::new(length).expect("memory");
        pages.fill(0xFF);
        pages
    }

    impl<C: Layout> Case<C> {
        /// Fills the second of two heads; all other places of the cache are NaN.
        fn new(
            layout: C,
            tier: Tier,
            (length, head_dim, window): (usize, usize, usize),
            seed: u64,
        ) -> Self {
            let mut random = Random::new(seed);
            let heads = 2;
            let blocks = length.div_ceil(BLOCK);
            let table: Vec<u32> = (0..blocks as u32).rev().map(|block| block * 2).collect();
            let (key_bytes, value_bytes) =
                (C::key_block_bytes(head_dim), C::value_block_bytes(head_dim));
            let mut keys = not_numbers(2 * blocks * heads * key_bytes);
            let mut values = not_numbers(2 * blocks * heads * value_bytes);
            let mut row = || {
                (0..head_dim)
                    .map(|_| 2.0 * random.float())
                    .collect::<Vec<_>>()
            };
            let (key, value): (Vec<_>, Vec<_>) = (0..length).map(|_| (row(), row())).unzip();
            let query = (0..length).map(|_| row()).collect();
            for position in 0..length {
                let place = table[position / BLOCK] as usize * heads + 1;
                tier.run(Store {
                    layout,
                    key: &key[position],
                    value: &value[position],
                    keys: &mut keys[place * key_bytes..][..key_bytes],
                    values: &mut values[place * value_bytes..][..value_bytes],
                    slot: position % BLOCK,
                });
            }
            Self {
                layout,
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
            let attend = Attend::<C, ROWS> {
                layout: self.layout,
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

        /// Attends in double precision to keys and values as `stored` returns them.
        fn exact(&self, stored: impl Fn(&[f32]) -> Vec<f64>, position: usize) -> Vec<f64> {
            let seen = (position + 1).saturating_sub(self.window)..=position;
            let score = |at: usize| {
                let key = stored(&self.key[at]);
                let products = self.query[position].iter().zip(key);
                products.map(|(q, k)| f64::from(*q) * k).sum::<f64>()
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; self.head_dim];
            for (at, weight) in seen.zip(weights) {
                for (mixed, value) in mixed.iter_mut().zip(stored(&self.value[at])) {
                    *mixed += weight / sum * value;
                }
            }
            mixed
        }
    }

    fn as_halves(row: &[f32]) -> Vec<f64> {
        let half = |x: &f32| f16::from_f32(*x).to_f64();
        row.iter().map(half).collect()
    }

    /// Rounds a row as the format Q8_0 does.
    fn as_bytes(row: &[f32]) -> Vec<f64> {
        let group = |group: &[f32]| {
            let largest = group.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
            let scale = f16::from_f32(largest / 127.0).to_f64();
            let byte = |x: &f32| f64::from((x * (127.0 / largest)).round_ties_even());
            group.iter().map(|x| byte(x) * scale).collect::<Vec<_>>()
        };
        row.chunks(32).flat_map(group).collect()
    }

    const SHAPES: [(usize, usize, usize); 7] = [
        (1, 16, 99),
        (5, 8, 99),
        (70, 64, 1000),
        (70, 24, 20),
        (50, 80, 99),
        (100, 64, 16),
        (40, 128, 1),
    ];

    #[test]
    fn a_row_has_the_same_bits_on_every_tier_and_in_every_batch() {
        for shape in SHAPES {
            check(Halves, shape, as_halves);
            check(Bytes, shape, as_bytes);
        }
    }

    fn check<C: Layout>(
        layout: C,
        shape: (usize, usize, usize),
        stored: impl Fn(&[f32]) -> Vec<f64> + Copy,
    ) {
        let length = shape.0;
        let case = Case::new(layout, Tier::Portable, shape, length as u64);
        let alone: Vec<_> = (0..length)
            .map(|at| case.attend::<1>(Tier::Portable, at).remove(0))
            .collect();
        for (at, row) in alone.iter().enumerate() {
            for (found, exact) in row.iter().zip(case.exact(stored, at)) {
                assert!((f64::from(*found) - exact).abs() < 2e-5, "{found} {exact}");
            }
        }
        for tier in Tier::available() {
            let same = Case::new(layout, tier, shape, length as u64);
            assert_eq!(
                (&*same.keys, &*same.values),
                (&*case.keys, &*case.values),
                "{tier:?}"
            );
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

    #[test]
    fn what_is_no_number_stays_none() {
        check_not_numbers(Halves);
        check_not_numbers(Bytes);
    }

    fn check_not_numbers<C: Layout>(layout: C) {
        let mut case = Case::new(layout, Tier::Portable, (20, 16, 99), 3);
        case.query[19][3] = f32::NAN;
        for tier in Tier::available() {
            assert!(case.attend::<1>(tier, 19)[0].iter().all(|x| x.is_nan()));
            assert!(case.attend::<1>(tier, 18)[0].iter().all(|x| x.is_finite()));
        }
        let bytes = C::key_block_bytes(16);
        let place = case.table[1] as usize * case.heads + 1;
        case.key[17][5] = f32::INFINITY;
        Tier::Portable.run(Store {
            layout,
            key: &case.key[17],
            value: &case.value[17],
            keys: &mut case.keys[place * bytes..][..bytes],
            values: &mut case.values[place * C::value_block_bytes(16)..]
                [..C::value_block_bytes(16)],
            slot: 17 % BLOCK,
        });
        for tier in Tier::available() {
            assert!(case.attend::<1>(tier, 18)[0].iter().all(|x| x.is_nan()));
            assert!(case.attend::<1>(tier, 16)[0].iter().all(|x| x.is_finite()));
        }
    }
}
