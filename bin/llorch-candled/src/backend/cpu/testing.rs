//! Random test data.

use half::f16;

use crate::backend::cpu::format::Format;

/// Pseudo-random numbers, identical in every run with the same seed (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    /// Returns a float from −1 to 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn bytes(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.next() as u8);
    }
}

/// Returns the offsets of the half-precision scale and minimum in a block.
fn halves(format: Format) -> &'static [usize] {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => &[],
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
    }
}

/// Replaces scales and minima by numbers of typical size.
pub fn fill_scales(format: Format, bytes: &mut [u8], random: &mut Random) {
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in halves(format) {
            let half = f16::from_f32(random.float() * 0.05);
            block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
}

/// Fills blocks with random values, and with scales and minima of typical size.
pub fn fill_moderate(format: Format, bytes: &mut [u8], random: &mut Random) {
    random.bytes(bytes);
    fill_scales(format, bytes, random);
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let x = random.float();
        match format {
            Format::F32 => block.copy_from_slice(&x.to_le_bytes()),
            Format::F16 => block.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            Format::BF16 => block.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
            _ => {}
        }
    }
}

/// Fills blocks with random bytes, so that scales and minima may have any size, or be infinite or NaN.
pub fn fill_extreme(format: Format, bytes: &mut [u8], random: &mut Random) {
    random.bytes(bytes);
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let special = [
            f16::MAX,
            f16::ZERO,
            f16::NAN,
            f16::INFINITY,
            f16::MIN_POSITIVE_SUBNORMAL,
        ];
        for &at in halves(format) {
            if let Some(half) = special.get((random.next() % 20) as usize) {
                block[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
    }
}
