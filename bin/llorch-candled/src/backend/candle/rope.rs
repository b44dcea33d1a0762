//! Rotary position embedding on tensors.

use candle_core::{Device, Result, Tensor};

use crate::model::angles::Angles;
use crate::model::description::{Description, RopeStyle};

/// The rotation of queries and keys by their positions.
pub struct Rope {
    angles: Angles,
    style: RopeStyle,
    rope_dim: usize,
    head_dim: usize,
    device: Device,
}

/// Cosines and sines for the rows of a pass, computed once for all layers with the rotation.
pub struct Turn {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Returns the rotations of a model that have these angles.
    pub fn new(description: &Description, angles: Angles, device: &Device) -> Self {
        Self {
            angles,
            style: description.rope_style,
            rope_dim: description.rope_dim,
            head_dim: description.head_dim,
            device: device.clone(),
        }
    }

    /// Returns the turns of rows at these positions, one for each rotation.
    pub fn turns(&self, positions: &[usize]) -> Result<Vec<Turn>> {
        let shape = (positions.len(), self.rope_dim / 2);
        let turn = |rotation| {
            let angles = positions
                .iter()
                .flat_map(|position| self.angles.at(rotation, *position));
            let (cos, sin): (Vec<_>, Vec<_>) = angles.unzip();
            Ok(Turn {
                cos: Tensor::from_vec(cos, shape, &self.device)?,
                sin: Tensor::from_vec(sin, shape, &self.device)?,
            })
        };
        (0..self.angles.rotations()).map(turn).collect()
    }

    /// Rotates `heads` (heads, positions, width).
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
