//! The model files that a worker of this version can run.
//!
//! Everything that accepts a model (import, download, catalogue, spawn, submit) uses this module, and the worker takes its own
//! lists from here. A file that passes [`check`] has every feature, tensor and tokenizer that the engine needs.

use std::collections::HashMap;
use std::path::Path;

use super::gguf::{GgufError, GgufFile, Value};

/// A family of models that the engine computes.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// Name of the architecture in GGUF files.
    pub name: &'static str,
    /// Names of each block's tensors, without the prefix `blk.N.`.
    pub block_tensors: &'static [&'static str],
    /// True if a file may have one tensor for queries, keys and values of a block (`attn_qkv`), and one for gate and
    /// up-projection (`ffn_up`).
    pub fused: bool,
    /// True if a file may have two sets of divisors of the rotary frequencies (LongRoPE).
    pub long_rope: bool,
}

impl Architecture {
    /// Returns whether the engine supports a context extension (`ARCH.rope.scaling.type`).
    pub fn has_scaling(&self, kind: &str) -> bool {
        ROPE_SCALING.contains(&kind) || self.long_rope && LONG_ROPE.contains(&kind)
    }
}

/// The tensors of a plain block: attention, a gated feed-forward layer and their norms.
const PLAIN_BLOCK: [&str; 9] = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
];

/// All architectures that the engine supports.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "gemma3",
        block_tensors: &[
            "attn_norm.weight",
            "attn_q.weight",
            "attn_q_norm.weight",
            "attn_k.weight",
            "attn_k_norm.weight",
            "attn_v.weight",
            "attn_output.weight",
            "post_attention_norm.weight",
            "ffn_norm.weight",
            "ffn_gate.weight",
            "ffn_up.weight",
            "ffn_down.weight",
            "post_ffw_norm.weight",
        ],
        fused: false,
        long_rope: false,
    },
    Architecture {
        name: "llama",
        block_tensors: &PLAIN_BLOCK,
        fused: false,
        long_rope: false,
    },
    Architecture {
        name: "phi3",
        block_tensors: &PLAIN_BLOCK,
        fused: true,
        long_rope: true,
    },
    Architecture {
        name: "qwen2",
        block_tensors: &[
            "attn_norm.weight",
            "attn_q.weight",
            "attn_q.bias",
            "attn_k.weight",
            "attn_k.bias",
            "attn_v.weight",
            "attn_v.bias",
            "attn_output.weight",
            "ffn_norm.weight",
            "ffn_gate.weight",
            "ffn_up.weight",
            "ffn_down.weight",
        ],
        fused: false,
        long_rope: false,
    },
    Architecture {
        name: "qwen3",
        block_tensors: &[
            "attn_norm.weight",
            "attn_q.weight",
            "attn_q_norm.weight",
            "attn_k.weight",
            "attn_k_norm.weight",
            "attn_v.weight",
            "attn_output.weight",
            "ffn_norm.weight",
            "ffn_gate.weight",
            "ffn_up.weight",
            "ffn_down.weight",
        ],
        fused: false,
        long_rope: false,
    },
];

/// Tensors outside of the blocks that every model has. Without an output matrix, the embedding takes its role.
const MODEL_TENSORS: [&str; 2] = ["token_embd.weight", "output_norm.weight"];

/// Kinds of vocabulary that the worker supports (`tokenizer.ggml.model`).
pub const TOKENIZER_KINDS: &[&str] = &["gpt2", "llama"];

/// Rules for splitting text before merging (`tokenizer.ggml.pre`) that the worker supports for the kind `gpt2`.
pub const PRE_TOKENIZERS: &[&str] = &[
    "default",
    "dbrx",
    "gpt-2",
    "gpt-4o",
    "smollm",
    "llama-bpe",
    "qwen2",
];

/// Element types that the engine supports.
pub const TENSOR_TYPES: &[&str] = &[
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K",
];

/// Context extensions (`ARCH.rope.scaling.type`) that the engine supports for every architecture.
const ROPE_SCALING: [&str; 2] = ["none", "linear"];

/// Names of LongRoPE as a context extension. Most files that use it have the tensors but no name.
const LONG_ROPE: [&str; 2] = ["longrope", "su"];

/// Tensor with the divisors of rotary frequencies for contexts longer than the original one (LongRoPE).
pub const LONG_FACTORS: &str = "rope_factors_long.weight";

