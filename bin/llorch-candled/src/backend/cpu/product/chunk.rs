//! The values of packed weights, decoded from chunks of 32 columns.

use super::at;
use crate::backend::cpu::lanes::Lanes;

/// The storage of the values in a chunk of 32 columns.
pub(super) trait Chunk {
    /// Bytes of a chunk.
    const BYTES: usize;
    /// True if the values are signed.
    const SIGNED: bool;
    /// Returns columns 8 · `P` to 8 · `P` + 3, and the next four.
    fn pair<L: Lanes, const P: usize>(lanes: L, chunk: &[u8]) -> [L::B; 2];
}

/// Unsigned 4-bit values.
pub(super) struct Nibbles;
/// Unsigned 5-bit values.
pub(super) struct Fives;
/// Unsigned 6-bit values.
pub(super) struct Sixes;
/// Signed 8-bit values.
pub(super) struct Bytes;

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
        // Bit g belongs to group g of four columns, and moves to bit 4.
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
        // Bits 2i and 2i + 1 belong to group i of this half of the chunk, and move to bits 4 and 5.
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
