//! The forward pass.
//!
//! A layer is eleven sections of work, of which the team shares out those that are large: the rows of the batch for norms and
//! gates, tiles of weights for products, blocks of the cache for keys and values, heads for attention.

use pool_core::worker::CacheType;

use super::attention::{Attend, Seen, Store};
use super::cache::{Bytes, Halves, Layout};
use super::elementwise::{Activation, Gate, RmsNorm, RmsNormInPlace};
use super::lanes::Tier;
use super::load::Load;
use super::pack::PackedMatrix;
use super::pages::Pages;
use super::product::{Activations, Output, multiply};
use super::quantize::{Block32, Block256, Grouping, Quantized, Rows, quantize_row};
use super::shared::Shared;
use super::team::Team;
use crate::engine::model::angles::Angles;
use crate::engine::model::description::{self, Description, RopeStyle};
use crate::engine::model::layers::LayerKind;
use crate::engine::model::{BLOCK, Batch, Model, ModelError, Row, Run};

/// Query rows that attention computes together.
const TOGETHER: usize = 8;
/// Units of a product for each thread: enough that a thread that comes late delays nobody for long.
const UNITS_PER_THREAD: usize = 6;

/// A weight matrix with its bias, where the model has one.
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
    /// `None` where the embedding serves.
    pub output: Option<PackedMatrix>,
}

/// A loaded model.
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

/// What a pass works with, kept from pass to pass.
#[derive(Default)]
struct Buffers {
    /// Hidden state: rows × width.
    hidden: Vec<f32>,
    /// What is added to it next.
    update: Vec<f32>,
    normed: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    gates: Vec<f32>,
    ups: Vec<f32>,
    /// Cosines and sines by rotation, row and pair.
    turns: Vec<Vec<(f32, f32)>>,
    input: Input,
    /// For each thread, scores of an attention.
    scores: Vec<Vec<f32>>,
}

/// What a product takes: rows of floats in the groupings that its weights need.
#[derive(Default)]
struct Input {
    by_32: Rows<Block32>,
    by_256: Rows<Block256>,
}

/// Groupings that some weights need.
#[derive(Clone, Copy)]
struct Needs {
    by_32: bool,
    by_256: bool,
}

impl Needs {
    fn of(weights: &[&PackedMatrix]) -> Self {
        let need = |grouping| {
            weights
                .iter()
                .any(|weights| Grouping::of(weights.format()) == grouping)
        };
        Self {
            by_32: need(Grouping::By32),
            by_256: need(Grouping::By256),
        }
    }
}

/// [`Input`] while its rows are written.
#[derive(Clone, Copy)]
struct Writing<'a> {
    tier: Tier,
    by_32: Option<(Shared<'a, Block32>, usize)>,
    by_256: Option<(Shared<'a, Block256>, usize)>,
}

impl Input {
    fn write(&mut self, tier: Tier, rows: usize, columns: usize, needs: Needs) -> Writing<'_> {
        Writing {
            tier,
            by_32: needs.by_32.then(|| open(&mut self.by_32, rows, columns)),
            by_256: needs.by_256.then(|| open(&mut self.by_256, rows, columns)),
        }
    }

    fn activations<'a>(&'a self, weights: &PackedMatrix, floats: &'a [f32]) -> Activations<'a> {
        match Grouping::of(weights.format()) {
            Grouping::Floats => Activations::Floats(floats),
            Grouping::By32 => Activations::By32(&self.by_32),
            Grouping::By256 => Activations::By256(&self.by_256),
        }
    }
}

/// Makes room for rows, and returns their blocks and how many a row has.
fn open<B: Quantized>(all: &mut Rows<B>, rows: usize, columns: usize) -> (Shared<'_, B>, usize) {
    all.resize(rows, columns);
    let length = all.row_blocks();
    (Shared::new(all.blocks_mut()), length)
}

