//! Features in which the layers of a model differ, from its header.

use std::collections::HashSet;

use pool_core::catalog::gguf::GgufFile;
use pool_core::catalog::support::Architecture;

use super::description::{DescriptionError, size};
use super::places::in_layer;

/// Features in which a layer may differ from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKind {
    /// Number of latest positions that a position sees, itself included; `None` for all.
    pub window: Option<usize>,
    /// Index of its rotation in [`Description::rotations`](super::description::Description::rotations).
    pub rotation: usize,
    /// True if queries, keys and values share one tensor.
    pub fused_attention: bool,
    /// True if gate and up-projection share one tensor.
    pub fused_gate: bool,
}

/// Layers of a family that have a window.
#[derive(Debug, Clone, Copy)]
pub(super) enum Windows {
    /// None.
    None,
    /// All but every so many, which have a rotation of their own.
    Most(usize),
    /// All.
    All,
}

/// Returns the layers of a model of at most `available` positions.
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
    let sight = |index: usize| match windows {
        Windows::Most(period) if (index + 1).is_multiple_of(period) => (None, 0),
        Windows::Most(_) => (window, 1),
        Windows::None | Windows::All => (window, 0),
    };
    // Looked up once: a file may have thousands of layers, and of tensors.
    let tensors = header.tensors().iter().map(|tensor| tensor.name.as_str());
    let names: HashSet<&str> = tensors.filter(|_| architecture.fused).collect();
    let lacks = |index: usize, part: &str| {
        architecture.fused && !names.contains(in_layer(index, part).as_str())
    };
    let layer = |index: usize| {
        let (window, rotation) = sight(index);
        LayerKind {
            window,
            rotation,
            fused_attention: lacks(index, "attn_q.weight"),
            fused_gate: lacks(index, "ffn_gate.weight"),
        }
    };
    Ok((0..count).map(layer).collect())
}

/// Context, and window, of the models whose files may be older than the key for the window: Phi-3 mini and medium with 4k. The
/// window is `sliding_window` of their configuration.
const UNSAID_WINDOW: (usize, u64) = (4096, 2047);

/// Returns the window of a model whose layers all have one. Files whose models have none say 0, or more positions than the
/// model has.
fn window_of_all(header: &GgufFile, available: usize) -> Result<Option<usize>, DescriptionError> {
    let window = header.get_arch::<u64>("attention.sliding_window")?;
    let (context, unsaid) = UNSAID_WINDOW;
    let window = window.unwrap_or(if available == context { unsaid } else { 0 });
    let window = usize::try_from(window).unwrap_or(usize::MAX);
    Ok((1..available).contains(&window).then_some(window))
}

/// Returns the width of the feed-forward layers: that of the gate, which only its tensor tells for certain, or where gate and
/// up-projection are one tensor, the header's.
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
