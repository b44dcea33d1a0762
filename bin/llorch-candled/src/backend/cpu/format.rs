//! The element types of GGUF tensors: their layout in a file, and the numbers that they represent.
//!
//! The formats are those of ggml (`ggml-common.h` and `ggml-quants.c` of <https://github.com/ggml-org/ggml>). A row is a
//! sequence of blocks. A block of 32 columns has one scale, and in some formats a minimum. A block of 256 columns (the "K"
//! formats) also has them, and its smaller groups have integer scales (and minima) that multiply them.

use half::{bf16, f16};

/// The element type of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // The names are ggml's.
pub enum Format {
    /// 32-bit float.
    F32,
    /// 16-bit float of IEEE 754.
    F16,
    /// Upper half of a 32-bit float.
    BF16,
    /// d · (q − 8), q of 4 bits.
    Q4_0,
    /// d · q + m, q of 4 bits.
    Q4_1,
    /// d · (q − 16), q of 5 bits.
    Q5_0,
    /// d · q + m, q of 5 bits.
    Q5_1,
    /// d · q, q of 8 bits, signed.
    Q8_0,
    /// d · s · q − m · t, q of 2 bits, s and t of 4 bits for each 16 columns.
    Q2_K,
    /// d · s · (q − 4), q of 3 bits, s of 6 bits, signed, for each 16 columns.
    Q3_K,
    /// d · s · q − m · t, q of 4 bits, s and t of 6 bits for each 32 columns.
    Q4_K,
    /// d · s · q − m · t, q of 5 bits, s and t of 6 bits for each 32 columns.
    Q5_K,
    /// d · s · (q − 32), q of 6 bits, s of 8 bits, signed, for each 16 columns.
    Q6_K,
}

/// One decoded block of a quantised format.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    /// Values q as in the file: those of [`Format::Q8_0`] are the bits of signed bytes, all others are unsigned.
    pub quants: [u8; 256],
    /// Integer scale of each 16 columns. All 1 in formats without integer scales.
    pub scales: [i8; 16],
    /// Integer minimum of each 16 columns. All 1 in formats without integer minima.
    pub minima: [u8; 16],
    /// Scale d, as the bits of a half-precision float.
    pub scale: u16,
    /// Minimum m, as the bits of a half-precision float.
    pub minimum: u16,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Returns the format with this number in a GGUF file (`ggml_type`), or `None` if it is not one of these.
    pub fn from_gguf(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Returns the number of columns in a block. The length of a row is a multiple of it.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Returns the number of bytes of a block in a file.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Returns the number of bytes of a row of `columns` in a file.
    ///
    /// # Panics
    ///
    /// Panics if `columns` is not a multiple of the block length.
    pub fn row_bytes(self, columns: usize) -> usize {
        let blocks = columns / self.block_len();
        assert_eq!(
            blocks * self.block_len(),
            columns,
            "{self:?} rows can't have {columns} columns"
        );
        blocks * self.block_bytes()
    }

    /// Returns the number that is subtracted from every q.
    pub(crate) fn offset(self) -> i32 {
        match self {
            Self::Q3_K => 4,
            Self::Q4_0 => 8,
            Self::Q5_0 => 16,
            Self::Q6_K => 32,
            _ => 0,
        }
    }

    /// Returns the sign with which the minimum is added, or 0 for formats without minima.
    fn minimum_sign(self) -> f64 {
        match self {
            Self::Q4_1 | Self::Q5_1 => 1.0,
            Self::Q2_K | Self::Q4_K | Self::Q5_K => -1.0,
            _ => 0.0,
        }
    }
}

/// Writes the numbers that `bytes` represent to `out`, each the exact value rounded once to `f32`.
///
/// `bytes` are whole blocks of one row or several, as in a file.
///
/// # Panics
///
/// Panics if `bytes` isn't as long as `out` requires.
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        bytes.len(),
        format.row_bytes(out.len()),
        "the length of {format:?} data"
    );
    let blocks = bytes.chunks_exact(format.block_bytes());
    let mut block = Block::ZERO;
    for (bytes, out) in blocks.zip(out.chunks_exact_mut(format.block_len())) {
        match format {
            Format::F32 => out[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Format::F16 => out[0] = f16::from_bits(pair(bytes, 0)).to_f32(),
            Format::BF16 => out[0] = bf16::from_bits(pair(bytes, 0)).to_f32(),
            _ => {
                block.read(format, bytes);
                block.numbers(format, out);
            }
        }
    }
}

