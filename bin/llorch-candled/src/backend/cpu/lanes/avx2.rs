//! Lanes on x86-64 with AVX2, FMA and F16C, with or without AVX-VNNI: two registers hold eight lanes each.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes};

/// Lanes in two 256-bit registers. `VNNI` is true if a dot product takes one instruction. A value proves that the processor has
/// the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx2<const VNNI: bool>(());

/// Returns whether the processor has the instructions of the tier without AVX-VNNI.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Returns whether the processor has the instructions of the tier with AVX-VNNI.
pub fn has_vnni() -> bool {
    is_available() && is_x86_feature_detected!("avxvnni")
}

/// Runs a kernel without AVX-VNNI.
///
/// # Safety
///
/// [`is_available`] must hold.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2::<false>(()))
}

/// Runs a kernel with AVX-VNNI.
///
/// # Safety
///
/// [`has_vnni`] must hold.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub unsafe fn run_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2::<true>(()))
}

/// Calls intrinsics. The token proves that the processor has their instructions.
macro_rules! call {
    ($call:expr) => {
        // SAFETY: a value of `Avx2` exists only where the processor has the instructions; memory is accessed through
        // references to arrays of the accessed size.
        unsafe { $call }
    };
}

/// Applies an intrinsic to both halves.
macro_rules! halves {
    ($intrinsic:ident $(::<$n:ident>)? ($($operand:expr),+)) => {
        call!([
            $intrinsic $(::<$n>)? ($($operand[0]),+),
            $intrinsic $(::<$n>)? ($($operand[1]),+),
        ])
    };
}

/// Evaluates an expression for both halves. A closure would lack the target features of the function it is in.
macro_rules! both {
    ($half:ident in $halves:expr => $value:expr) => {{
        let [low, high] = $halves;
        [
            {
                let $half = low;
                call!($value)
            },
            {
                let $half = high;
                call!($value)
            },
        ]
    }};
}

#[inline(always)]
fn eight<T>(from: &[T; LANES]) -> [*const T; 2] {
    let (low, high) = from.split_at(LANES / 2);
    [low.as_ptr(), high.as_ptr()]
}

impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    const WIDE: bool = false;
    const TWICE: bool = !VNNI;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [call!(_mm256_set1_ps(x)); 2]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        both!(half in eight(from) => _mm256_loadu_ps(half))
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        both!(half in eight(from) => _mm256_cvtph_ps(_mm_loadu_si128(half.cast())))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        both!(half in eight(from) => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(half.cast()))
        )))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: Self::F) {
        let (low, high) = to.split_at_mut(LANES / 2);
        call!({
            _mm256_storeu_ps(low.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), x[1]);
        });
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [u16; LANES], x: Self::F) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        let (low, high) = to.split_at_mut(LANES / 2);
        call!({
            _mm_storeu_si128(low.as_mut_ptr().cast(), _mm256_cvtps_ph::<NEAREST>(x[0]));
            _mm_storeu_si128(high.as_mut_ptr().cast(), _mm256_cvtps_ph::<NEAREST>(x[1]));
        });
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        halves!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        halves!(_mm256_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        halves!(_mm256_cvtps_epi32(x))
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        halves!(_mm256_cvtepi32_ps(x))
    }
    #[inline(always)]
    fn to_bits(self, x: Self::F) -> Self::I {
        halves!(_mm256_castps_si256(x))
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        halves!(_mm256_castsi256_ps(x))
    }
    #[inline(always)]
    fn select_below(self, index: Self::I, bound: i32, a: Self::F, b: Self::F) -> Self::F {
        let bound = self.splat_int(bound);
        let below = self.from_bits(halves!(_mm256_cmpgt_epi32(bound, index)));
        halves!(_mm256_blendv_ps(b, a, below))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        [call!(_mm256_set1_epi32(x)); 2]
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> Self::I {
        both!(half in eight(from) => _mm256_loadu_si256(half.cast()))
    }
    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::I {
        both!(half in eight(from) => _mm256_cvtepu8_epi32(_mm_loadl_epi64(half.cast())))
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Self::I {
        both!(half in eight(from) => _mm256_cvtepi8_epi32(_mm_loadl_epi64(half.cast())))
    }
    #[inline(always)]
    fn store_int(self, to: &mut [i32; LANES], x: Self::I) {
        let (low, high) = to.split_at_mut(LANES / 2);
        call!({
            _mm256_storeu_si256(low.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(high.as_mut_ptr().cast(), x[1]);
        });
    }
    #[inline(always)]
    fn store_low_bytes(self, to: &mut [i8; LANES], x: Self::I) {
        let mut lanes = [0; LANES];
        self.store_int(&mut lanes, x);
        *to = lanes.map(|x| x as i8);
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_max_epi32(a, b))
    }
    #[inline(always)]
    fn and_int(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: Self::I) -> Self::I {
        // The intrinsic with an immediate takes an `i32`, to which `N` can't be converted at compile time.
        both!(half in a => _mm256_sll_epi32(half, _mm_cvtsi32_si128(N.cast_signed())))
    }

    #[inline(always)]
    fn splat_byte(self, x: u8) -> Self::B {
        [call!(_mm256_set1_epi8(x.cast_signed())); 2]
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> Self::B {
        let (low, high) = from.split_at(32);
        both!(half in [low, high] => _mm256_loadu_si256(half.as_ptr().cast()))
    }
    #[inline(always)]
    fn and_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        halves!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn or_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        halves!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn shift_right_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        both!(half in a => _mm256_srl_epi16(half, _mm_cvtsi32_si128(N.cast_signed())))
    }
    #[inline(always)]
    fn shift_left_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        both!(half in a => _mm256_sll_epi16(half, _mm_cvtsi32_si128(N.cast_signed())))
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> Self::B {
        both!(bits in [bits as u32, (bits >> 32) as u32] => {
            // Byte b of every quarter gets the byte of `bits` that holds its bit, then tests that bit.
            let spread = _mm256_shuffle_epi8(
                _mm256_set1_epi32(bits.cast_signed()),
                _mm256_setr_epi64x(
                    0,
                    0x0101_0101_0101_0101,
                    0x0202_0202_0202_0202,
                    0x0303_0303_0303_0303,
                ),
            );
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(x.cast_signed()))
        })
    }

    #[inline(always)]
    fn dot_u7(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        let a = self.splat_int(a);
        if VNNI {
            halves!(_mm256_dpbusd_avx_epi32(sum, w, a))
        } else {
            // Pairs of products stay below 2 · 127 · 127, so they fit in 16 bits.
            let products = halves!(_mm256_maddubs_epi16(w, a));
            let ones = [call!(_mm256_set1_epi16(1)); 2];
            self.add_int(sum, halves!(_mm256_madd_epi16(products, ones)))
        }
    }
    #[inline(always)]
    fn dot_u6_twice(self, sum: Self::I, w: [Self::B; 2], a: [i32; 2]) -> Self::I {
        if VNNI {
            return self.dot_u7(self.dot_u7(sum, w[0], a[0]), w[1], a[1]);
        }
        // Four products stay below 4 · 63 · 127, so they fit in 16 bits, and are widened together.
        let (w, v, a, b) = (w[0], w[1], self.splat_int(a[0]), self.splat_int(a[1]));
        let first = halves!(_mm256_maddubs_epi16(w, a));
        let second = halves!(_mm256_maddubs_epi16(v, b));
        let products = halves!(_mm256_add_epi16(first, second));
        let ones = [call!(_mm256_set1_epi16(1)); 2];
        self.add_int(sum, halves!(_mm256_madd_epi16(products, ones)))
    }
    #[inline(always)]
    fn dot_i8_start(self, sum: i32) -> Self::I {
        // The VNNI instruction takes unsigned weights, so weights are raised by 128, for which this value compensates.
        self.splat_int(if VNNI { -128 * sum } else { 0 })
    }
    #[inline(always)]
    fn dot_i8(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        if VNNI {
            let raise = self.splat_byte(128);
            return self.dot_u7(sum, halves!(_mm256_xor_si256(w, raise)), a);
        }
        // Move the sign of a weight to the activation. A weight of −128 becomes an unsigned 128, and pairs of products stay
        // below 2 · 128 · 127.
        let a = self.splat_int(a);
        let magnitude = halves!(_mm256_abs_epi8(w));
        let signed = halves!(_mm256_sign_epi8(a, w));
        let products = halves!(_mm256_maddubs_epi16(magnitude, signed));
        let ones = [call!(_mm256_set1_epi16(1)); 2];
        self.add_int(sum, halves!(_mm256_madd_epi16(products, ones)))
    }
    #[inline(always)]
    fn low_bytes_of_pairs(self) -> Self::B {
        [call!(_mm256_set1_epi16(255)); 2]
    }
    #[inline(always)]
    fn dot_i16(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        let a = self.splat_int(a);
        if VNNI {
            halves!(_mm256_dpwssd_avx_epi32(sum, w, a))
        } else {
            self.add_int(sum, halves!(_mm256_madd_epi16(w, a)))
        }
    }
    #[inline(always)]
    fn bytes_as_floats(self, x: Self::B) -> Self::F {
        halves!(_mm256_castsi256_ps(x))
    }
    #[inline(always)]
    fn prefetch(self, from: &u8, ahead: usize) {
        // A prefetch of an unmapped address does nothing.
        call!(_mm_prefetch::<_MM_HINT_T1>(
            std::ptr::from_ref(from).wrapping_add(ahead).cast()
        ));
    }
}