/// Tensor with the divisors for all other contexts.
pub const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// The reason no worker of this version can run a model.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// The file is one of several that make up the model.
    #[error(
        "it is part {part} of a model that is split into {count} files, and only whole files are supported"
    )]
    Split {
        /// Number of the part, from 1.
        part: u64,
        /// Number of parts.
        count: u64,
    },
    /// The file supplements a model, such as an adapter or a projector.
    #[error("it is a file of type `{found}`, not a language model")]
    NotAModel {
        /// `general.type` of the file.
        found: String,
    },
    /// The engine does not support the architecture.
    #[error("architecture `{found}` is not supported (supported: {})", names(ARCHITECTURES).join(", "))]
    Architecture {
        /// Architecture of the file or the catalogue entry.
        found: String,
    },
    /// The engine does not support a feature of the model.
    #[error("the model needs {feature}, which is not supported")]
    Feature {
        /// Description of the feature.
        feature: String,
    },
    /// The worker does not support the kind of vocabulary.
    #[error("tokenizer kind `{found}` is not supported (supported: {})", TOKENIZER_KINDS.join(", "))]
    Tokenizer {
        /// `tokenizer.ggml.model` of the file.
        found: String,
    },
    /// The worker does not support the splitting rule.
    #[error("pre-tokenizer `{found}` is not supported (supported: {})", PRE_TOKENIZERS.join(", "))]
    PreTokenizer {
        /// `tokenizer.ggml.pre` of the file.
        found: String,
    },
    /// The engine does not support the element type of a tensor.
    #[error("tensor `{tensor}` is stored as {ty}, which is not supported (supported: {})", TENSOR_TYPES.join(", "))]
    TensorType {
        /// Name of the tensor.
        tensor: String,
        /// Element type of the tensor.
        ty: &'static str,
    },
    /// A tensor of the model is missing.
    #[error("the file has no tensor `{tensor}`")]
    MissingTensor {
        /// Name of the tensor.
        tensor: String,
    },
    /// The header lacks a value that the engine needs, or contradicts itself.
    #[error(transparent)]
    Header(#[from] GgufError),
}

impl Unsupported {
    /// Returns what to try next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Split { .. } => {
                "join the parts with `llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf`, then \
                 `llorch-pool models import WHOLE.gguf`"
            }
            Self::NotAModel { .. } => {
                "use the model file itself: adapters and projectors are not supported"
            }
            Self::Architecture { .. }
            | Self::Feature { .. }
            | Self::Tokenizer { .. }
            | Self::PreTokenizer { .. } => {
                "use another model: `llorch-pool models catalog` shows which ones run"
            }
            Self::TensorType { .. } => {
                "use another quantization of the model, such as Q4_K_M or Q8_0"
            }
            Self::MissingTensor { .. } | Self::Header(_) => {
                "the file is incomplete or was made by a faulty converter: use another file"
            }
        }
    }
}

fn names(architectures: &[Architecture]) -> Vec<&'static str> {
    architectures.iter().map(|known| known.name).collect()
}

/// Fails unless a worker can run the file with this header.
pub fn check(header: &GgufFile) -> Result<(), Unsupported> {
    check_kind(header)?;
    let architecture = check_architecture(header.architecture()?)?;
    check_features(header, architecture)?;
    check_tokenizer(header)?;
    check_tensors(header, architecture)
}

/// Checks the file at `path` like [`check`], and also recognises a part of a split model by its file name.
pub fn check_file(path: &Path, header: &GgufFile) -> Result<(), Unsupported> {
    let refused = match check(header) {
        Err(refused @ (Unsupported::MissingTensor { .. } | Unsupported::Header(_))) => refused,
        outcome => return outcome,
    };
    let name = path.file_name().and_then(|name| name.to_str());
    check_file_name(name.unwrap_or_default())?;
    Err(refused)
}

/// Returns the architecture called `name`, or fails if the engine does not support it.
pub fn check_architecture(name: &str) -> Result<&'static Architecture, Unsupported> {
    let known = ARCHITECTURES.iter().find(|known| known.name == name);
    known.ok_or_else(|| Unsupported::Architecture {
        found: name.to_owned(),
    })
}

/// Fails if a file's name marks it as one part of a split model: `NAME-00001-of-00003.gguf`.
pub fn check_file_name(name: &str) -> Result<(), Unsupported> {
    let number = |digits: &str| {
        (digits.len() == 5)
            .then(|| digits.parse::<u64>().ok())
            .flatten()
    };
    let parts = name.strip_suffix(".gguf").and_then(|stem| {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (_, part) = rest.rsplit_once('-')?;
        Some((number(part)?, number(count)?))
    });
    match parts {
        Some((part, count)) if count > 1 => Err(Unsupported::Split { part, count }),
        _ => Ok(()),
    }
}

