//! Lanes in plain Rust: the definition of every operation, and the tier of processors that have no other.

use half::{bf16, f16};

use super::{LANES, Lanes};

/// Lanes as arrays, on any processor.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn zip<T: Copy, U: Copy, V>(a: [T; LANES], b: [U; LANES], f: impl Fn(T, U) -> V) -> [V; LANES] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

#[inline(always)]
fn bytes(a: [u8; 64], f: impl Fn(u8, usize) -> u8) -> [u8; 64] {
    std::array::from_fn(|byte| f(a[byte], byte))
}

#[inline(always)]
fn pairs(a: [u8; 64], f: impl Fn(u16) -> u16) -> [u8; 64] {
    let mut shifted = a;
    for pair in shifted.as_chunks_mut().0 {
        *pair = f(u16::from_le_bytes(*pair)).to_le_bytes();
    }
    shifted
}

impl Lanes for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 64];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        from.map(|bits| bf16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: Self::F) {
        *to = x;
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [u16; LANES], x: Self::F) {
        *to = x.map(|x| f16::from_f32(x).to_bits());
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|lane| (-a[lane]).mul_add(b[lane], c[lane]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        x.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn to_bits(self, x: Self::F) -> Self::I {
        x.map(|x| x.to_bits().cast_signed())
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        x.map(|x| f32::from_bits(x.cast_unsigned()))
    }
    #[inline(always)]
    fn select_below(self, index: Self::I, bound: i32, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|lane| {
            if index[lane] < bound {
                a[lane]
            } else {
                b[lane]
            }
        })
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> Self::I {
        *from
    }
    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::I {
        from.map(i32::from)
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Self::I {
        from.map(|x| i32::from(x.cast_signed()))
    }
    #[inline(always)]
    fn store_int(self, to: &mut [i32; LANES], x: Self::I) {
        *to = x;
    }
    #[inline(always)]
    fn store_low_bytes(self, to: &mut [i8; LANES], x: Self::I) {
        *to = x.map(|x| x as i8);
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::max)
    }
    #[inline(always)]
    fn and_int(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: Self::I) -> Self::I {
        a.map(|a| a << N)
    }

    #[inline(always)]
    fn splat_byte(self, x: u8) -> Self::B {
        [x; 64]
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> Self::B {
        *from
    }
    #[inline(always)]
    fn and_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        bytes(a, |a, byte| a & b[byte])
    }
    #[inline(always)]
    fn or_bytes(self, a: Self::B, b: Self::B) -> Self::B {
        bytes(a, |a, byte| a | b[byte])
    }
    #[inline(always)]
    fn shift_right_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        pairs(a, |pair| pair >> N)
    }
    #[inline(always)]
    fn shift_left_pairs<const N: u32>(self, a: Self::B) -> Self::B {
        pairs(a, |pair| pair << N)
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> Self::B {
        bytes([x; 64], |x, byte| if bits >> byte & 1 == 1 { x } else { 0 })
    }

    #[inline(always)]
    fn dot_u7(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        let a = a.to_le_bytes();
        std::array::from_fn(|lane| {
            let products =
                (0..4).map(|i| i32::from(w[4 * lane + i]) * i32::from(a[i].cast_signed()));
            products.fold(sum[lane], i32::wrapping_add)
        })
    }
    #[inline(always)]
    fn dot_i8_start(self, _: i32) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn dot_i8(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        let a = a.to_le_bytes();
        std::array::from_fn(|lane| {
            let product =
                |i: usize| i32::from(w[4 * lane + i].cast_signed()) * i32::from(a[i].cast_signed());
            (0..4).map(product).fold(sum[lane], i32::wrapping_add)
        })
    }
    #[inline(always)]
    fn low_bytes_of_pairs(self) -> Self::B {
        bytes([255; 64], |x, byte| if byte % 2 == 0 { x } else { 0 })
    }
    #[inline(always)]
    fn dot_i16(self, sum: Self::I, w: Self::B, a: i32) -> Self::I {
        let (a, (w, _)) = ([a as i16, (a >> 16) as i16], w.as_chunks::<2>());
        std::array::from_fn(|lane| {
            let product =
                |i: usize| i32::from(i16::from_le_bytes(w[2 * lane + i])) * i32::from(a[i]);
            (0..2).map(product).fold(sum[lane], i32::wrapping_add)
        })
    }
    #[inline(always)]
    fn bytes_as_floats(self, x: Self::B) -> Self::F {
        let (floats, _) = x.as_chunks::<4>();
        std::array::from_fn(|lane| f32::from_le_bytes(floats[lane]))
    }
    #[inline(always)]
    fn prefetch(self, _: &u8, _: usize) {}
}
