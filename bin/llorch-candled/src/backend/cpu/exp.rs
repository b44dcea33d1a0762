//! The exponential function of the kernels.

use super::lanes::Lanes;

/// Coefficients of the polynomial for (e^r − 1 − r) / r², highest power first: those of `expf` in the Cephes library (S. L.
/// Moshier).
const POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];
/// ln 2 in two parts. The first has few bits, so that its product with a small integer is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Range of arguments. Arguments outside are clamped, so that results stay normal numbers.
const BOUNDS: [f32; 2] = [-87.0, 88.0];

/// Returns e^x in each lane, within 2 units in the last place. NaN yields some finite number.
#[inline(always)]
pub fn exp<L: Lanes>(lanes: L, x: L::F) -> L::F {
    let x = lanes.min(x, lanes.splat(BOUNDS[1]));
    let x = lanes.max(x, lanes.splat(BOUNDS[0]));
    let power = lanes.round(lanes.mul(x, lanes.splat(std::f32::consts::LOG2_E)));
    let n = lanes.to_float(power);
    let r = lanes.neg_mul_add(n, lanes.splat(LN_2[0]), x);
    let r = lanes.neg_mul_add(n, lanes.splat(LN_2[1]), r);
    let mut p = lanes.splat(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = lanes.mul_add(p, r, lanes.splat(*coefficient));
    }
    let p = lanes.mul_add(lanes.mul(p, r), r, lanes.add(r, lanes.splat(1.0)));
    // 2^n, made from its bits: the biased exponent begins at bit 23.
    let scale = lanes.shift_left::<23>(lanes.add_int(power, lanes.splat_int(127)));
    lanes.mul(p, lanes.from_bits(scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::lanes::{Kernel, LANES, Tier};

    struct Sixteen<'a>(&'a mut [f32; LANES]);

    impl Kernel for Sixteen<'_> {
        type Output = ();
        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) {
            let x = exp(lanes, lanes.load(self.0));
            lanes.store(self.0, x);
        }
    }

    #[test]
    fn it_is_within_two_units_of_the_last_place_and_the_same_everywhere() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let arguments: [f32; LANES] = std::array::from_fn(|lane| x + 0.003 * lane as f32);
            let mut portable = arguments;
            Tier::Portable.run(Sixteen(&mut portable));
            for (x, found) in arguments.iter().zip(portable).filter(|(x, _)| **x <= 88.0) {
                let exact = f64::from(*x).exp();
                assert!(
                    (f64::from(found) - exact).abs() <= 2.0 * exact * f64::from(f32::EPSILON),
                    "e^{x} = {found}"
                );
            }
            for tier in Tier::available() {
                let mut same = arguments;
                tier.run(Sixteen(&mut same));
                assert_eq!(
                    same.map(f32::to_bits),
                    portable.map(f32::to_bits),
                    "{tier:?}"
                );
            }
            x += 0.048;
        }
    }
}
