//! Norms and activation functions over rows of floats.

use super::exp::exp;
use super::lanes::{Kernel, LANES, Lanes};
use crate::model::description::Activation;

/// Root mean square norm of a row: out = x · w / √(mean(x²) + ε) (Zhang and Sennrich 2019).
pub struct RmsNorm<'a> {
    /// Row to normalise.
    pub x: &'a [f32],
    /// Weights, one per element.
    pub weight: &'a [f32],
    /// ε, added to the mean square.
    pub epsilon: f32,
    /// Destination of the result.
    pub out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            x,
            weight,
            epsilon,
            out,
        } = self;
        let factor = 1.0 / (sum_of_squares(lanes, x) / x.len() as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}

/// Root mean square norm of a row, in place.
pub struct RmsNormInPlace<'a> {
    /// Row to normalise, and the result.
    pub x: &'a mut [f32],
    /// Weights, one per element.
    pub weight: &'a [f32],
    /// ε, added to the mean square.
    pub epsilon: f32,
}

impl Kernel for RmsNormInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { x, weight, epsilon } = self;
        let factor = 1.0 / (sum_of_squares(lanes, x) / x.len() as f32 + epsilon).sqrt();
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * factor * weight;
        }
    }
}

/// Returns the sum of squares: first in sixteen lanes, element i in lane i mod 16, then over the lanes.
#[inline(always)]
fn sum_of_squares<L: Lanes>(lanes: L, x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sum = lanes.splat(0.0);
    for chunk in chunks {
        let x = lanes.load(chunk);
        sum = lanes.mul_add(x, x, sum);
    }
    if !rest.is_empty() {
        let mut chunk = [0.0; LANES];
        chunk[..rest.len()].copy_from_slice(rest);
        let x = lanes.load(&chunk);
        sum = lanes.mul_add(x, x, sum);
    }
    lanes.sum(sum)
}

/// Kernel that gates a row: gate = f(gate) · up.
pub struct Gate<'a> {
    /// Activation function f.
    pub activation: Activation,
    /// Row of the gate, and the result.
    pub gate: &'a mut [f32],
    /// Row of the up-projection.
    pub up: &'a [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (gates, gate_rest) = self.gate.as_chunks_mut::<LANES>();
        let (ups, up_rest) = self.up.as_chunks::<LANES>();
        for (gate, up) in gates.iter_mut().zip(ups) {
            let gated = gated(lanes, self.activation, lanes.load(gate), lanes.load(up));
            lanes.store(gate, gated);
        }
        if !gate_rest.is_empty() {
            let (mut gate, mut up) = ([0.0; LANES], [0.0; LANES]);
            gate[..gate_rest.len()].copy_from_slice(gate_rest);
            up[..up_rest.len()].copy_from_slice(up_rest);
            let gated = gated(lanes, self.activation, lanes.load(&gate), lanes.load(&up));
            lanes.store(&mut gate, gated);
            gate_rest.copy_from_slice(&gate[..gate_rest.len()]);
        }
    }
}

/// Returns f(gate) · up. Both functions f are x · σ(z), with z = x or z = 2 √(2/π) (x + 0.044715 x³).
#[inline(always)]
fn gated<L: Lanes>(lanes: L, activation: Activation, gate: L::F, up: L::F) -> L::F {
    let one = lanes.splat(1.0);
    let z = match activation {
        Activation::Silu => gate,
        Activation::GeluTanh => {
            let cube = lanes.mul_add(lanes.mul(gate, gate), lanes.splat(0.044_715), one);
            lanes.mul(lanes.mul(gate, lanes.splat(1.595_769_2)), cube)
        }
    };
    let e = exp(lanes, lanes.sub(lanes.splat(0.0), z));
    lanes.mul(lanes.div(gate, lanes.add(one, e)), up)
}