/// Returns the two bytes at `at` as one number.
fn pair(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl Block {
    /// A block whose numbers are all 0.
    pub const ZERO: Self = Self {
        quants: [0; 256],
        scales: [1; 16],
        minima: [1; 16],
        scale: 0,
        minimum: 0,
    };

    /// Decodes a block of a quantised format. `self` must be [`ZERO`](Self::ZERO) or hold a block of the same format. Blocks
    /// are reused because a block is large, and many are read one after the other.
    ///
    /// # Panics
    ///
    /// Panics if the format is a float, or `bytes` is not one block.
    pub fn read(&mut self, format: Format, bytes: &[u8]) {
        assert_eq!(
            bytes.len(),
            format.block_bytes(),
            "the length of a block of {format:?}"
        );
        match format {
            Format::Q4_0 => self.read_small(bytes, false, 0),
            Format::Q4_1 => self.read_small(bytes, true, 0),
            Format::Q5_0 => self.read_small(bytes, false, 4),
            Format::Q5_1 => self.read_small(bytes, true, 4),
            Format::Q8_0 => {
                self.scale = pair(bytes, 0);
                self.quants[..32].copy_from_slice(&bytes[2..]);
            }
            Format::Q2_K => self.read_q2(bytes),
            Format::Q3_K => self.read_q3(bytes),
            Format::Q4_K => self.read_q4(bytes, 0),
            Format::Q5_K => self.read_q4(bytes, 32),
            Format::Q6_K => self.read_q6(bytes),
            Format::F32 | Format::F16 | Format::BF16 => panic!("{format:?} has no blocks"),
        }
    }

    /// Writes the numbers that the block represents, each the exact value rounded once to `f32`.
    pub fn numbers(&self, format: Format, out: &mut [f32]) {
        // The products below have at most 11 + 7 + 6 + 2 significant bits, so `f64` holds them exactly. A sum of two is exact
        // or (for minima far from the scale) so nearly exact that rounding it to `f32` yields the value rounded once.
        let scale = f16::from_bits(self.scale).to_f64();
        let minimum = f16::from_bits(self.minimum).to_f64() * format.minimum_sign();
        for (column, out) in out.iter_mut().enumerate() {
            let quant = match format {
                Format::Q8_0 => i32::from(self.quants[column].cast_signed()),
                _ => i32::from(self.quants[column]) - format.offset(),
            };
            let group = column / 16;
            let product = scale * f64::from(self.scales[group]) * f64::from(quant);
            // No infinity or NaN comes from formats without minima: their `minimum` is 0 or −0.
            *out = (product + minimum * f64::from(self.minima[group])) as f32;
        }
    }

    /// Reads a scale, a minimum if there is one, `plane` bytes with the fifth bit of each column, and 16 bytes of 4-bit values:
    /// the first 16 columns in the lower halves, the others in the upper ones.
    fn read_small(&mut self, bytes: &[u8], has_minimum: bool, plane: usize) {
        self.scale = pair(bytes, 0);
        let mut at = 2;
        if has_minimum {
            self.minimum = pair(bytes, 2);
            at = 4;
        }
        let (fifth, nibbles) = bytes[at..].split_at(plane);
        for (i, &nibble) in nibbles.iter().enumerate() {
            self.quants[i] = nibble & 15;
            self.quants[i + 16] = nibble >> 4;
        }
        for (i, &bits) in fifth.iter().enumerate() {
            for bit in 0..8 {
                self.quants[8 * i + bit] |= (bits >> bit & 1) << 4;
            }
        }
    }

    /// Reads 16 bytes with a scale in the lower and a minimum in the upper half, 64 bytes of 2-bit values, scale and minimum.
    fn read_q2(&mut self, bytes: &[u8]) {
        for (group, &both) in bytes[..16].iter().enumerate() {
            self.scales[group] = (both & 15).cast_signed();
            self.minima[group] = both >> 4;
        }
        self.read_two_bits(&bytes[16..80]);
        self.scale = pair(bytes, 80);
        self.minimum = pair(bytes, 82);
    }

    /// Reads 32 bytes with the third bit of columns l, 32 + l, … in byte l, 64 bytes of 2-bit values, 12 bytes of 6-bit scales
    /// raised by 32 (16 lower halves of four bits, then 16 upper pairs of bits), and the scale.
    fn read_q3(&mut self, bytes: &[u8]) {
        self.read_two_bits(&bytes[32..96]);
        for (column, quant) in self.quants.iter_mut().enumerate() {
            *quant |= (bytes[column % 32] >> (column / 32) & 1) << 2;
        }
        let scales = &bytes[96..108];
        for (group, scale) in self.scales.iter_mut().enumerate() {
            let low = scales[group % 8] >> (4 * (group / 8)) & 15;
            let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
            *scale = (high << 4 | low).cast_signed() - 32;
        }
        self.scale = pair(bytes, 108);
    }

    /// Reads 32 bytes for each half of the columns, with columns l, 32 + l, 64 + l and 96 + l of the half in byte l.
    fn read_two_bits(&mut self, bytes: &[u8]) {
        for (column, quant) in self.quants.iter_mut().enumerate() {
            let byte = bytes[column / 128 * 32 + column % 32];
            *quant = byte >> (column % 128 / 32 * 2) & 3;
        }
    }

    /// Reads scale, minimum, 12 bytes of 6-bit scales and minima, `plane` bytes with the fifth bits (columns l, 32 + l, … in
    /// byte l), and 32 bytes of 4-bit values for each 64 columns: the first 32 in the lower halves.
    fn read_q4(&mut self, bytes: &[u8], plane: usize) {
        self.scale = pair(bytes, 0);
        self.minimum = pair(bytes, 2);
        let packed = &bytes[4..16];
        for group in 0..8 {
            let (scale, minimum) = six_bits(packed, group);
            self.scales[2 * group..][..2].fill(scale.cast_signed());
            self.minima[2 * group..][..2].fill(minimum);
        }
        let (fifth, nibbles) = bytes[16..].split_at(plane);
        for (column, quant) in self.quants.iter_mut().enumerate() {
            let byte = nibbles[column / 64 * 32 + column % 32];
            *quant = byte >> (column % 64 / 32 * 4) & 15;
            if plane > 0 {
                *quant |= (fifth[column % 32] >> (column / 32) & 1) << 4;
            }
        }
    }

    /// Reads 128 bytes with the lower four bits, 64 bytes with the upper two, 16 scales of 8 bits, and the scale. Each half of
    /// the columns has 64 bytes of lower bits (the first 64 columns in the lower halves) and 32 of upper bits (columns l, 32 +
    /// l, 64 + l and 96 + l in byte l).
    fn read_q6(&mut self, bytes: &[u8]) {
        let (low, high) = (&bytes[..128], &bytes[128..192]);
        for (column, quant) in self.quants.iter_mut().enumerate() {
            let (half, within) = (column / 128, column % 128);
            let low = low[64 * half + within % 64] >> (within / 64 * 4) & 15;
            let high = high[32 * half + within % 32] >> (within / 32 * 2) & 3;
            *quant = high << 4 | low;
        }
        for (scale, &bits) in self.scales.iter_mut().zip(&bytes[192..208]) {
            *scale = bits.cast_signed();
        }
        self.scale = pair(bytes, 208);
    }
}

/// Returns the scale and minimum of a group. Those of the first four groups are in the lower six bits of bytes 0–3 and 4–7. The
/// others have four bits in bytes 8–11, and their upper two bits in the bits left over by the first four.
fn six_bits(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let low = packed[group + 4];
    let scale = packed[group - 4] >> 6 << 4 | low & 15;
    let minimum = packed[group] >> 6 << 4 | low >> 4;
    (scale, minimum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::{Random, fill_moderate};

    /// Returns element `i` of a block as ggml's loops define it, one element at a time, independently of [`Block`].
    fn element(format: Format, x: &[u8], i: usize) -> f64 {
        let half = |at: usize| f16::from_le_bytes([x[at], x[at + 1]]).to_f64();
        let nibble = |at: usize| {
            f64::from(if i < 16 {
                x[at + i] & 15
            } else {
                x[at + i - 16] >> 4
            })
        };
        let fifth = |at: usize| {
            f64::from(u32::from_le_bytes([x[at], x[at + 1], x[at + 2], x[at + 3]]) >> i & 1) * 16.0
        };
        let k = |at: usize| {
            let (scales, j) = (&x[at..], i / 32);
            let (s, m) = match j {
                0..4 => (scales[j] & 63, scales[j + 4] & 63),
                _ => (
                    scales[j + 4] & 15 | (scales[j - 4] >> 6) << 4,
                    scales[j + 4] >> 4 | (scales[j] >> 6) << 4,
                ),
            };
            (half(0) * f64::from(s), half(2) * f64::from(m))
        };
        let low =
            |at: usize| x[at + i / 64 * 32 + i % 32] >> (if i % 64 < 32 { 0 } else { 4 }) & 15;
        let two = |at: usize| x[at + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
        match format {
            Format::Q4_0 => half(0) * (nibble(2) - 8.0),
            Format::Q4_1 => half(0) * nibble(4) + half(2),
            Format::Q5_0 => half(0) * (nibble(6) + fifth(2) - 16.0),
            Format::Q5_1 => half(0) * (nibble(8) + fifth(4)) + half(2),
            Format::Q8_0 => half(0) * f64::from(x[2 + i] as i8),
            Format::Q2_K => {
                let both = x[i / 16];
                half(80) * f64::from(both & 15) * f64::from(two(16))
                    - half(82) * f64::from(both >> 4)
            }
            Format::Q3_K => {
                // The scales as ggml decodes them: four words, whose bytes are the scales.
                let word = |at: usize| u32::from_le_bytes([x[at], x[at + 1], x[at + 2], x[at + 3]]);
                let (a, b, c) = (word(96), word(100), word(104));
                let (lower, upper) = (0x0F0F_0F0F, 0x0303_0303);
                let words = [
                    a & lower | (c & upper) << 4,
                    b & lower | (c >> 2 & upper) << 4,
                    a >> 4 & lower | (c >> 4 & upper) << 4,
                    b >> 4 & lower | (c >> 6 & upper) << 4,
                ];
                let scale = f64::from(words[i / 64].to_le_bytes()[i / 16 % 4] as i8 - 32);
                let third = if x[i % 32] & 1 << (i / 32) == 0 {
                    4.0
                } else {
                    0.0
                };
                half(108) * scale * (f64::from(two(32)) - third)
            }
            Format::Q4_K => k(4).0 * f64::from(low(16)) - k(4).1,
            Format::Q5_K => {
                let fifth = f64::from(x[16 + i % 32] >> (i / 32) & 1) * 16.0;
                k(4).0 * (f64::from(low(48)) + fifth) - k(4).1
            }
            Format::Q6_K => {
                let (n, l) = (i / 128, i % 32);
                let (ql, qh) = (&x[64 * n..], x[128 + 32 * n + l]);
                let q = match i % 128 / 32 {
                    0 => ql[l] & 15 | (qh & 3) << 4,
                    1 => ql[l + 32] & 15 | (qh >> 2 & 3) << 4,
                    2 => ql[l] >> 4 | (qh >> 4 & 3) << 4,
                    _ => ql[l + 32] >> 4 | (qh >> 6 & 3) << 4,
                };
                half(208) * f64::from(x[192 + i / 16] as i8) * (f64::from(q) - 32.0)
            }
            Format::F32 => f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]])),
            Format::F16 => half(0),
            Format::BF16 => f64::from(f32::from_bits(
                u32::from(x[0]) << 16 | u32::from(x[1]) << 24,
            )),
        }
    }

    #[test]
    fn rows_are_what_the_formats_define() {
        let mut random = Random::new(6);
        for format in Format::ALL {
            let blocks = 7;
            let mut bytes = vec![0; blocks * format.block_bytes()];
            fill_moderate(format, &mut bytes, &mut random);
            let mut row = vec![0.0; blocks * format.block_len()];
            dequantize(format, &bytes, &mut row);
            for (i, &x) in row.iter().enumerate() {
                let block = &bytes[i / format.block_len() * format.block_bytes()..];
                let expected = element(format, block, i % format.block_len()) as f32;
                assert_eq!(x, expected, "{format:?}, element {i}");
            }
        }
    }

    /// Checks a row of 32 worked out by hand from the definition.
    #[test]
    fn a_row_of_q4_0() {
        let mut bytes = vec![0x00, 0x3C]; // 1.0
        bytes.extend((0..16_u8).map(|i| i | (15 - i) << 4));
        let mut row = [0.0; 32];
        dequantize(Format::Q4_0, &bytes, &mut row);
        let expected: [f32; 32] = std::array::from_fn(|i| match i {
            0..16 => i as f32 - 8.0,
            _ => 7.0 - (i - 16) as f32,
        });
        assert_eq!(row, expected);
    }

    #[test]
    fn numbers_of_formats_are_those_of_gguf() {
        assert_eq!(Format::from_gguf(12), Some(Format::Q4_K));
        assert_eq!(Format::from_gguf(30), Some(Format::BF16));
        assert_eq!(Format::from_gguf(4), None);
        let known = (0..40).filter_map(Format::from_gguf);
        assert_eq!(known.count(), Format::ALL.len());
    }

    #[test]
    #[should_panic(expected = "rows can't have 100 columns")]
    fn rows_are_whole_blocks() {
        Format::Q4_K.row_bytes(100);
    }
}
