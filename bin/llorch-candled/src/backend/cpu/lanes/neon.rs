//! Lanes on AArch64 with the dot product extension: four registers hold four lanes each.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, LANES, Lanes};

/// Lanes in four 128-bit registers. A value proves that the processor has the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Neon(());

/// Returns whether the processor has all instructions of this tier.
pub fn is_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
        && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Runs a kernel.
///
/// # Safety
///
/// [`is_available`] must hold.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

/// Evaluates an expression for each quarter. A closure would lack the target features of the function it is in.
macro_rules! quarters {
    ($quarter:ident => $value:expr) => {{
        // SAFETY: a value of `Neon` exists only where the processor has the instructions; memory is accessed through references
        // to arrays, at quarters of them.
        unsafe {
            [
                {
                    let $quarter = 0;
                    $value
                },
                {
                    let $quarter = 1;
                    $value
                },
                {
                    let $quarter = 2;
                    $value
                },
                {
                    let $quarter = 3;
                    $value
                },
            ]
        }
    }};
}

/// Returns a pointer to a quarter of an array of sixteen.
#[inline(always)]
fn at<T>(from: &[T; LANES], quarter: usize) -> *const T {
    from[4 * quarter..][..4].as_ptr()
}

/// Returns a mutable pointer to a quarter of an array of sixteen.
#[inline(always)]
fn at_mut<T>(to: &mut [T; LANES], quarter: usize) -> *mut T {
    to[4 * quarter..][..4].as_mut_ptr()
}

/// Widens half-precision floats in assembly, because the intrinsic needs an unstable type.
#[inline(always)]
fn widen(halves: uint16x4_t) -> float32x4_t {
    let floats;
    // SAFETY: every AArch64 processor with NEON has the instruction, which only computes.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) floats, in(vreg) halves,
             options(pure, nomem, nostack, preserves_flags));
    }
    floats
}

/// Rounds to half-precision floats in assembly, because the intrinsic needs an unstable type.
#[inline(always)]
fn narrow(floats: float32x4_t) -> uint16x4_t {
    let halves;
    // SAFETY: as in `widen`. The rounding is to nearest even unless the control register was changed, which Rust forbids.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) halves, in(vreg) floats,
             options(pure, nomem, nostack, preserves_flags));
    }
    halves
}

