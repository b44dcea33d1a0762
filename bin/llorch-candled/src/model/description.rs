//! Description of a model from its header: sizes, positions and the features that distinguish one family from another.

use pool_core::catalog::gguf::{GgufError, GgufFile};
use pool_core::catalog::support::{self, Unsupported};
use pool_core::lifecycle::DEFAULT_CONTEXT;
use pool_core::worker::CacheType;

use super::layers::{self, LayerKind, Windows};
use super::rotation::Rotation;

/// Largest plausible size of any dimension: far above real models, far below an overflow.
const MAX_SIZE: u64 = 1 << 24;

/// Reason why a model can't be run although its file can be read.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// The header lacks a value or contradicts itself.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// The decoder doesn't know the family.
    #[error(transparent)]
    Architecture(Unsupported),
    /// The decoder doesn't compute a feature of the model.
    #[error("the model needs {feature}, which is not supported")]
    Feature {
        /// Feature that the model needs.
        feature: String,
    },
    /// A number can't be right.
    #[error("the model's {what} is {found}, but {expected}")]
    Size {
        /// Name of the number.
        what: &'static str,
        /// Number in the header or the request.
        found: u64,
        /// Condition that the number breaks.
        expected: String,
    },
    /// More context was requested than the model has.
    #[error(
        "the requested context of {requested} tokens exceeds the model's context of {available}"
    )]
    ContextTooLong {
        /// Requested context in tokens.
        requested: usize,
        /// Longest context of the model in tokens.
        available: usize,
    },
}

/// The pairs of elements of a head that are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Neighbours: 0 with 1, 2 with 3.
    Interleaved,
    /// Halves: 0 with d/2, 1 with d/2 + 1.
    Halves,
}

/// The function that a feed-forward layer applies to its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// x · Φ(x), in the approximation by tanh (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// The properties of a model that a forward pass depends on: sizes and features.
#[derive(Debug, Clone)]
pub struct Description {
    /// Family, as the file names it.
    pub architecture: String,
    /// Layers, in order.
    pub layers: Vec<LayerKind>,
    /// Width of the hidden state.
    pub width: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Key and value heads of a layer; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of a feed-forward layer.
    pub feed_forward: usize,
    /// Activation function of the gates.
    pub activation: Activation,
    /// Factor of the embeddings (1 for most models).
    pub embedding_scale: f32,
    /// Factor of the products of queries and keys.
    pub query_scale: f32,
    /// Number of leading elements of a head that are rotated by position.
    pub rope_dim: usize,
    /// Pairs of elements that are rotated together.
    pub rope_style: RopeStyle,
    /// Rotations, to which [`LayerKind::rotation`] refers.
    pub rotations: Vec<Rotation>,
    /// Number added to the mean square before its root is taken.
    pub rms_epsilon: f32,
    /// Features of the family.
    pub features: Features,
    /// Number of tokens in the vocabulary.
    pub vocab: usize,
    /// Longest context that the model was made for, in tokens.
    pub max_context: usize,
    /// Longest context that is served, in tokens.
    pub context: usize,
    /// Form of keys and values in the cache; the default unless the engine sets another.
    pub cache: CacheType,
}

/// The features that only some families have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// True if queries, keys and values have biases.
    pub attention_bias: bool,
    /// True if queries and keys are normalised head by head.
    pub qk_norm: bool,
    /// True if the results of attention and feed-forward are normalised before they are added.
    pub post_norm: bool,
}

/// The properties that a family's models share and that their files don't state.
struct Family {
    name: &'static str,
    /// The converter of llama files permutes queries and keys; those of other families don't.
    rope_style: RopeStyle,
    activation: Activation,
    features: Features,
    windows: Windows,
}

const PLAIN: Features = Features {
    attention_bias: false,
    qk_norm: false,
    post_norm: false,
};

const FAMILIES: [Family; 5] = [
    Family {
        name: "llama",
        rope_style: RopeStyle::Interleaved,
        activation: Activation::Silu,
        features: PLAIN,
        windows: Windows::None,
    },
    Family {
        name: "qwen2",
        rope_style: RopeStyle::Halves,
        activation: Activation::Silu,
        features: Features {
            attention_bias: true,
            ..PLAIN
        },
        windows: Windows::None,
    },
    Family {
        name: "qwen3",
        rope_style: RopeStyle::Halves,
        activation: Activation::Silu,
        features: Features {
            qk_norm: true,
            ..PLAIN
        },
        windows: Windows::None,
    },
    Family {
        name: "gemma3",
        rope_style: RopeStyle::Halves,
        activation: Activation::GeluTanh,
        features: Features {
            qk_norm: true,
            post_norm: true,
            ..PLAIN
        },
        windows: Windows::Most(6),
    },
    Family {
        name: "phi3",
        rope_style: RopeStyle::Halves,
        activation: Activation::Silu,
        features: PLAIN,
        windows: Windows::All,
    },
];

/// Rotation of gemma3's layers with a window.
const GEMMA3_LOCAL: Rotation = Rotation {
    base: 10_000.0,
    divisor: 1.0,
    factors: None,
    magnitude: 1.0,
};
/// Number of layers of the largest gemma3 (27B), the only one whose queries are scaled by the width divided by the heads.
const GEMMA3_LARGEST: usize = 62;

