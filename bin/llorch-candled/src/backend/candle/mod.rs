//! A model computed with candle's tensors and quantised products: a plain and slow reference to compare other backends with.

mod rope;
mod weights;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{D, DType, Device, Module, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use pool_core::catalog::gguf::GgufFile;

use crate::backend::LoadError;
use crate::backend::tensors::TensorError;
use crate::model::angles::Angles;
use crate::model::description::{Activation, Description};
use crate::model::layers::LayerKind;
use crate::model::places::{self, Place, VectorPlace};
use crate::model::{BLOCK, Batch, Model, ModelError, Run};
use rope::{Rope, Turn};
use weights::Weights;

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Backend(error.to_string())
    }
}

/// A weight matrix with its bias, if the model has one.
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
    activation: Activation,
}

impl FeedForward {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let gate = self.gate.forward(x)?;
        let gate = match self.activation {
            Activation::Silu => silu(&gate)?,
            Activation::GeluTanh => gate.gelu()?,
        };
        self.down.forward(&(gate * self.up.forward(x)?)?)
    }
}

struct Layer {
    kind: LayerKind,
    attention_norm: Tensor,
    attention: Attention,
    attention_post_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    feed_forward: FeedForward,
    feed_forward_post_norm: Option<Tensor>,
    /// Keys and values of all positions of the cache: (positions, heads, width).
    cache: [Tensor; 2],
}

/// A model computed by candle.
pub struct CandleModel {
    description: Description,
    device: Device,
    embedding: Arc<QTensor>,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: QMatMul,
    rope: Rope,
    blocks: usize,
    on_layer: Option<Box<dyn Fn() + Send + Sync>>,
}