/// Adds to each lane the dot product of its four signed bytes in assembly, because the intrinsic is unstable.
#[inline(always)]
fn sdot(mut sum: int32x4_t, w: uint8x16_t, a: int32x4_t) -> int32x4_t {
    // SAFETY: only methods of `Neon` call this, and its value proves that the processor has the extension.
    unsafe {
        asm!(".arch_extension dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
             inout(vreg) sum, in(vreg) w, in(vreg) a,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

impl Lanes for Neon {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type B = [uint8x16_t; 4];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        quarters!(_i => vdupq_n_f32(x))
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        quarters!(i => vld1q_f32(at(from, i)))
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        quarters!(i => widen(vld1_u16(at(from, i))))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        quarters!(i => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at(from, i)))))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: Self::F) {
        quarters!(i => vst1q_f32(at_mut(to, i), x[i]));
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [u16; LANES], x: Self::F) {
        quarters!(i => vst1_u16(at_mut(to, i), narrow(x[i])));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        quarters!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        quarters!(i => vfmsq_f32(c[i], a[i], b[i]))
    }
    // The min and max instructions distinguish 0 from −0, which other tiers don't.
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        quarters!(i => vcvtnq_s32_f32(x[i]))
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        quarters!(i => vcvtq_f32_s32(x[i]))
    }
    #[inline(always)]
    fn to_bits(self, x: Self::F) -> Self::I {
        quarters!(i => vreinterpretq_s32_f32(x[i]))
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        quarters!(i => vreinterpretq_f32_s32(x[i]))
    }
    #[inline(always)]
    fn select_below(self, index: Self::I, bound: i32, a: Self::F, b: Self::F) -> Self::F {
        quarters!(i => vbslq_f32(vcltq_s32(index[i], vdupq_n_s32(bound)), a[i], b[i]))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        quarters!(_i => vdupq_n_s32(x))
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> Self::I {
        quarters!(i => vld1q_s32(at(from, i)))
    }
    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::I {
        // SAFETY: the token proves the instructions; the array has the 16 bytes that are loaded.
        unsafe {
            let bytes = vld1q_u8(from.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            [
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                vreinterpretq_s32_u32(vmovl_high_u16(low)),
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                vreinterpretq_s32_u32(vmovl_high_u16(high)),
            ]
        }
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Self::I {
        // SAFETY: the token proves the instructions; the array has the 16 bytes that are loaded.
        unsafe {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(from.as_ptr()));
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ]
        }
    }
    #[inline(always)]
    fn store_int(self, to: &mut [i32; LANES], x: Self::I) {
        quarters!(i => vst1q_s32(at_mut(to, i), x[i]));
    }
    #[inline(always)]
    fn store_low_bytes(self, to: &mut [i8; LANES], x: Self::I) {
        // SAFETY: the token proves the instructions; the array has room for the 16 bytes that are stored.
        unsafe {
            let low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
            let high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
            vst1q_s8(
                to.as_mut_ptr(),
                vcombine_s8(vmovn_s16(low), vmovn_s16(high)),
            );
        }
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(i => vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(i => vmulq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(i => vmaxq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn and_int(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(i => vandq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: Self::I) -> Self::I {
        quarters!(i => vshlq_s32(a[i], vdupq_n_s32(N.cast_signed())))
    }

    #[inline(always)]
    fn splat_byte(self, x: u8) -> Self::B {
        quarters!(_i => vdupq_n_u8(x))
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> Self::B {
        quarters!(i => vld1q_u8(from[16 * i..][..16].as_ptr()))
    }
    #[inline(always)]
    fn and_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        quarters!(i => vandq_u8(a[i], b[i]))
    }
    #[inline(always)]
    fn or_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        quarters!(i => vorrq_u8(a[i], b[i]))
    }
    #[inline(always)]
    fn shift_right_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        quarters!(i => vreinterpretq_u8_u16(vshlq_u16(
            vreinterpretq_u16_u8(a[i]),
            vdupq_n_s16(-(N as i16))
        )))
    }
    #[inline(always)]
    fn shift_left_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        quarters!(i => vreinterpretq_u8_u16(vshlq_u16(
            vreinterpretq_u16_u8(a[i]),
            vdupq_n_s16(N as i16)
        )))
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> Self::B {
        const BIT: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        quarters!(i => {
            let bits = bits >> (16 * i);
            let spread = vcombine_u8(vdup_n_u8(bits as u8), vdup_n_u8((bits >> 8) as u8));
            vandq_u8(vtstq_u8(spread, vld1q_u8(BIT.as_ptr())), vdupq_n_u8(x))
        })
    }

    #[inline(always)]
    fn dot_u7(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        self.dot_i8(sum, w, a)
    }
    #[inline(always)]
    fn dot_i8_start(self, _: i32) -> Self::I {
        self.splat_int(0)
    }
    #[inline(always)]
    fn dot_i8(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        quarters!(i => sdot(sum[i], w[i], vdupq_n_s32(a)))
    }
    #[inline(always)]
    fn low_bytes_of_pairs(self) -> Self::B {
        quarters!(_i => vreinterpretq_u8_u16(vdupq_n_u16(255)))
    }
    #[inline(always)]
    fn dot_i16(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        quarters!(i => {
            let (w, a) = (vreinterpretq_s16_u8(w[i]), vreinterpretq_s16_s32(vdupq_n_s32(a)));
            let low = vmull_s16(vget_low_s16(w), vget_low_s16(a));
            vaddq_s32(sum[i], vpaddq_s32(low, vmull_high_s16(w, a)))
        })
    }
    #[inline(always)]
    fn bytes_as_floats(self, x: Self::B) -> Self::F {
        quarters!(i => vreinterpretq_f32_u8(x[i]))
    }
    #[inline(always)]
    fn prefetch(self, from: &u8, ahead: usize) {
        let address = std::ptr::from_ref(from).wrapping_add(ahead);
        // SAFETY: a prefetch of an unmapped address does nothing.
        unsafe {
            asm!("prfm pldl2keep, [{0}]", in(reg) address, options(readonly, nostack, preserves_flags));
        }
    }
}
