//! Lanes on x86-64 with AVX-512 and AVX-512 VNNI: one register holds all sixteen.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes};

/// Lanes in one 512-bit register. A value proves that the processor has the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

/// Returns whether the processor has all instructions of this tier.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Runs a kernel.
///
/// # Safety
///
/// The processor must have all instructions of this tier.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// Calls intrinsics. The token proves that the processor has their instructions.
macro_rules! call {
    ($call:expr) => {
        // SAFETY: a value of `Avx512` exists only where the processor has the instructions; memory is accessed through
        // references to arrays of the accessed size.
        unsafe { $call }
    };
}

impl Lanes for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        call!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        call!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        call!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        call!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()))
        )))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: Self::F) {
        call!(_mm512_storeu_ps(to.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [u16; LANES], x: Self::F) {
        call!(_mm256_storeu_si256(
            to.as_mut_ptr().cast(),
            _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        ));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        call!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        call!(_mm512_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        call!(_mm512_cvtps_epi32(x))
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        call!(_mm512_cvtepi32_ps(x))
    }
    #[inline(always)]
    fn to_bits(self, x: Self::F) -> Self::I {
        call!(_mm512_castps_si512(x))
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        call!(_mm512_castsi512_ps(x))
    }
    #[inline(always)]
    fn select_below(self, index: Self::I, bound: i32, a: Self::F, b: Self::F) -> Self::F {
        call!(_mm512_mask_blend_ps(
            _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(bound)),
            b,
            a
        ))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        call!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> Self::I {
        call!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::I {
        call!(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Self::I {
        call!(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn store_int(self, to: &mut [i32; LANES], x: Self::I) {
        call!(_mm512_storeu_si512(to.as_mut_ptr().cast(), x));
    }
    #[inline(always)]
    fn store_low_bytes(self, to: &mut [i8; LANES], x: Self::I) {
        call!(_mm_storeu_si128(
            to.as_mut_ptr().cast(),
            _mm512_cvtepi32_epi8(x)
        ));
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        call!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        call!(_mm512_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I {
        call!(_mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn and_int(self, a: Self::I, b: Self::I) -> Self::I {
        call!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: Self::I) -> Self::I {
        call!(_mm512_slli_epi32::<N>(a))
    }

    #[inline(always)]
    fn splat_byte(self, x: u8) -> Self::B {
        call!(_mm512_set1_epi8(x.cast_signed()))
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> Self::B {
        call!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn and_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        call!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        call!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn shift_right_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        call!(_mm512_srli_epi16::<N>(a))
    }
    #[inline(always)]
    fn shift_left_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        call!(_mm512_slli_epi16::<N>(a))
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> Self::B {
        call!(_mm512_maskz_set1_epi8(bits, x.cast_signed()))
    }

    #[inline(always)]
    fn dot_u7(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        call!(_mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(a)))
    }
    #[inline(always)]
    fn dot_i8_start(self, sum: i32) -> Self::I {
        // The instruction takes unsigned weights, so weights are raised by 128, for which this value compensates.
        call!(_mm512_set1_epi32(-128 * sum))
    }
    #[inline(always)]
    fn dot_i8(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        let raised = call!(_mm512_xor_si512(w, _mm512_set1_epi8(-128)));
        self.dot_u7(sum, raised, a)
    }
    #[inline(always)]
    fn low_bytes_of_pairs(self) -> Self::B {
        call!(_mm512_set1_epi16(255))
    }
    #[inline(always)]
    fn dot_i16(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        call!(_mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(a)))
    }
    #[inline(always)]
    fn sum_int(self, x: Self::I) -> i32 {
        call!(_mm512_reduce_add_epi32(x))
    }
    #[inline(always)]
    fn largest_int(self, x: Self::I) -> i32 {
        call!(_mm512_reduce_max_epi32(x))
    }
    #[inline(always)]
    fn bytes_as_floats(self, x: Self::B) -> Self::F {
        call!(_mm512_castsi512_ps(x))
    }
    #[inline(always)]
    fn prefetch(self, from: &u8, ahead: usize) {
        // A prefetch of an unmapped address does nothing.
        call!(_mm_prefetch::<_MM_HINT_T1>(
            std::ptr::from_ref(from).wrapping_add(ahead).cast()
        ));
    }
}
