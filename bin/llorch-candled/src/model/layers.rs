//! Features in which the layers of a model differ, from its header.

use std::collections::HashSet;

use pool_core::catalog::gguf::GgufFile;
use pool_core::catalog::support::Architecture;

use super::description::{DescriptionError, size};
use super::places::in_layer;

/// The features in which a layer may differ from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKind {
    /// Number of latest positions that a position sees, including itself; `None` for all.
    pub window: Option<usize>,
    /// Index of the layer's rotation in [`Description::rotations`](super::description::Description::rotations).
    pub rotation: usize,
    /// True if queries, keys and values share one tensor.
    pub fused_attention: bool,
    /// True if gate and up-projection share one tensor.
    pub fused_gate: bool,
}

/// The layers of a family that have an attention window.
#[derive(Debug, Clone, Copy)]
pub(super) enum Windows {
    /// No layer.
    None,
    /// All but every n-th layer. The layers with a window use the second rotation.
    Most(usize),
    /// All layers.
    All,
}

/// Returns the layers of a model with at most `available` positions.
pub(super) fn layers(
    header: &GgufFile,
    architecture: &Architecture,
    windows: Windows,
    count: usize,
    available: usize,
) -> Result<Vec<LayerKind>, DescriptionError> {
    let window = match windows {
        Windows::None => None,
        Windows::Most(_) => {
            let window = header.require_arch::<u64>("attention.sliding_window")?;
            Some(size("attention window", window)?)
        }
        Windows::All => window_of_all(header, available)?,
    };
    let window_and_rotation = |index: usize| match windows {
        Windows::Most(period) if (index + 1).is_multiple_of(period) => (None, 0),
        Windows::Most(_) => (window, 1),
        Windows::None | Windows::All => (window, 0),
    };
    // Collected once: a file may have thousands of layers and of tensors.
    let tensors = header.tensors().iter().map(|tensor| tensor.name.as_str());
    let names: HashSet<&str> = tensors.filter(|_| architecture.fused).collect();
    let lacks = |index: usize, part: &str| {
        architecture.fused && !names.contains(in_layer(index, part).as_str())
    };
    let layer = |index: usize| {
        let (window, rotation) = window_and_rotation(index);
        LayerKind {
            window,
            rotation,
            fused_attention: lacks(index, "attn_q.weight"),
            fused_gate: lacks(index, "ffn_gate.weight"),
        }
    };
    Ok((0..count).map(layer).collect())
}

/// Context of models whose files may predate the key for the window: Phi-3 mini and medium with 4k.
const UNSTATED_WINDOW_CONTEXT: usize = 4096;
/// Window of these models: `sliding_window` in their configuration.
const UNSTATED_WINDOW: u64 = 2047;

/// Returns the window of a model whose layers all have one. Files of models without a window say 0, or at least as many
/// positions as the model has.
fn window_of_all(header: &GgufFile, available: usize) -> Result<Option<usize>, DescriptionError> {
    let window = header.get_arch::<u64>("attention.sliding_window")?;
    let unstated = if available == UNSTATED_WINDOW_CONTEXT {
        UNSTATED_WINDOW
    } else {
        0
    };
    let window = window.unwrap_or(unstated);
    let window = usize::try_from(window).unwrap_or(usize::MAX);
    Ok((1..available).contains(&window).then_some(window))
}

/// Returns the width of the feed-forward layers: the rows of the gate, whose tensor alone is certain to have it, or the
/// header's number if gate and up-projection share one tensor.
pub(super) fn feed_forward(
    header: &GgufFile,
    layers: &[LayerKind],
) -> Result<usize, DescriptionError> {
    let width = if layers.first().is_some_and(|layer| layer.fused_gate) {
        header.feed_forward_length()?
    } else {
        let gate = header.tensor("blk.0.ffn_gate.weight");
        let rows = gate.and_then(|tensor| tensor.dims.last().copied());
        rows.unwrap_or_default()
    };
    size("feed-forward width", width)
}
