//! The forward pass.
//!
//! A layer consists of eleven sections of work. The team splits the large ones: by rows of the batch for norms and gates, by
//! tiles of weights for products, by blocks of the cache for keys and values, and by heads for attention.

mod attend;
mod input;

use super::elementwise::{Gate, RmsNorm, RmsNormInPlace};
use super::lanes::Tier;
use super::load::Load;
use super::pack::PackedMatrix;
use super::pages::Pages;
use super::product::{Output, multiply};
use super::quantize::Block32;
use super::shared::Shared;
use super::team::Team;
use crate::model::angles::Angles;
use crate::model::description::Description;
use crate::model::layers::LayerKind;
use crate::model::{BLOCK, Batch, Model, ModelError, Row, Run};
use input::{Input, Needs};

/// Number of query rows that attention computes together.
const TOGETHER: usize = 8;
/// Units of a product for each thread: enough that a late thread doesn't delay the others for long.
const UNITS_PER_THREAD: usize = 6;

/// A weight matrix with its bias, if the model has one.
pub(super) struct Projection {
    pub matrix: PackedMatrix,
    pub bias: Option<Vec<f32>>,
}

/// Weights of a layer, and its part of the cache.
pub(super) struct Layer {
    pub kind: LayerKind,
    pub attention_norm: Vec<f32>,
    pub query: Projection,
    pub key: Projection,
    pub value: Projection,
    pub query_norm: Option<Vec<f32>>,
    pub key_norm: Option<Vec<f32>>,
    pub output: PackedMatrix,
    pub attention_post_norm: Option<Vec<f32>>,
    pub feed_forward_norm: Vec<f32>,
    pub gate: PackedMatrix,
    pub up: PackedMatrix,
    pub down: PackedMatrix,
    pub feed_forward_post_norm: Option<Vec<f32>>,
    /// Keys of all blocks: `[block][head][dimension][position]`.
    pub keys: Pages,
    /// Values of all blocks: `[block][head][group of dimensions][position][dimension]`.
    pub values: Pages,
}

/// Weights of a model.
pub(super) struct Weights {
    pub embedding: PackedMatrix,
    pub layers: Vec<Layer>,
    pub output_norm: Vec<f32>,
    /// `None` if the embedding is the output matrix as well.
    pub output: Option<PackedMatrix>,
}

/// A model computed by our own kernels.
pub struct CpuModel {
    description: Description,
    tier: Tier,
    team: Team,
    angles: Angles,
    weights: Weights,
    blocks: usize,
    buffers: Buffers,
    on_layer: Option<Box<dyn Fn() + Send + Sync>>,
}

/// Working memory of a pass, kept between passes.
#[derive(Default)]
struct Buffers {
    /// Hidden state: rows × width.
    hidden: Vec<f32>,
    /// Result of the last product, to be added to the hidden state.
    update: Vec<f32>,
    normed: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    gates: Vec<f32>,
    ups: Vec<f32>,
    /// Cosines and sines for each rotation, by row and pair.
    turns: Vec<Vec<(f32, f32)>>,
    input: Input,
    /// Attention scores, one buffer per thread.
    scores: Vec<Vec<f32>>,
}

/// Rows of a run whose keys and values belong to one block of the cache.
struct Piece {
    rows: std::ops::Range<usize>,
    block: usize,
}

impl CpuModel {
    pub(super) fn new(
        description: Description,
        load: Load,
        team: Team,
        angles: Angles,
        weights: Weights,
    ) -> Self {
        let buffers = Buffers {
            turns: vec![Vec::new(); angles.rotations()],
            scores: vec![Vec::new(); team.threads()],
            ..Buffers::default()
        };
        Self {
            description,
            tier: load.tier,
            team,
            angles,
            weights,
            blocks: load.blocks,
            buffers,
            on_layer: None,
        }
    }