fn check_kind(header: &GgufFile) -> Result<(), Unsupported> {
    let count = header.get::<u64>("split.count")?.unwrap_or(1);
    if count > 1 {
        let part = header.get::<u64>("split.no")?.unwrap_or(0);
        return Err(Unsupported::Split {
            part: part.saturating_add(1),
            count,
        });
    }
    match header.get::<&str>("general.type")? {
        None | Some("model") => Ok(()),
        Some(other) => Err(Unsupported::NotAModel {
            found: other.to_owned(),
        }),
    }
}

/// Returns whether a file has two sets of divisors of the rotary frequencies, one for the original context and one for longer
/// contexts.
pub fn has_long_rope(header: &GgufFile, architecture: &Architecture) -> Result<bool, GgufError> {
    if !architecture.long_rope {
        return Ok(false);
    }
    let kind = header.get_arch::<&str>("rope.scaling.type")?;
    let has = |name| header.tensor(name).is_some();
    let is_named = kind.is_some_and(|kind| LONG_ROPE.contains(&kind));
    Ok(is_named || has(LONG_FACTORS) || has(SHORT_FACTORS))
}

fn check_features(header: &GgufFile, architecture: &Architecture) -> Result<(), Unsupported> {
    let feature = |feature: String| Err(Unsupported::Feature { feature });
    let experts = header.expert_count()?;
    if experts > 0 {
        return feature(format!("a mixture of {experts} experts"));
    }
    let (keys, values) = (header.head_dim()?, header.value_head_dim()?);
    if keys != values {
        return feature(format!(
            "value heads ({values}) of a different width than key heads ({keys})"
        ));
    }
    let key = format!("{}.rope.scaling.type", header.architecture()?);
    if let Some(Value::String(kind)) = header.metadata().get(&key)
        && !architecture.has_scaling(kind)
    {
        return feature(format!("rope scaling of type `{kind}`"));
    }
    // Require the values without which the engine can't compute.
    header.head_count_kv()?;
    header.context_length()?;
    header.require_arch::<f64>("attention.layer_norm_rms_epsilon")?;
    if architecture.name == "gemma3" {
        header.require_arch::<u64>("attention.sliding_window")?;
    }
    if architecture.fused && header.tensor("blk.0.ffn_gate.weight").is_none() {
        header.feed_forward_length()?;
    }
    Ok(())
}

fn check_tokenizer(header: &GgufFile) -> Result<(), Unsupported> {
    let kind = header.tokenizer_kind()?;
    if !TOKENIZER_KINDS.contains(&kind) {
        return Err(Unsupported::Tokenizer {
            found: kind.to_owned(),
        });
    }
    // A vocabulary of scored pieces needs no splitting rule.
    match header.tokenizer_pre()? {
        Some(pre) if kind == "gpt2" && !PRE_TOKENIZERS.contains(&pre) => {
            Err(Unsupported::PreTokenizer {
                found: pre.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

fn check_tensors(header: &GgufFile, architecture: &Architecture) -> Result<(), Unsupported> {
    // Index the tensors by name once, because a large model has thousands.
    let found: HashMap<_, _> = header
        .tensors()
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor.ty.name()))
        .collect();
    let readable = |name: String| match found.get(name.as_str()) {
        None => Err(Unsupported::MissingTensor { tensor: name }),
        Some(ty) if !TENSOR_TYPES.contains(ty) => Err(Unsupported::TensorType { tensor: name, ty }),
        Some(_) => Ok(()),
    };
    for name in MODEL_TENSORS {
        readable(name.to_owned())?;
    }
    for block in 0..header.block_count()? {
        let name = |part: &str| format!("blk.{block}.{part}");
        for part in architecture.block_tensors {
            let fused = fused_tensor(part).filter(|_| architecture.fused);
            let fused = fused.filter(|(first, _)| !found.contains_key(name(first).as_str()));
            readable(name(fused.map_or(part, |(_, fused)| fused)))?;
        }
    }
    if has_long_rope(header, architecture)? {
        for name in [LONG_FACTORS, SHORT_FACTORS] {
            readable(name.to_owned())?;
        }
    }
    // The output matrix is optional, so it is checked only if present.
    match found.contains_key("output.weight") {
        true => readable("output.weight".to_owned()),
        false => Ok(()),
    }
}

/// Returns the name of the first tensor in the same fused tensor as `part`, and the name of the fused tensor. A file without
/// the first has the fused one.
fn fused_tensor(part: &str) -> Option<(&'static str, &'static str)> {
    match part {
        "attn_q.weight" | "attn_k.weight" | "attn_v.weight" => {
            Some(("attn_q.weight", "attn_qkv.weight"))
        }
        "ffn_gate.weight" => Some(("ffn_gate.weight", "ffn_up.weight")),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
