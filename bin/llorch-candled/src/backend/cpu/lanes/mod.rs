//! Sixteen lanes, the unit of computation of every kernel, on each kind of processor.
//!
//! A kernel is written once, over [`Lanes`], and compiled once for each tier. Every operation here has one defined result (IEEE
//! 754 with round to nearest, fused multiply-add, exact integers), and sums over lanes follow one fixed tree, so a kernel's
//! result has the same bits on every tier.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub use portable::Portable;

/// Number of lanes.
pub const LANES: usize = 16;

/// The operations on sixteen lanes.
///
/// A value of an implementing type proves that the processor has the tier's instructions: only [`Tier::run`] creates one.
pub trait Lanes: Copy {
    /// Sixteen 32-bit floats.
    type F: Copy;
    /// Sixteen 32-bit integers.
    type I: Copy;
    /// Sixty-four bytes, four for each lane.
    type B: Copy;
    /// True if there are 32 registers of sixteen lanes each, so that kernels keep more results at once.
    const WIDE: bool;
    /// True if [`dot_u6_twice`](Self::dot_u6_twice) is faster than two calls of [`dot_u7`](Self::dot_u7).
    const TWICE: bool = false;

    /// Returns `x` in every lane.
    fn splat(self, x: f32) -> Self::F;
    /// Loads sixteen floats.
    fn load(self, from: &[f32; LANES]) -> Self::F;
    /// Loads sixteen half-precision floats, given as their bits.
    fn load_f16(self, from: &[u16; LANES]) -> Self::F;
    /// Loads sixteen bfloat16 values, given as their bits.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F;
    /// Stores sixteen floats.
    fn store(self, to: &mut [f32; LANES], x: Self::F);
    /// Stores sixteen floats as the bits of half-precision floats, rounded to nearest even.
    fn store_f16(self, to: &mut [u16; LANES], x: Self::F);
    /// Returns a + b.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns a − b.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns a · b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns a / b.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns a · b + c, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Returns c − a · b, rounded once.
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Returns the larger of each pair. Neither may be NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns the smaller of each pair. Neither may be NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns the nearest integers, ties to even. Lanes must be within the range of `i32`.
    fn round(self, x: Self::F) -> Self::I;
    /// Returns integers as floats, rounded to nearest even.
    fn to_float(self, x: Self::I) -> Self::F;
    /// Returns the bits of floats.
    fn to_bits(self, x: Self::F) -> Self::I;
    /// Returns the floats with these bits.
    #[expect(
        clippy::wrong_self_convention,
        reason = "`self` is the token, as everywhere here"
    )]
    fn from_bits(self, x: Self::I) -> Self::F;
    /// Returns the lanes of `a` where `index` is below `bound`, and those of `b` elsewhere.
    fn select_below(self, index: Self::I, bound: i32, a: Self::F, b: Self::F) -> Self::F;

    /// Returns `x` in every lane.
    fn splat_int(self, x: i32) -> Self::I;
    /// Loads sixteen integers.
    fn load_int(self, from: &[i32; LANES]) -> Self::I;
    /// Loads sixteen unsigned bytes as integers.
    fn load_u8(self, from: &[u8; LANES]) -> Self::I;
    /// Loads sixteen signed bytes, given as their bits, as integers.
    fn load_i8(self, from: &[u8; LANES]) -> Self::I;
    /// Stores sixteen integers.
    fn store_int(self, to: &mut [i32; LANES], x: Self::I);
    /// Stores the low byte of each integer.
    fn store_low_bytes(self, to: &mut [i8; LANES], x: Self::I);
    /// Returns a + b, wrapping.
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Returns a · b, the low 32 bits.
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Returns the larger of each pair.
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Returns a AND b.
    fn and_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shifts each lane left by `N` bits.
    fn shift_left<const N: u32>(self, a: Self::I) -> Self::I;

    /// Returns `x` in every byte.
    fn splat_byte(self, x: u8) -> Self::B;
    /// Loads sixty-four bytes.
    fn load_bytes(self, from: &[u8; 64]) -> Self::B;
    /// Returns a AND b.
    fn and_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    /// Returns a OR b.
    fn or_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    /// Shifts each pair of bytes right by `N` bits: bits of the upper byte move into the lower one.
    fn shift_right_pairs<const N: u32>(self, a: Self::B) -> Self::B;
    /// Shifts each pair of bytes left by `N` bits: bits of the lower byte move into the upper one.
    fn shift_left_pairs<const N: u32>(self, a: Self::B) -> Self::B;
    /// Returns `x` in the bytes whose bit is set in `bits`, 0 in the others.
    fn bytes_where(self, bits: u64, x: u8) -> Self::B;

    /// Adds to each lane the dot product of its four bytes of `w`, unsigned and below 128, with the four signed bytes of `a`.
    /// Exact if no lane overflows. No byte of `a` may be −128.
    fn dot_u7(self, sum: Self::I, w: Self::B, a: i32) -> Self::I;
    /// Adds both dot products, as [`dot_u7`](Self::dot_u7) does, for weights below 64. No byte of `a` may be −128.
    #[inline(always)]
    fn dot_u6_twice(self, sum: Self::I, w: [Self::B; 2], a: [i32; 2]) -> Self::I {
        self.dot_u7(self.dot_u7(sum, w[0], a[0]), w[1], a[1])
    }
    /// Returns the start value of a sum of [`dot_i8`](Self::dot_i8), for activations whose sum is `sum`.
    fn dot_i8_start(self, sum: i32) -> Self::I;
    /// Adds to each lane the dot product of its four signed bytes of `w` with the four signed bytes of `a`. The sum must have
    /// begun with [`dot_i8_start`](Self::dot_i8_start). No byte of `a` may be −128.
    fn dot_i8(self, sum: Self::I, w: Self::B, a: i32) -> Self::I;

    /// Returns 255 in the lower byte of each pair, 0 in the upper.
    fn low_bytes_of_pairs(self) -> Self::B;
    /// Adds to each lane the dot product of its two signed 16-bit numbers of `w` (each a pair of bytes, the lower first) with
    /// those of `a`. Exact if no lane overflows. No number may be −32768.
    fn dot_i16(self, sum: Self::I, w: Self::B, a: i32) -> Self::I;

    /// Returns bytes as the floats with these bits, in little-endian order.
    fn bytes_as_floats(self, x: Self::B) -> Self::F;
    /// Prefetches the cache line `ahead` bytes after `from` into the second-level cache, without waiting. The address need not
    /// be mapped.
    fn prefetch(self, from: &u8, ahead: usize);

    /// Returns the sum of all lanes, wrapping.
    #[inline(always)]
    fn sum_int(self, x: Self::I) -> i32 {
        let mut lanes = [0; LANES];
        self.store_int(&mut lanes, x);
        lanes.into_iter().fold(0, i32::wrapping_add)
    }

    /// Returns the largest lane.
    #[inline(always)]
    fn largest_int(self, x: Self::I) -> i32 {
        let mut lanes = [0; LANES];
        self.store_int(&mut lanes, x);
        lanes.into_iter().fold(i32::MIN, i32::max)
    }

    /// Returns the sum of all lanes, along one tree: lanes i and i + 8, then i + 4, i + 2, i + 1.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, x);
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    /// Returns the largest lane. No lane may be NaN.
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, x);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// A computation over [`Lanes`]. Implementations mark `run` as `#[inline(always)]`, so that it is compiled for the tier.
pub trait Kernel {
    /// Result of the computation.
    type Output;
    /// Computes the result with `lanes`.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// A kind of processor, by the instructions that kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// Any processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX2, FMA, F16C and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 (F, BW, DQ, VL) and AVX-512 VNNI.
    Avx512,
    /// AArch64 with the dot product extension.
    Neon,
}

impl Tier {
    /// Every tier, slowest first.
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Neon,
    ];

    /// Returns the tiers whose instructions this processor has, slowest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(|tier| tier.is_available())
    }

    /// Returns the fastest tier of this processor.
    pub fn best() -> Self {
        Self::available().next_back().unwrap_or(Self::Portable)
    }

    /// Returns whether this processor has the tier's instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => avx2::has_vnni(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::is_available(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Runs a kernel with this tier's instructions.
    ///
    /// # Panics
    ///
    /// Panics if the processor doesn't have the tier's instructions.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(
            self.is_available(),
            "the processor has no {self:?} instructions"
        );
        match self {
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => unsafe { avx2::run_vnni(kernel) },
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::run(kernel) },
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "aarch64")]
            Self::Neon => unsafe { neon::run(kernel) },
            _ => kernel.run(Portable),
        }
    }
}