    fn compute(
        &mut self,
        batch: &Batch<'_>,
        runs: &[Run],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let pass = Pass {
            description: &self.description,
            tier: self.tier,
            batch,
            runs,
            pieces: pieces(batch, runs),
        };
        let (team, buffers, weights) = (&mut self.team, &mut self.buffers, &mut self.weights);
        pass.begin(&self.angles, &weights.embedding, buffers);
        let mut post_norm = None;
        let mut updated = false;
        for layer in &mut weights.layers {
            let needs = Needs::of(&[&layer.query.matrix, &layer.key.matrix, &layer.value.matrix]);
            pass.add_and_norm(
                team,
                buffers,
                updated,
                post_norm,
                &layer.attention_norm,
                needs,
            );
            let Buffers {
                normed,
                input,
                queries,
                keys,
                values,
                ..
            } = buffers;
            pass.products(
                team,
                input,
                normed,
                &mut [
                    (&layer.query.matrix, queries),
                    (&layer.key.matrix, keys),
                    (&layer.value.matrix, values),
                ],
            );
            pass.attention(team, buffers, layer);
            pass.product(team, buffers, &layer.output, |buffers| &buffers.attended);
            let needs = Needs::of(&[&layer.gate, &layer.up]);
            let post = layer.attention_post_norm.as_deref();
            pass.add_and_norm(team, buffers, true, post, &layer.feed_forward_norm, needs);
            let Buffers {
                normed,
                input,
                gates,
                ups,
                ..
            } = buffers;
            pass.products(
                team,
                input,
                normed,
                &mut [(&layer.gate, gates), (&layer.up, ups)],
            );
            pass.gate(team, buffers, &layer.down);
            pass.product(team, buffers, &layer.down, |buffers| &buffers.gates);
            post_norm = layer.feed_forward_post_norm.as_deref();
            updated = true;
            if let Some(report) = &self.on_layer {
                report();
            }
        }
        let output = weights.output.as_ref().unwrap_or(&weights.embedding);
        pass.finish(
            team,
            buffers,
            post_norm,
            &weights.output_norm,
            output,
            logits,
        )
    }
}

/// Splits runs at block boundaries.
fn pieces(batch: &Batch<'_>, runs: &[Run]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for run in runs {
        for index in run.rows.clone() {
            let position = batch.rows[index].position;
            match pieces.last_mut() {
                Some(piece) if index > run.rows.start && !position.is_multiple_of(BLOCK) => {
                    piece.rows.end += 1;
                }
                _ => pieces.push(Piece {
                    rows: index..index + 1,
                    block: batch.tables[run.sequence][position / BLOCK] as usize,
                }),
            }
        }
    }
    pieces
}

/// A pass, with the inputs that don't change in it.
struct Pass<'a> {
    description: &'a Description,
    tier: Tier,
    batch: &'a Batch<'a>,
    runs: &'a [Run],
    pieces: Vec<Piece>,
}

/// Returns row `row` of a row-major matrix.
fn row(values: &[f32], row: usize, width: usize) -> &[f32] {
    &values[row * width..(row + 1) * width]
}