impl Description {
    /// Reads the description from a header. The context to serve is the requested one, or else the smaller of the model's and
    /// [`DEFAULT_CONTEXT`].
    ///
    /// # Errors
    ///
    /// Fails if the header lacks a number or has an impossible one, if the decoder doesn't compute the model, or if the model
    /// has less context than requested.
    pub fn from_header(
        header: &GgufFile,
        requested: Option<usize>,
    ) -> Result<Self, DescriptionError> {
        let architecture = header.architecture()?.to_owned();
        let known =
            support::check_architecture(&architecture).map_err(DescriptionError::Architecture)?;
        let family = FAMILIES.iter().find(|family| family.name == architecture);
        let family = family.ok_or_else(|| {
            DescriptionError::Architecture(Unsupported::Architecture {
                found: architecture.clone(),
            })
        })?;
        if let Some(experts) = header.get_arch::<u64>("expert_count")?
            && experts > 0
        {
            return Err(DescriptionError::Feature {
                feature: format!("a mixture of {experts} experts"),
            });
        }
        let heads = size("number of heads", header.head_count()?)?;
        let kv_heads = size("number of key and value heads", header.head_count_kv()?)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(DescriptionError::Size {
                what: "number of key and value heads",
                found: kv_heads as u64,
                expected: format!("it must divide the number of heads, {heads}"),
            });
        }
        let head_dim = size("head width", header.head_dim()?)?;
        let value_dim = header.value_head_dim()?;
        if value_dim != head_dim as u64 {
            return Err(DescriptionError::Feature {
                feature: format!(
                    "value heads ({value_dim}) of a different width from key heads ({head_dim})"
                ),
            });
        }
        let rope_dim = match header.get_arch::<u64>("rope.dimension_count")? {
            Some(n) => size("number of rotated dimensions", n)?,
            None => head_dim,
        };
        if rope_dim > head_dim || !rope_dim.is_multiple_of(2) {
            return Err(DescriptionError::Size {
                what: "number of rotated dimensions",
                found: rope_dim as u64,
                expected: format!("it must be even and at most the head width, {head_dim}"),
            });
        }
        let count = size("number of blocks", header.block_count()?)?;
        if count > header.tensors().len() {
            return Err(DescriptionError::Size {
                what: "number of blocks",
                found: count as u64,
                expected: format!("the file has {} tensors", header.tensors().len()),
            });
        }
        let width = size("embedding length", header.embedding_length()?)?;
        let max_context = size("context length", header.context_length()?)?;
        let context = context(requested, max_context)?;
        let layers = layers::layers(header, known, family.windows, count, max_context)?;
        let mut rotations = vec![Rotation::from_header(header, known, max_context, context)?];
        let gemma = architecture == "gemma3";
        if gemma {
            rotations.push(GEMMA3_LOCAL);
        }
        let query_width = if gemma && count == GEMMA3_LARGEST {
            width / heads
        } else {
            head_dim
        };
        let rms_epsilon = header.require_arch::<f64>("attention.layer_norm_rms_epsilon")? as f32;
        Ok(Self {
            width,
            heads,
            kv_heads,
            head_dim,
            feed_forward: layers::feed_forward(header, &layers)?,
            layers,
            activation: family.activation,
            embedding_scale: if gemma { (width as f32).sqrt() } else { 1.0 },
            query_scale: 1.0 / (query_width as f32).sqrt(),
            rope_dim,
            rope_style: family.rope_style,
            rotations,
            rms_epsilon,
            features: family.features,
            vocab: size("vocabulary size", header.vocab_size()?)?,
            max_context,
            context,
            cache: CacheType::default(),
            architecture,
        })
    }

    /// Returns whether the divisors for a long context are in use. A worker that serves a shorter context of the same model
    /// computes different results.
    pub fn is_long(&self) -> bool {
        let mut rotations = self.rotations.iter();
        rotations.any(|rotation| rotation.factors == Some(support::LONG_FACTORS))
    }
}

/// Returns the context to serve, in tokens.
fn context(requested: Option<usize>, available: usize) -> Result<usize, DescriptionError> {
    match requested {
        Some(requested) if requested > available => Err(DescriptionError::ContextTooLong {
            requested,
            available,
        }),
        Some(0) => Err(DescriptionError::Size {
            what: "requested context",
            found: 0,
            expected: "it must be at least 1".to_owned(),
        }),
        Some(requested) => Ok(requested),
        None => Ok(available.min(DEFAULT_CONTEXT as usize)),
    }
}

/// Returns a number that is plausible as a size. Fails if it is 0 or above [`MAX_SIZE`].
pub(super) fn size(what: &'static str, found: u64) -> Result<usize, DescriptionError> {
    if found == 0 || found > MAX_SIZE {
        return Err(DescriptionError::Size {
            what,
            found,
            expected: format!("it must be from 1 to {MAX_SIZE}"),
        });
    }
    Ok(found as usize)
}

/// Returns the header's number for `ARCH.suffix`, or else the default. Fails unless the number is finite and above 0.
pub(super) fn positive(
    suffix: &str,
    header: &GgufFile,
    default: f64,
) -> Result<f64, DescriptionError> {
    let value = header.get_arch::<f64>(suffix)?.unwrap_or(default);
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(DescriptionError::Header(GgufError::WrongValue {
        key: format!("{}.{suffix}", header.architecture()?),
        expected: "a finite number above 0".to_owned(),
        found: format!("the number {value}"),
    }))
}
