//! The attention of a pass: stores the batch's keys and values in the cache, and attends with the queries.

use pool_core::worker::CacheType;

use super::{Buffers, Layer, Pass, Piece, TOGETHER};
use crate::backend::cpu::attention::{Attend, Seen, Store};
use crate::backend::cpu::cache::{Bytes, Halves, Layout};
use crate::backend::cpu::elementwise::RmsNormInPlace;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::team::Team;
use crate::model::description::{Description, RopeStyle};
use crate::model::{BLOCK, Run};

impl Pass<'_> {
    /// Stores keys and values in the cache, and attends to them.
    pub(super) fn attention(&self, team: &mut Team, buffers: &mut Buffers, layer: &mut Layer) {
        match self.description.cache {
            CacheType::F16 => self.attention_over(Halves, team, buffers, layer),
            CacheType::Q8_0 => self.attention_over(Bytes, team, buffers, layer),
        }
    }

    fn attention_over<C: Layout>(
        &self,
        layout: C,
        team: &mut Team,
        buffers: &mut Buffers,
        layer: &mut Layer,
    ) {
        self.store(layout, team, buffers, layer);
        self.attend(layout, team, buffers, layer);
    }

    /// Prepares the queries, and stores keys and values in the cache.
    fn store<C: Layout>(
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
            // SAFETY: no two pieces have a row or a block in common, which `Batch::runs` has checked.
            let (keys, values) =
                unsafe { (keys.part(block(key_len)), values.part(block(value_len))) };
            for row in rows.clone() {
                let of = |width: usize| row * width..(row + 1) * width;
                // SAFETY: as above.
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

    /// Adds the bias to the heads of a row, normalises and rotates them.
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

    fn attend<C: Layout>(&self, layout: C, team: &mut Team, buffers: &mut Buffers, layer: &Layer) {
        let Description {
            heads, kv_heads, ..
        } = *self.description;
        let group = heads / kv_heads;
        // A unit is a key head and some rows of a run. The rows that see most come first, so that no long unit is left for the
        // end.
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
            // SAFETY: each thread has its own element.
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
}

/// The rows that attend to a layer's keys and values.
#[derive(Clone, Copy)]
struct Attention<'a, C> {
    layout: C,
    pass: &'a Pass<'a>,
    layer: &'a Layer,
    queries: &'a [f32],
    attended: Shared<'a, f32>,
}

impl<'a, C: Layout> Attention<'a, C> {
    /// Returns the part of the cache that a head of a run sees.
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

    /// Attends with the heads of these rows, which must ascend.
    fn attend(&self, seen: Seen<'a>, places: &[(usize, usize)], scores: &mut Vec<f32>) {
        let mut rest = places;
        while !rest.is_empty() {
            rest = match rest.len() {
                8.. => self.attend_rows::<8>(seen, rest, scores),
                6.. => self.attend_rows::<6>(seen, rest, scores),
                4.. => self.attend_rows::<4>(seen, rest, scores),
                3 => self.attend_rows::<3>(seen, rest, scores),
                2 => self.attend_rows::<2>(seen, rest, scores),
                _ => self.attend_rows::<1>(seen, rest, scores),
            };
        }
    }

    /// Attends with the first places, and returns the rest.
    fn attend_rows<'p, const ROWS: usize>(
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
            // SAFETY: every place of every unit is a different row or head.
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

/// Rotates the leading elements of a head by its position's angles.
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
