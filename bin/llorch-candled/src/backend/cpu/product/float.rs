//! Products with float weights.

use std::marker::PhantomData;

use super::{AHEAD, Part, ROWS, load_halves, prefetch, sixteen_bits};
use crate::backend::cpu::lanes::{Kernel, Lanes};
use crate::backend::cpu::pack::{HALVES, PackedMatrix};

/// A float format whose weights of a column take `N` bytes.
pub(super) trait FloatWeight<const N: usize> {
    fn load<L: Lanes>(lanes: L, bytes: &[u8; N]) -> L::F;
}

/// 32-bit floats.
pub(super) struct Singles;
/// Half-precision floats.
pub(super) struct Halves;
/// Upper halves of 32-bit floats (bfloat16).
pub(super) struct Brains;

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

pub(super) struct FloatProduct<'a, 'o, W, const N: usize> {
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
    pub(super) fn new(weights: &'a PackedMatrix, values: &'a [f32], out: &'a mut Part<'o>) -> Self {
        Self {
            weights,
            values,
            out,
            weight: PhantomData,
        }
    }

    /// Multiplies a tile with `M` rows. `first` is true for the first rows with this tile, which prefetch weights. Returns `M`.
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
