//! Rotary position embedding.

use candle_core::{Device, Result, Tensor};

use super::config::{ModelConfig, RopeStyle};

/// Turns queries and keys by their positions.
pub struct Rope {
    /// Angle of one position step, for each turned pair.
    frequencies: Vec<f64>,
    style: RopeStyle,
    rope_dim: usize,
    head_dim: usize,
    device: Device,
}

/// Cosines and sines of a run of positions: made once a pass, used by every block.
pub struct Turn {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// `factors` divide the frequencies where a file carries them (`rope_freqs.weight`, Llama 3.1 and later).
    pub fn new(config: &ModelConfig, factors: Option<&[f32]>, device: &Device) -> Self {
        let frequencies = (0..config.rope_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f64 / config.rope_dim as f64;
                let factor = factors
                    .and_then(|f| f.get(pair))
                    .copied()
                    .map_or(1.0, f64::from);
                1.0 / (config.rope_base.powf(exponent) * factor * config.rope_divisor)
            })
            .collect();
        Self {
            frequencies,
            style: config.rope_style,
            rope_dim: config.rope_dim,
            head_dim: config.head_dim,
            device: device.clone(),
        }
    }

    /// The turn of `count` positions from `start` on.
    pub fn turn(&self, start: usize, count: usize) -> Result<Turn> {
        let pairs = self.frequencies.len();
        let (mut cos, mut sin) = (
            Vec::with_capacity(count * pairs),
            Vec::with_capacity(count * pairs),
        );
        for position in start..start + count {
            for frequency in &self.frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        Ok(Turn {
            cos: Tensor::from_vec(cos, (count, pairs), &self.device)?,
            sin: Tensor::from_vec(sin, (count, pairs), &self.device)?,
        })
    }

    /// Turns `heads` (heads, positions, width).
    pub fn apply(&self, heads: &Tensor, turn: &Turn) -> Result<Tensor> {
        let whole = heads.unsqueeze(0)?;
        let turned = |part: &Tensor| match self.style {
            RopeStyle::Interleaved => candle_nn::rotary_emb::rope_i(part, &turn.cos, &turn.sin),
            RopeStyle::Halves => candle_nn::rotary_emb::rope(part, &turn.cos, &turn.sin),
        };
        let out = if self.rope_dim == self.head_dim {
            turned(&whole)?
        } else {
            let front = whole.narrow(3, 0, self.rope_dim)?.contiguous()?;
            let rest = whole.narrow(3, self.rope_dim, self.head_dim - self.rope_dim)?;
            Tensor::cat(&[&turned(&front)?, &rest], 3)?
        };
        out.squeeze(0)
    }
}
