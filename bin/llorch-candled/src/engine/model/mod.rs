//! The decoder: one forward pass, driven by the model's configuration, for every supported family.
//!
//! It is our own rather than candle-transformers' because a cache has to belong to a sequence, not to the model, and
//! because those models stop at 4,096 positions and keep every attention mask they ever made.

pub mod cache;
pub mod config;
pub mod rope;
pub mod weights;

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use pool_core::catalog::gguf::GgufFile;

use cache::KvCache;
use config::{ConfigError, ModelConfig};
use rope::{Rope, Turn};
use weights::{WeightError, Weights};

/// Why a decoder can't be made from a file.
#[derive(Debug, thiserror::Error)]
pub enum DecoderError {
    /// Its numbers or features.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its tensors.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The file itself.
    #[error("could not open the model file")]
    Io(#[from] std::io::Error),
}

/// A weight matrix with its bias, where the model has one.
struct Linear {
    weight: QMatMul,
    bias: Option<Tensor>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.weight.forward(x)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: QMatMul,
    query_norm: Option<Tensor>,
    key_norm: Option<Tensor>,
}

struct FeedForward {
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

impl FeedForward {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let gate = candle_nn::ops::silu(&self.gate.forward(x)?)?;
        self.down.forward(&(gate * self.up.forward(x)?)?)
    }
}

struct Block {
    attention_norm: Tensor,
    attention: Attention,
    feed_forward_norm: Tensor,
    feed_forward: FeedForward,
}

/// A loaded model. It holds no state of any sequence.
pub struct Decoder {
    config: ModelConfig,
    device: Device,
    embedding: Arc<QTensor>,
    blocks: Vec<Block>,
    output_norm: Tensor,
    output: QMatMul,
    rope: Rope,
    on_layer: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Decoder {
    /// Loads the weights that `header` describes from the file at `path`. `progress` hears the bytes read so far.
    pub fn load(
        path: &Path,
        header: &GgufFile,
        device: &Device,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, DecoderError> {
        let config = ModelConfig::from_header(header)?;
        let mut weights = Weights::open(path, header, device, progress)?;
        let embedding =
            Arc::new(weights.quantized("token_embd.weight", &[config.vocab, config.width])?);
        let blocks = (0..config.blocks)
            .map(|index| load_block(&mut weights, &config, index))
            .collect::<Result<_, _>>()?;
        let output_norm = weights.vector("output_norm.weight", config.width)?;
        let output = if weights.has("output.weight") {
            weights.matrix("output.weight", config.vocab, config.width)?
        } else {
            // The output shares the embedding's memory.
            QMatMul::from_arc(Arc::clone(&embedding)).map_err(|source| WeightError::Compute {
                name: "token_embd.weight".to_owned(),
                source,
            })?
        };
        let factors = load_rope_factors(&mut weights, &config)?;
        let rope = Rope::new(&config, factors.as_deref(), device);
        Ok(Self {
            config,
            device: device.clone(),
            embedding,
            blocks,
            output_norm,
            output,
            rope,
            on_layer: None,
        })
    }

    /// Calls `told` whenever a layer was computed: a chunk of a prompt takes a large model minutes on a crowded processor.
    pub fn on_layer(&mut self, told: impl Fn() + Send + Sync + 'static) {
        self.on_layer = Some(Box::new(told));
    }

    /// The model's sizes and features.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// An empty cache for a sequence of at most `capacity` positions.
    pub fn new_cache(&self, capacity: usize) -> candle_core::Result<KvCache> {
        KvCache::new(&self.config, capacity, &self.device)
    }

    /// Runs `tokens` after the positions in `cache`, without asking what comes next.
    pub fn advance(&self, tokens: &[u32], cache: &mut KvCache) -> candle_core::Result<()> {
        self.hidden(tokens, cache).map(|_| ())
    }

    /// Runs `tokens` after the positions in `cache`; gives the logits of what follows the last of them.
    pub fn logits(&self, tokens: &[u32], cache: &mut KvCache) -> candle_core::Result<Vec<f32>> {
        let hidden = self.hidden(tokens, cache)?;
        let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?.contiguous()?;
        let normed = candle_nn::ops::rms_norm(&last, &self.output_norm, self.config.rms_epsilon)?;
        // Quantising for the product below would turn what is no number into zeros, and zeros into a plausible token.
        let row: Vec<f32> = normed.flatten_all()?.to_vec1()?;
        if row.iter().any(|value| !value.is_finite()) {
            // Without the backtrace that `bail!` would put into the message.
            let reason = "the last layer's values are not finite: the file may be damaged";
            return Err(candle_core::Error::Msg(reason.to_owned()));
        }
        self.output.forward(&normed)?.squeeze(0)?.to_vec1()
    }

    fn hidden(&self, tokens: &[u32], cache: &mut KvCache) -> candle_core::Result<Tensor> {
        let count = tokens.len();
        if count == 0 || cache.len() + count > cache.capacity() {
            candle_core::bail!(
                "{count} tokens after {} do not fit a cache of {}",
                cache.len(),
                cache.capacity()
            );
        }
        let ids = Tensor::from_slice(tokens, count, &self.device)?;
        let turn = self.rope.turn(cache.len(), count)?;
        let mask = if count > 1 {
            Some(self.causal_mask(count, cache.len())?)
        } else {
            None
        };
        let mut x = self.embedding.embedding(&ids)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let normed =
                candle_nn::ops::rms_norm(&x, &block.attention_norm, self.config.rms_epsilon)?;
            x = (x + self.attend(
                &block.attention,
                index,
                &normed,
                &turn,
                mask.as_ref(),
                cache,
            )?)?;
            let normed =
                candle_nn::ops::rms_norm(&x, &block.feed_forward_norm, self.config.rms_epsilon)?;
            x = (x + block.feed_forward.forward(&normed)?)?;
            if let Some(told) = &self.on_layer {
                told();
            }
        }
        cache.advance(count);
        Ok(x)
    }

    fn attend(
        &self,
        attention: &Attention,
        index: usize,
        x: &Tensor,
        turn: &Turn,
        mask: Option<&Tensor>,
        cache: &KvCache,
    ) -> candle_core::Result<Tensor> {
        let (count, config) = (x.dim(0)?, &self.config);
        let heads = |projection: &Linear, number: usize, norm: Option<&Tensor>| {
            let mut y = projection
                .forward(x)?
                .reshape((count, number, config.head_dim))?;
            if let Some(norm) = norm {
                y = candle_nn::ops::rms_norm(&y, norm, config.rms_epsilon)?;
            }
            y.transpose(0, 1)?.contiguous()
        };
        let query = self.rope.apply(
            &heads(
                &attention.query,
                config.heads,
                attention.query_norm.as_ref(),
            )?,
            turn,
        )?;
        let key = self.rope.apply(
            &heads(&attention.key, config.kv_heads, attention.key_norm.as_ref())?,
            turn,
        )?;
        let value = heads(&attention.value, config.kv_heads, None)?;
        let (keys, values) = cache.append(index, &key.contiguous()?, &value)?;

        // Query heads that share a key head lie side by side, so one product a key head serves all of them.
        let group = config.heads / config.kv_heads;
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let query = (query * scale)?.reshape((config.kv_heads, group * count, config.head_dim))?;
        let total = keys.dim(1)?;
        let mut scores = query.matmul(&keys.t()?)?;
        if let Some(mask) = mask {
            scores = scores
                .reshape((config.heads, count, total))?
                .broadcast_add(mask)?;
            scores = scores.reshape((config.kv_heads, group * count, total))?;
        }
        let mixed = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&values)?;
        let mixed = mixed
            .reshape((config.heads, count, config.head_dim))?
            .transpose(0, 1)?;
        attention.output.forward(
            &mixed
                .reshape((count, config.heads * config.head_dim))?
                .contiguous()?,
        )
    }