impl Writing<'_> {
    /// Writes a row.
    ///
    /// # Safety
    ///
    /// Nobody else may write the same row at the same time.
    unsafe fn row(&self, row: usize, floats: &[f32]) {
        if let Some((blocks, length)) = self.by_32 {
            // SAFETY: the caller keeps rows apart.
            let blocks = unsafe { blocks.part(row * length..(row + 1) * length) };
            quantize_row(self.tier, floats, blocks);
        }
        if let Some((blocks, length)) = self.by_256 {
            // SAFETY: the caller keeps rows apart.
            let blocks = unsafe { blocks.part(row * length..(row + 1) * length) };
            quantize_row(self.tier, floats, blocks);
        }
    }
}

/// Rows of a run whose keys and values are in one block of the cache.
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
            match self.description.cache {
                CacheType::F16 => pass.attention(Halves, team, buffers, layer),
                CacheType::Q8_0 => pass.attention(Bytes, team, buffers, layer),
            }
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
            if let Some(told) = &self.on_layer {
                told();
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

/// Splits runs at the borders of blocks.
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

/// One pass, with what stays the same in it.
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

    /// Makes room, looks up the embeddings, and prepares the angles.
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

    /// Adds the update, if there is one, to the hidden state, normalised first where the model says so; then normalises the
    /// sum for the next products.
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
        let writing = buffers.input.write(tier, rows, width, needs);
        team.run(rows, &|_, index| {
            let range = index * width..(index + 1) * width;
            // SAFETY: each unit has the row of its number in every matrix.
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
            // SAFETY: each unit has its own row.
            unsafe { writing.row(index, normed) };
        });
    }

    /// Multiplies one input with several matrices.
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
            // SAFETY: the units' tiles are apart.
            let mut part = unsafe { output.part(tiles.clone()) };
            let activations = input.activations(weights, floats);
            multiply(tier, weights, activations, &mut part);
        });
    }

    /// Multiplies one input, which is in the buffers, into the update.
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

    /// Puts keys and values into the cache, and attends to them.
    fn attention<C: Layout + Sync>(
        &self,
        layout: C,
        team: &mut Team,
        buffers: &mut Buffers,
        layer: &mut Layer,
    ) {
        self.place(layout, team, buffers, layer);
        self.attend(layout, team, buffers, layer);
    }

    /// Prepares the queries, and puts keys and values into the cache.
    fn place<C: Layout + Sync>(
        &self,
        layout: C,
        team: &mut Team,
        buffers: &mut Buffers,
        layer: &mut Layer,
    ) {
        let Description {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self.description;
        let (query_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let (key_len, value_len) = (C::key_block_bytes(head_dim), C::value_block_bytes(head_dim));
        let queries = Shared::new(&mut buffers.queries);
        let fresh_keys = Shared::new(&mut buffers.keys);
        let fresh_values = Shared::new(&mut buffers.values);
        let keys = Shared::new(&mut layer.keys);
        let values = Shared::new(&mut layer.values);
        let turns = &buffers.turns[layer.kind.rotation];
        let pairs = self.description.rope_dim / 2;
        let (query, key, value) = (&layer.query, &layer.key, &layer.value);
        let (query_norm, key_norm) = (layer.query_norm.as_deref(), layer.key_norm.as_deref());
        team.run(self.pieces.len(), &|_, index| {
            let Piece { rows, block } = &self.pieces[index];
            let block = |length: usize| block * kv_heads * length..(block + 1) * kv_heads * length;
            // SAFETY: no two pieces have a row in common, or a block: `Batch::runs` has seen to that.
            let (keys, values) =
                unsafe { (keys.part(block(key_len)), values.part(block(value_len))) };
            for row in rows.clone() {
                let of = |width: usize| row * width..(row + 1) * width;
                // SAFETY: the same.
                let (queries, fresh_keys, fresh_values) = unsafe {
                    (
                        queries.part(of(query_width)),
                        fresh_keys.part(of(kv_width)),
                        fresh_values.part(of(kv_width)),
                    )
                };
                let turns = &turns[row * pairs..(row + 1) * pairs];
                self.prepare(queries, query.bias.as_deref(), query_norm, turns);
                let scale = self.description.query_scale;
                queries.iter_mut().for_each(|x| *x *= scale);
                self.prepare(fresh_keys, key.bias.as_deref(), key_norm, turns);
                add_bias(fresh_values, value.bias.as_deref());
                let slot = self.batch.rows[row].position % BLOCK;
                let keys = fresh_keys
                    .chunks_exact(head_dim)
                    .zip(keys.chunks_exact_mut(key_len));
                let values = fresh_values
                    .chunks_exact(head_dim)
                    .zip(values.chunks_exact_mut(value_len));
                for ((key, keys), (value, values)) in keys.zip(values) {
                    self.tier.run(Store {
                        layout,
                        key,
                        value,
                        keys,
                        values,
                        slot,
                    });
                }
            }
        });
    }

    /// Adds the bias, normalises and turns the heads of a row.
    fn prepare(
        &self,
        heads: &mut [f32],
        bias: Option<&[f32]>,
        norm: Option<&[f32]>,
        turns: &[(f32, f32)],
    ) {
        add_bias(heads, bias);
        for head in heads.chunks_exact_mut(self.description.head_dim) {
            if let Some(weight) = norm {
                self.tier.run(RmsNormInPlace {
                    x: head,
                    weight,
                    epsilon: self.description.rms_epsilon,
                });
            }
            turn(head, turns, self.description.rope_style);
        }
    }

    fn attend<C: Layout + Sync>(
        &self,
        layout: C,
        team: &mut Team,
        buffers: &mut Buffers,
        layer: &Layer,
    ) {
        let Description {
            heads, kv_heads, ..
        } = *self.description;
        let group = heads / kv_heads;
        // A unit is a key head and some rows of a run; the rows that see most come first.
        let mut units = Vec::new();
        for run in self.runs {
            for start in run.rows.clone().step_by(TOGETHER) {
                let rows = start..run.rows.end.min(start + TOGETHER);
                units.extend((0..kv_heads).map(|head| (run, head, rows.clone())));
            }
        }
        units.reverse();
        let work = Attention {
            layout,
            pass: self,
            layer,
            queries: &buffers.queries,
            attended: Shared::new(&mut buffers.attended),
        };
        let scores = Shared::new(&mut buffers.scores);
        team.run(units.len(), &|thread, index| {
            let (run, kv_head, rows) = &units[index];
            // SAFETY: each thread has its own.
            let scores = &mut unsafe { scores.part(thread..thread + 1) }[0];
            let seen = work.seen(run, *kv_head);
            if rows.len() >= TOGETHER {
                for head in kv_head * group..(kv_head + 1) * group {
                    let places: Vec<_> = rows.clone().map(|row| (row, head)).collect();
                    work.attend(seen, &places, scores);
                }
            } else {
                let heads = |row| (kv_head * group..(kv_head + 1) * group).map(move |h| (row, h));
                let places: Vec<_> = rows.clone().flat_map(heads).collect();
                work.attend(seen, &places, scores);
            }
        });
        let Buffers {
            attended, input, ..
        } = buffers;
        let width = self.description.query_width();
        self.quantize(team, input, attended, width, &layer.output);
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
        let writing = input.write(self.tier, self.rows(), width, Needs::of(&[weights]));
        team.run(self.rows(), &|_, index| {
            // SAFETY: each unit has its own row.
            unsafe { writing.row(index, row(values, index, width)) };
        });
    }

    /// Gates the up-projections.
    fn gate(&self, team: &mut Team, buffers: &mut Buffers, down: &PackedMatrix) {
        let (tier, width) = (self.tier, self.description.feed_forward);
        let activation = match self.description.activation {
            description::Activation::Silu => Activation::Silu,
            description::Activation::GeluTanh => Activation::GeluTanh,
        };
        let rows = self.rows();
        let gates = Shared::new(&mut buffers.gates);
        let ups = &buffers.ups;
        let writing = buffers.input.write(tier, rows, width, Needs::of(&[down]));
        team.run(rows, &|_, index| {
            // SAFETY: each unit has its own row.
            let gate = unsafe { gates.part(index * width..(index + 1) * width) };
            tier.run(Gate {
                activation,
                gate,
                up: row(ups, index, width),
            });
            // SAFETY: the same.
            unsafe { writing.row(index, gate) };
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
        let needs = Needs {
            by_32: false,
            by_256: false,
        };
        self.add_and_norm(team, buffers, true, post_norm, norm, needs);
        let Description { width, vocab, .. } = *self.description;
        logits.clear();
        let wanted: Vec<_> = (0..self.rows())
            .filter(|index| self.batch.rows[*index].wanted)
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        for (to, from) in wanted.iter().enumerate() {
            buffers
                .normed
                .copy_within(from * width..(from + 1) * width, to * width);
        }
        buffers.normed.truncate(wanted.len() * width);
        // Quantising turns some values that are no numbers into zeros, and zeros into a plausible token.
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

/// The attention of a layer.
#[derive(Clone, Copy)]
struct Attention<'a, C> {
    layout: C,
    pass: &'a Pass<'a>,
    layer: &'a Layer,
    queries: &'a [f32],
    attended: Shared<'a, f32>,
}

impl<'a, C: Layout> Attention<'a, C> {
    /// What a head of a run sees.
    fn seen(&self, run: &Run, head: usize) -> Seen<'a> {
        Seen {
            keys: &self.layer.keys,
            values: &self.layer.values,
            table: self.pass.batch.tables[run.sequence],
            heads: self.pass.description.kv_heads,
            head,
            head_dim: self.pass.description.head_dim,
            window: self.layer.kind.window.unwrap_or(usize::MAX),
        }
    }

    /// Attends with these rows' heads, of which the rows ascend.
    fn attend(&self, seen: Seen<'a>, places: &[(usize, usize)], scores: &mut Vec<f32>) {
        let mut rest = places;
        while !rest.is_empty() {
            rest = match rest.len() {
                8.. => self.some::<8>(seen, rest, scores),
                6.. => self.some::<6>(seen, rest, scores),
                4.. => self.some::<4>(seen, rest, scores),
                3 => self.some::<3>(seen, rest, scores),
                2 => self.some::<2>(seen, rest, scores),
                _ => self.some::<1>(seen, rest, scores),
            };
        }
    }

    /// Attends with the first places, and returns the others.
    fn some<'p, const ROWS: usize>(
        &self,
        seen: Seen<'a>,
        places: &'p [(usize, usize)],
        scratch: &mut Vec<f32>,
    ) -> &'p [(usize, usize)] {
        let width = self.pass.description.query_width();
        let range = |(row, head): (usize, usize)| {
            let start = row * width + head * seen.head_dim;
            start..start + seen.head_dim
        };
        let attend = Attend::<C, ROWS> {
            layout: self.layout,
            seen,
            queries: std::array::from_fn(|index| &self.queries[range(places[index])]),
            positions: std::array::from_fn(|index| self.pass.batch.rows[places[index].0].position),
            scratch,
            // SAFETY: each place of each unit is another row or head.
            out: std::array::from_fn(|index| unsafe { self.attended.part(range(places[index])) }),
        };
        self.pass.tier.run(attend);
        &places[ROWS..]
    }
}

fn add_bias(values: &mut [f32], bias: Option<&[f32]>) {
    for (value, bias) in values.iter_mut().zip(bias.into_iter().flatten()) {
        *value += bias;
    }
}

/// Turns the leading elements of a head by its position's angles.
fn turn(head: &mut [f32], turns: &[(f32, f32)], style: RopeStyle) {
    let turned =
        |x: f32, y: f32, (cosine, sine): (f32, f32)| (x * cosine - y * sine, x * sine + y * cosine);
    match style {
        RopeStyle::Interleaved => {
            for ([x, y], turn) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                (*x, *y) = turned(*x, *y, *turn);
            }
        }
        RopeStyle::Halves => {
            let (front, back) = head[..2 * turns.len()].split_at_mut(turns.len());
            for ((x, y), turn) in front.iter_mut().zip(back).zip(turns) {
                (*x, *y) = turned(*x, *y, *turn);
            }
        }
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

    fn on_layer(&mut self, told: Box<dyn Fn() + Send + Sync>) {
        self.on_layer = Some(told);
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