impl Pass<'_> {
    fn rows(&self) -> usize {
        self.batch.rows.len()
    }

    /// Sizes the buffers, looks up the embeddings, and prepares the angles.
    fn begin(&self, angles: &Angles, embedding: &PackedMatrix, buffers: &mut Buffers) {
        let Description {
            width,
            feed_forward,
            embedding_scale,
            ..
        } = *self.description;
        let rows = self.rows();
        let (query_width, kv_width) = (self.description.query_width(), self.description.kv_width());
        for (buffer, width) in [
            (&mut buffers.hidden, width),
            (&mut buffers.update, width),
            (&mut buffers.normed, width),
            (&mut buffers.queries, query_width),
            (&mut buffers.keys, kv_width),
            (&mut buffers.values, kv_width),
            (&mut buffers.attended, query_width),
            (&mut buffers.gates, feed_forward),
            (&mut buffers.ups, feed_forward),
        ] {
            buffer.resize(rows * width, 0.0);
        }
        for (Row { token, .. }, hidden) in self
            .batch
            .rows
            .iter()
            .zip(buffers.hidden.chunks_exact_mut(width))
        {
            embedding.row(*token as usize, hidden);
            if embedding_scale != 1.0 {
                hidden.iter_mut().for_each(|x| *x *= embedding_scale);
            }
        }
        for (rotation, turns) in buffers.turns.iter_mut().enumerate() {
            turns.clear();
            for row in self.batch.rows {
                turns.extend(angles.at(rotation, row.position));
            }
        }
    }

    /// Adds the update, if there is one, to the hidden state, after normalising the update if the model requires it. Then
    /// normalises the sum for the next products.
    fn add_and_norm(
        &self,
        team: &mut Team,
        buffers: &mut Buffers,
        updated: bool,
        post_norm: Option<&[f32]>,
        norm: &[f32],
        needs: Needs,
    ) {
        let (tier, rows) = (self.tier, self.rows());
        let Description {
            width,
            rms_epsilon: epsilon,
            ..
        } = *self.description;
        let hidden = Shared::new(&mut buffers.hidden);
        let update = Shared::new(&mut buffers.update);
        let normed = Shared::new(&mut buffers.normed);
        let writer = buffers.input.writer(tier, rows, width, needs);
        team.run(rows, &|_, index| {
            let range = index * width..(index + 1) * width;
            // SAFETY: unit i accesses only row i of every matrix.
            let [hidden, update, normed] =
                [hidden, update, normed].map(|matrix| unsafe { matrix.part(range.clone()) });
            if updated {
                if let Some(weight) = post_norm {
                    tier.run(RmsNormInPlace {
                        x: update,
                        weight,
                        epsilon,
                    });
                }
                hidden.iter_mut().zip(&*update).for_each(|(x, y)| *x += y);
            }
            tier.run(RmsNorm {
                x: hidden,
                weight: norm,
                epsilon,
                out: normed,
            });
            // SAFETY: each unit writes only its own row.
            unsafe { writer.row(index, normed) };
        });
    }

    /// Multiplies one input by several matrices.
    fn products(
        &self,
        team: &mut Team,
        input: &Input,
        floats: &[f32],
        products: &mut [(&PackedMatrix, &mut Vec<f32>)],
    ) {
        let (tier, rows) = (self.tier, self.rows());
        let tiles: usize = products.iter().map(|(weights, _)| weights.tiles()).sum();
        let units = match team.threads() {
            1 => 1,
            threads => threads * UNITS_PER_THREAD,
        };
        let step = tiles.div_ceil(units);
        let outputs: Vec<_> = products
            .iter_mut()
            .map(|(weights, out)| {
                let columns = weights.rows();
                (*weights, Output::new(out, rows, columns, columns))
            })
            .collect();
        let units: Vec<_> = outputs
            .iter()
            .flat_map(|(weights, output)| {
                let starts = (0..weights.tiles()).step_by(step);
                starts.map(move |start| {
                    let end = weights.tiles().min(start + step);
                    (*weights, output, start..end)
                })
            })
            .collect();
        team.run(units.len(), &|_, index| {
            let (weights, output, tiles) = &units[index];
            // SAFETY: the units' tiles are disjoint.
            let mut part = unsafe { output.part(tiles.clone()) };
            let activations = input.activations(weights, floats);
            multiply(tier, weights, activations, &mut part);
        });
    }

    /// Multiplies one input, which is in the buffers, by a matrix, and stores the result in the update.
    fn product(
        &self,
        team: &mut Team,
        buffers: &mut Buffers,
        weights: &PackedMatrix,
        floats: impl Fn(&Buffers) -> &Vec<f32>,
    ) {
        let mut update = std::mem::take(&mut buffers.update);
        let floats = floats(buffers);
        self.products(team, &buffers.input, floats, &mut [(weights, &mut update)]);
        buffers.update = update;
    }

    /// Quantises the rows of a matrix for a product.
    fn quantize(
        &self,
        team: &mut Team,
        input: &mut Input,
        values: &[f32],
        width: usize,
        weights: &PackedMatrix,
    ) {
        let writer = input.writer(self.tier, self.rows(), width, Needs::of(&[weights]));
        team.run(self.rows(), &|_, index| {
            // SAFETY: each unit writes only its own row.
            unsafe { writer.row(index, row(values, index, width)) };
        });
    }

    /// Applies the gates to the up-projections, and quantises the result for the down-projection.
    fn gate(&self, team: &mut Team, buffers: &mut Buffers, down: &PackedMatrix) {
        let (tier, rows) = (self.tier, self.rows());
        let Description {
            feed_forward: width,
            activation,
            ..
        } = *self.description;
        let gates = Shared::new(&mut buffers.gates);
        let ups = &buffers.ups;
        let writer = buffers.input.writer(tier, rows, width, Needs::of(&[down]));
        team.run(rows, &|_, index| {
            // SAFETY: each unit accesses only its own row.
            let gate = unsafe { gates.part(index * width..(index + 1) * width) };
            tier.run(Gate {
                activation,
                gate,
                up: row(ups, index, width),
            });
            // SAFETY: each unit writes only its own row.
            unsafe { writer.row(index, gate) };
        });
    }

    /// Computes the logits of the rows that want them.
    fn finish(
        &self,
        team: &mut Team,
        buffers: &mut Buffers,
        post_norm: Option<&[f32]>,
        norm: &[f32],
        output: &PackedMatrix,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        // The logits need only some of the rows, which are quantised below.
        self.add_and_norm(team, buffers, true, post_norm, norm, Needs::of(&[]));
        let Description { width, vocab, .. } = *self.description;
        logits.clear();
        let wanted: Vec<_> = (0..self.rows())
            .filter(|index| self.batch.rows[*index].wanted)
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        // Rows move only towards the front, so each is copied before it is overwritten.
        for (to, from) in wanted.iter().enumerate() {
            buffers
                .normed
                .copy_within(from * width..(from + 1) * width, to * width);
        }
        buffers.normed.truncate(wanted.len() * width);
        // Quantising turns NaN and infinity into zeros for some formats, and zeros into a plausible token.
        if buffers.normed.iter().any(|value| !value.is_finite()) {
            return Err(ModelError::NotFinite);
        }
        let last = Pass {
            description: self.description,
            tier: self.tier,
            batch: &Batch {
                rows: &self.batch.rows[..wanted.len()],
                tables: self.batch.tables,
            },
            runs: &[],
            pieces: Vec::new(),
        };
        let Buffers { normed, input, .. } = buffers;
        last.quantize(team, input, normed, width, output);
        logits.resize(wanted.len() * vocab, 0.0);
        last.products(team, input, normed, &mut [(output, logits)]);
        Ok(())
    }
}