    /// 0 where a position may look, minus infinity where it would look ahead.
    fn causal_mask(&self, count: usize, before: usize) -> candle_core::Result<Tensor> {
        let total = before + count;
        let mask: Vec<f32> = (0..count)
            .flat_map(|row| {
                (0..total).map(move |column| {
                    if column <= before + row {
                        0.0
                    } else {
                        f32::NEG_INFINITY
                    }
                })
            })
            .collect();
        Tensor::from_vec(mask, (count, total), &self.device)
    }
}

fn load_block(
    weights: &mut Weights<'_>,
    config: &ModelConfig,
    index: usize,
) -> Result<Block, WeightError> {
    let name = |suffix: &str| format!("blk.{index}.{suffix}");
    let (query_width, kv_width) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let linear = |weights: &mut Weights<'_>, part: &str, rows: usize| {
        Ok::<_, WeightError>(Linear {
            weight: weights.matrix(&name(&format!("{part}.weight")), rows, config.width)?,
            bias: if config.attention_bias {
                Some(weights.vector(&name(&format!("{part}.bias")), rows)?)
            } else {
                None
            },
        })
    };
    let query = linear(weights, "attn_q", query_width)?;
    let key = linear(weights, "attn_k", kv_width)?;
    let value = linear(weights, "attn_v", kv_width)?;
    let mut head_norm = |suffix: &str| {
        if config.qk_norm {
            weights.vector(&name(suffix), config.head_dim).map(Some)
        } else {
            Ok(None)
        }
    };
    let (query_norm, key_norm) = (
        head_norm("attn_q_norm.weight")?,
        head_norm("attn_k_norm.weight")?,
    );
    let inner = weights.rows(&name("ffn_gate.weight"))?;
    Ok(Block {
        attention_norm: weights.vector(&name("attn_norm.weight"), config.width)?,
        attention: Attention {
            query,
            key,
            value,
            output: weights.matrix(&name("attn_output.weight"), config.width, query_width)?,
            query_norm,
            key_norm,
        },
        feed_forward_norm: weights.vector(&name("ffn_norm.weight"), config.width)?,
        feed_forward: FeedForward {
            gate: weights.matrix(&name("ffn_gate.weight"), inner, config.width)?,
            up: weights.matrix(&name("ffn_up.weight"), inner, config.width)?,
            down: weights.matrix(&name("ffn_down.weight"), config.width, inner)?,
        },
    })
}

fn load_rope_factors(
    weights: &mut Weights<'_>,
    config: &ModelConfig,
) -> Result<Option<Vec<f32>>, WeightError> {
    let name = "rope_freqs.weight";
    if !weights.has(name) {
        return Ok(None);
    }
    let factors = weights.vector(name, config.rope_dim / 2)?;
    let values = factors.to_vec1().map_err(|source| WeightError::Compute {
        name: name.to_owned(),
        source,
    })?;
    Ok(Some(values))
}