impl CandleModel {
    /// Loads the weights of a model from the file at `path`, which `header` was read from, with a cache of `blocks` blocks.
    /// Calls `progress` with the bytes read so far; a `Break` stops the loading.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is missing, has an unexpected shape or type, or can't be read, or if `progress` stops the loading.
    pub fn load(
        path: &Path,
        header: &GgufFile,
        description: Description,
        device: &Device,
        blocks: usize,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Self, LoadError> {
        let mut weights = Weights::open(path, header, device, progress).map_err(LoadError::Io)?;
        let embedding = Arc::new(weights.quantized(&description.embedding_place())?);
        let layers = (0..description.layers.len())
            .map(|index| load_layer(&mut weights, &description, index, blocks))
            .collect::<Result<_, _>>()?;
        let output_norm = weights.vector(&description.output_norm_place())?;
        let output = if weights.has(places::OUTPUT) {
            weights.matrix(&description.output_place())?
        } else {
            // The output shares the embedding's memory.
            QMatMul::from_arc(Arc::clone(&embedding))?
        };
        let angles = Angles::new(&description, |place| {
            weights.vector(place)?.to_vec1().map_err(LoadError::from)
        })?;
        let rope = Rope::new(&description, angles, device);
        Ok(Self {
            description,
            device: device.clone(),
            embedding,
            layers,
            output_norm,
            output,
            rope,
            blocks,
            on_layer: None,
        })
    }

    fn compute(
        &self,
        batch: &Batch<'_>,
        runs: &[Run],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let description = &self.description;
        let tokens: Vec<u32> = batch.rows.iter().map(|row| row.token).collect();
        let ids = Tensor::from_slice(&tokens, tokens.len(), &self.device)?;
        let positions: Vec<usize> = batch.rows.iter().map(|row| row.position).collect();
        let turns = self.rope.turns(&positions)?;
        let mut x = self.embedding.embedding(&ids)?;
        if description.embedding_scale != 1.0 {
            x = (x * f64::from(description.embedding_scale))?;
        }
        let norm = |x: &Tensor, weight: &Tensor| rms_norm(x, weight, description.rms_epsilon);
        let add = |x: Tensor, y: Tensor, post_norm: Option<&Tensor>| match post_norm {
            Some(weight) => x + norm(&y, weight)?,
            None => x + y,
        };
        for layer in &self.layers {
            let normed = norm(&x, &layer.attention_norm)?;
            let turn = &turns[layer.kind.rotation];
            let attended = self.attend(layer, &normed, turn, batch, runs)?;
            x = add(x, attended, layer.attention_post_norm.as_ref())?;
            let normed = norm(&x, &layer.feed_forward_norm)?;
            let fed = layer.feed_forward.forward(&normed)?;
            x = add(x, fed, layer.feed_forward_post_norm.as_ref())?;
            if let Some(report) = &self.on_layer {
                report();
            }
        }
        let wanted: Vec<u32> = (0u32..)
            .zip(batch.rows)
            .filter_map(|(index, row)| row.wanted.then_some(index))
            .collect();
        logits.clear();
        if wanted.is_empty() {
            return Ok(());
        }
        let wanted = Tensor::from_slice(&wanted, wanted.len(), &self.device)?;
        let normed = norm(&x.index_select(&wanted, 0)?, &self.output_norm)?;
        // Quantising for the product below would turn NaN and infinity into zeros, and zeros into a plausible token.
        let rows: Vec<f32> = normed.flatten_all()?.to_vec1()?;
        if rows.iter().any(|value| !value.is_finite()) {
            return Err(ModelError::NotFinite);
        }
        logits.extend(
            self.output
                .forward(&normed)?
                .flatten_all()?
                .to_vec1::<f32>()?,
        );
        Ok(())
    }

    fn attend(
        &self,
        layer: &Layer,
        x: &Tensor,
        turn: &Turn,
        batch: &Batch<'_>,
        runs: &[Run],
    ) -> candle_core::Result<Tensor> {
        let (count, description) = (x.dim(0)?, &self.description);
        let attention = &layer.attention;
        let heads = |projection: &Linear, number: usize, norm: Option<&Tensor>| {
            let y = projection
                .forward(x)?
                .reshape((count, number, description.head_dim))?;
            match norm {
                Some(norm) => rms_norm(&y, norm, description.rms_epsilon),
                None => Ok(y),
            }
        };
        let turned = |heads: Tensor| {
            let turned = self
                .rope
                .apply(&heads.transpose(0, 1)?.contiguous()?, turn)?;
            turned.transpose(0, 1)?.contiguous()
        };
        let query = heads(
            &attention.query,
            description.heads,
            attention.query_norm.as_ref(),
        )?;
        let query = (turned(query)? * f64::from(description.query_scale))?;
        let key = heads(
            &attention.key,
            description.kv_heads,
            attention.key_norm.as_ref(),
        )?;
        let key = turned(key)?;
        let value = heads(&attention.value, description.kv_heads, None)?;
        for (index, row) in batch.rows.iter().enumerate() {
            let place = place(batch.tables[row.sequence], row.position);
            for (cache, fresh) in layer.cache.iter().zip([&key, &value]) {
                cache.slice_set(&fresh.narrow(0, index, 1)?.contiguous()?, 0, place)?;
            }
        }
        let mixed = runs
            .iter()
            .map(|run| self.attend_run(layer, &query, batch, run))
            .collect::<candle_core::Result<Vec<_>>>()?;
        attention.output.forward(&Tensor::cat(&mixed, 0)?)
    }

    /// Computes the attention of the rows of one sequence: (rows, width of the queries).
    fn attend_run(
        &self,
        layer: &Layer,
        query: &Tensor,
        batch: &Batch<'_>,
        run: &Run,
    ) -> candle_core::Result<Tensor> {
        let description = &self.description;
        let (count, first) = (run.rows.len(), batch.rows[run.rows.start].position);
        let total = first + count;
        let table = batch.tables[run.sequence];
        let places: Vec<u32> = (0..total)
            .map(|position| place(table, position) as u32)
            .collect();
        let places = Tensor::from_vec(places, total, &self.device)?;
        let [keys, values] = [&layer.cache[0], &layer.cache[1]].map(|cache| {
            cache
                .index_select(&places, 0)?
                .transpose(0, 1)?
                .contiguous()
        });
        // Query heads that share a key head are adjacent, so one product per key head serves all of them.
        let group = description.heads / description.kv_heads;
        let query = query
            .narrow(0, run.rows.start, count)?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((description.kv_heads, group * count, description.head_dim))?;
        let scores = query
            .matmul(&keys?.t()?)?
            .reshape((description.heads, count, total))?
            .broadcast_add(&self.mask(first, count, layer.kind.window)?)?;
        let shares =
            softmax_last_dim(&scores)?.reshape((description.kv_heads, group * count, total))?;
        shares
            .matmul(&values?)?
            .reshape((description.heads, count, description.head_dim))?
            .transpose(0, 1)?
            .contiguous()?
            .flatten_from(D::Minus2)
    }

    /// Returns the mask of the scores: 0 for positions that a row sees, minus infinity for those ahead of it or behind its window.
    fn mask(
        &self,
        first: usize,
        count: usize,
        window: Option<usize>,
    ) -> candle_core::Result<Tensor> {
        let total = first + count;
        let seen = |row: usize, column: usize| {
            let position = first + row;
            column <= position && window.is_none_or(|window| column + window > position)
        };
        let mask: Vec<f32> = (0..count)
            .flat_map(|row| (0..total).map(move |column| (row, column)))
            .map(|(row, column)| {
                if seen(row, column) {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
            .collect();
        Tensor::from_vec(mask, (count, total), &self.device)
    }
}

impl Model for CandleModel {
    fn description(&self) -> &Description {
        &self.description
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn cache_bytes(&self) -> u64 {
        let elements: usize = self
            .layers
            .iter()
            .flat_map(|layer| &layer.cache)
            .map(Tensor::elem_count)
            .sum();
        (elements * size_of::<f32>()) as u64
    }

    fn pass_bytes(&self, rows: usize, wanted: usize, positions: usize) -> u64 {
        // Scores of all heads (before their mask, after it, and as shares), the mask, and copies of keys and values.
        let scores = (3 * self.description.heads + 1) * rows * positions;
        let copies = 2 * self.description.kv_width() * positions;
        ((scores + copies + wanted * self.description.vocab) * size_of::<f32>()) as u64
    }

    fn on_layer(&mut self, report: Box<dyn Fn() + Send + Sync>) {
        self.on_layer = Some(report);
    }

    fn share(&mut self, units: usize, unit: &(dyn Fn(usize) + Sync)) {
        (0..units).for_each(unit);
    }

    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let Description {
            vocab, max_context, ..
        } = self.description;
        let runs = batch.runs(vocab, max_context, self.blocks)?;
        self.compute(batch, &runs, logits)
    }
}

/// Returns the place of a position in the cache.
fn place(table: &[u32], position: usize) -> usize {
    table[position / BLOCK] as usize * BLOCK + position % BLOCK
}

fn load_layer(
    weights: &mut Weights<'_>,
    description: &Description,
    index: usize,
    blocks: usize,
) -> Result<Layer, LoadError> {
    let at = description.layer_places(index);
    let mut linear = |matrix: &Place, bias: &Option<VectorPlace>| {
        Ok::<_, TensorError>(Linear {
            bias: weights.vector_if(bias)?,
            weight: weights.matrix(matrix)?,
        })
    };
    let query = linear(&at.query, &at.query_bias)?;
    let key = linear(&at.key, &at.key_bias)?;
    let value = linear(&at.value, &at.value_bias)?;
    let shape = (blocks * BLOCK, description.kv_heads, description.head_dim);
    let device = weights.device();
    let empty = || Tensor::zeros(shape, DType::F32, device).map_err(LoadError::from);
    Ok(Layer {
        kind: description.layers[index],
        attention_norm: weights.vector(&at.attention_norm)?,
        cache: [empty()?, empty()?],
        attention: Attention {
            query,
            key,
            value,
            output: weights.matrix(&at.output)?,
            query_norm: weights.vector_if(&at.query_norm)?,
            key_norm: weights.vector_if(&at.key_norm)?,
        },
        attention_post_norm: weights.vector_if(&at.attention_post_norm)?,
        feed_forward_norm: weights.vector(&at.feed_forward_norm)?,
        feed_forward: FeedForward {
            gate: weights.matrix(&at.gate)?,
            up: weights.matrix(&at.up)?,
            down: weights.matrix(&at.down)?,
            activation: description.activation,
        },
        feed_forward_post_norm: weights.vector_if(&at.feed_forward_post_norm)?,
    })
}