impl Model for CpuModel {
    fn description(&self) -> &Description {
        &self.description
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn cache_bytes(&self) -> u64 {
        let layers = self.weights.layers.iter();
        let bytes: usize = layers
            .map(|layer| layer.keys.len() + layer.values.len())
            .sum();
        bytes as u64
    }

    fn pass_bytes(&self, rows: usize, wanted: usize, positions: usize) -> u64 {
        let Description {
            width,
            feed_forward,
            head_dim,
            vocab,
            ..
        } = self.description;
        let (queries, kvs) = (self.description.query_width(), self.description.kv_width());
        let floats = rows * (3 * width + 2 * queries + 2 * kvs + 2 * feed_forward) + wanted * vocab;
        // At most 44 bytes for 32 values.
        let quantised = rows * width.max(feed_forward).max(queries) / 32 * size_of::<Block32>();
        let scores = self.team.threads() * TOGETHER * (positions + head_dim);
        ((floats + scores) * size_of::<f32>() + quantised) as u64
    }

    fn on_layer(&mut self, report: Box<dyn Fn() + Send + Sync>) {
        self.on_layer = Some(report);
    }

    fn share(&mut self, units: usize, unit: &(dyn Fn(usize) + Sync)) {
        self.team.run(units, &|_, index| unit(index));
    }

    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let Description {
            vocab, max_context, ..
        } = self.description;
        let runs = batch.runs(vocab, max_context, self.blocks)?;
        self.compute(batch, &runs, logits)
    }
}
