//! What a model is, from its header: sizes, positions and the features that tell one family from another.

use pool_core::catalog::gguf::{GgufError, GgufFile, Value};
use pool_core::catalog::support::{self, Unsupported};

/// Context a worker takes where nobody asks for another: the smaller of the model's and this.
pub const DEFAULT_CONTEXT: usize = 4096;

/// Largest size of any dimension that is believed; far above real models, far below an overflow.
const MAX_SIZE: u64 = 1 << 24;

/// Why a model can't be run, though its file is in order.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The header lacks something or contradicts itself.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// A family the decoder doesn't know.
    #[error(transparent)]
    Architecture(Unsupported),
    /// A feature the decoder doesn't compute.
    #[error("the model needs {feature}, which is not supported")]
    Feature {
        /// What it needs.
        feature: String,
    },
    /// A number that can't be right.
    #[error("the model's {what} is {found}, {expected}")]
    Size {
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: String,
    },
    /// More context asked for than the model has.
    #[error("a context of {requested} tokens was asked for, the model was made for {available}")]
    ContextTooLong {
        /// What was asked for.
        requested: usize,
        /// What the model has.
        available: usize,
    },
}

/// Which elements of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Neighbours: 0 with 1, 2 with 3.
    Interleaved,
    /// Halves: 0 with d/2, 1 with d/2 + 1.
    Halves,
}

/// Sizes and features of a decoder.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// As the file names it.
    pub architecture: String,
    /// Transformer blocks.
    pub blocks: usize,
    /// Width of the hidden state.
    pub width: usize,
    /// Query heads a block.
    pub heads: usize,
    /// Key and value heads a block; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Leading elements of a head that are turned by position.
    pub rope_dim: usize,
    /// Base of the position's frequencies.
    pub rope_base: f64,
    /// Positions are divided by this (linear scaling; 1 for most models).
    pub rope_divisor: f64,
    /// Which elements turn together.
    pub rope_style: RopeStyle,
    /// Added to the mean square before its root is taken.
    pub rms_epsilon: f32,
    /// Queries, keys and values have biases (qwen2).
    pub attention_bias: bool,
    /// Queries and keys are normalised head by head (qwen3).
    pub qk_norm: bool,
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// Longest context the model was made for.
    pub max_context: usize,
}

impl ModelConfig {
    /// Reads the configuration from a header.
    pub fn from_header(header: &GgufFile) -> Result<Self, ConfigError> {
        let architecture = header.architecture()?.to_owned();
        support::check_architecture(&architecture).map_err(ConfigError::Architecture)?;
        if let Some(experts) = header.get_arch::<u64>("expert_count")?
            && experts > 0
        {
            return Err(ConfigError::Feature {
                feature: format!("a mixture of {experts} experts"),
            });
        }
        let heads = size("number of heads", header.head_count()?)?;
        let kv_heads = size("number of key and value heads", header.head_count_kv()?)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(ConfigError::Size {
                what: "number of key and value heads",
                found: kv_heads as u64,
                expected: format!("it must divide the number of heads, {heads}"),
            });
        }
        let head_dim = size("head width", header.head_dim()?)?;
        let value_dim = header.value_head_dim()?;
        if value_dim != head_dim as u64 {
            return Err(ConfigError::Feature {
                feature: format!(
                    "value heads ({value_dim}) of another width than key heads ({head_dim})"
                ),
            });
        }
        let rope_dim = match header.get_arch::<u64>("rope.dimension_count")? {
            Some(n) => size("number of rotated dimensions", n)?,
            None => head_dim,
        };
        if rope_dim > head_dim || !rope_dim.is_multiple_of(2) {
            return Err(ConfigError::Size {
                what: "number of rotated dimensions",
                found: rope_dim as u64,
                expected: format!("it must be even and at most the head width, {head_dim}"),
            });
        }
        let rope_base = positive("rope.freq_base", header, 10_000.0)?;
        let rms_epsilon = header.require_arch::<f64>("attention.layer_norm_rms_epsilon")? as f32;
        Ok(Self {
            blocks: size("number of blocks", header.block_count()?)?,
            width: size("embedding length", header.embedding_length()?)?,
            heads,
            kv_heads,
            head_dim,
            rope_dim,
            rope_base,
            rope_divisor: rope_divisor(header)?,
            // The converter of llama files permutes queries and keys; that of the qwen families doesn't.
            rope_style: if architecture == "llama" {
                RopeStyle::Interleaved
            } else {
                RopeStyle::Halves
            },
            rms_epsilon,
            attention_bias: architecture == "qwen2",
            qk_norm: architecture == "qwen3",
            vocab: size("vocabulary", header.vocab_size()?)?,
            max_context: size("context length", header.context_length()?)?,
            architecture,
        })
    }

    /// The context to serve: what was asked for, else the smaller of the model's and [`DEFAULT_CONTEXT`].
    pub fn context_length(&self, requested: Option<usize>) -> Result<usize, ConfigError> {
        match requested {
            Some(requested) if requested > self.max_context => Err(ConfigError::ContextTooLong {
                requested,
                available: self.max_context,
            }),
            Some(0) => Err(ConfigError::Size {
                what: "context asked for",
                found: 0,
                expected: "it must be at least 1".to_owned(),
            }),
            Some(requested) => Ok(requested),
            None => Ok(self.max_context.min(DEFAULT_CONTEXT)),
        }
    }
}

fn size(what: &'static str, found: u64) -> Result<usize, ConfigError> {
    if found == 0 || found > MAX_SIZE {
        return Err(ConfigError::Size {
            what,
            found,
            expected: format!("it must be from 1 to {MAX_SIZE}"),
        });
    }
    Ok(found as usize)
}

fn positive(suffix: &str, header: &GgufFile, default: f64) -> Result<f64, ConfigError> {
    let value = header.get_arch::<f64>(suffix)?.unwrap_or(default);
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(ConfigError::Header(GgufError::WrongValue {
        key: format!("{}.{suffix}", header.architecture()?),
        expected: "a finite number above 0".to_owned(),
        found: format!("the number {value}"),
    }))
}

/// Linear scaling divides positions. The other ways of stretching a context change the computation, and a model
/// that needs one would answer nonsense without it, so they are refused by name.
fn rope_divisor(header: &GgufFile) -> Result<f64, ConfigError> {
    let key = format!("{}.rope.scaling.type", header.architecture()?);
    match header.metadata().get(&key) {
        None => Ok(1.0),
        Some(Value::String(kind)) if kind == "none" => Ok(1.0),
        Some(Value::String(kind)) if kind == "linear" => {
            positive("rope.scaling.factor", header, 1.0)
        }
        Some(Value::String(kind)) => Err(ConfigError::Feature {
            feature: format!("rope scaling of type `{kind}`"),
        }),
        Some(_) => Err(ConfigError::Header(GgufError::WrongValue {
            key,
            expected: "a text".to_owned(),
            found: "something else".to_owned(),
        })),
    }
}
