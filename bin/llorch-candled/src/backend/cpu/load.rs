//! Loading of a model file into packed weights.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pool_core::catalog::gguf::GgufFile;

use super::cache::{key_block_bytes, value_block_bytes};
use super::format::{Format, dequantize};
use super::lanes::Tier;
use super::model::{CpuModel, Layer, Projection, Weights};
use super::pack::{PackedMatrix, TILE_ROWS};
use super::pages::Pages;
use super::team::Team;
use crate::backend::LoadError;
use crate::backend::tensors::{Stored, TensorError, Tensors};
use crate::model::angles::Angles;
use crate::model::description::Description;
use crate::model::places::{self, Place, VectorPlace};

/// Most bytes of the file that a thread reads and packs at a time. Smaller matrices are split among the threads.
const STEP: usize = 1 << 20;

/// The settings for loading a model.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Number of threads that load and compute.
    pub threads: usize,
    /// Instructions that the kernels use.
    pub tier: Tier,
    /// Number of blocks in the cache.
    pub blocks: usize,
}

impl Load {
    /// Loads a model from the file at `path`, which `header` was read from. Calls `progress` with the bytes read so far; a
    /// `Break` stops the loading.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is missing, has an unexpected shape or type, or can't be read, if the system refuses a thread or
    /// memory, or if `progress` stops the loading.
    pub fn model(
        self,
        path: &Path,
        header: &GgufFile,
        description: Description,
        progress: &mut (dyn FnMut(u64) -> ControlFlow<()> + Send),
    ) -> Result<CpuModel, LoadError> {
        let mut reader = Reader {
            tensors: Tensors::open(path, header)?,
            team: Team::new(self.threads)?,
            progress: Mutex::new((0, progress)),
        };
        let embedding = reader.matrix(&description.embedding_place())?;
        let layers = (0..description.layers.len())
            .map(|index| self.layer(&mut reader, &description, index))
            .collect::<Result<_, _>>()?;
        let output_norm = reader.vector(&description.output_norm_place())?;
        let has_output = reader.tensors.has(places::OUTPUT);
        let output = has_output.then(|| reader.matrix(&description.output_place()));
        let weights = Weights {
            embedding,
            layers,
            output_norm,
            output: output.transpose()?,
        };
        let angles = Angles::new(&description, |place| reader.vector(place))?;
        Ok(CpuModel::new(
            description,
            self,
            reader.team,
            angles,
            weights,
        ))
    }

    fn layer(
        self,
        reader: &mut Reader<'_, '_>,
        description: &Description,
        index: usize,
    ) -> Result<Layer, LoadError> {
        let at = description.layer_places(index);
        let mut projection = |matrix: &Place, bias: &Option<VectorPlace>| {
            Ok::<_, TensorError>(Projection {
                bias: reader.vector_if(bias)?,
                matrix: reader.matrix(matrix)?,
            })
        };
        let query = projection(&at.query, &at.query_bias)?;
        let key = projection(&at.key, &at.key_bias)?;
        let value = projection(&at.value, &at.value_bias)?;
        let [output, gate, up, down] =
            [&at.output, &at.gate, &at.up, &at.down].map(|place| reader.matrix(place));
        let key_block = key_block_bytes(description.cache, description.head_dim);
        let value_block = value_block_bytes(description.cache, description.head_dim);
        let heads = self.blocks * description.kv_heads;
        let cache = |block: usize| {
            Pages::new(heads * block).map_err(|source| LoadError::Cache {
                bytes: (heads * (key_block + value_block) * description.layers.len()) as u64,
                source,
            })
        };
        Ok(Layer {
            kind: description.layers[index],
            attention_norm: reader.vector(&at.attention_norm)?,
            query,
            key,
            value,
            query_norm: reader.vector_if(&at.query_norm)?,
            key_norm: reader.vector_if(&at.key_norm)?,
            output: output?,
            attention_post_norm: reader.vector_if(&at.attention_post_norm)?,
            feed_forward_norm: reader.vector(&at.feed_forward_norm)?,
            gate: gate?,
            up: up?,
            down: down?,
            feed_forward_post_norm: reader.vector_if(&at.feed_forward_post_norm)?,
            keys: cache(key_block)?,
            values: cache(value_block)?,
        })
    }
}

/// Bytes read so far, and the callback that receives them.
type Progress<'p> = Mutex<(u64, &'p mut (dyn FnMut(u64) -> ControlFlow<()> + Send))>;

/// Counts bytes that were read. Fails if the callback stops the loading.
fn report(progress: &Progress<'_>, bytes: usize) -> Result<(), TensorError> {
    let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
    let (done, callback) = &mut *progress;
    *done += bytes as u64;
    match callback(*done) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(TensorError::Stopped),
    }
}

/// A reader of tensors that uses several threads.
struct Reader<'a, 'p> {
    tensors: Tensors<'a>,
    team: Team,
    progress: Progress<'p>,
}

impl Reader<'_, '_> {
    /// Reads and packs a matrix.
    fn matrix(&mut self, place: &Place) -> Result<PackedMatrix, TensorError> {
        let stored = self.tensors.matrix(place)?;
        let format = format_of(&stored)?;
        let mut matrix = PackedMatrix::new(format, stored.rows, stored.columns);
        let step = STEP / (TILE_ROWS * stored.row_bytes);
        let share = matrix.tiles().div_ceil(self.team.threads());
        let tiles = step.min(share).max(1);
        let parts: Vec<_> = matrix.parts_mut(tiles).map(Some).map(Mutex::new).collect();
        let failure = Mutex::new(None);
        let failed = AtomicBool::new(false);
        let this = &self.tensors;
        let progress = &self.progress;
        self.team.run(parts.len(), &|_, index| {
            let part = parts[index].lock().ok().and_then(|mut part| part.take());
            let Some(part) = part.filter(|_| !failed.load(Ordering::Relaxed)) else {
                return;
            };
            let tiles = part.tiles();
            let rows = tiles.start * TILE_ROWS..(tiles.end * TILE_ROWS).min(stored.rows);
            let mut bytes = vec![0; rows.len() * stored.row_bytes];
            let read = this.read(&stored, rows, &mut bytes);
            let read = read.and_then(|()| report(progress, bytes.len()));
            if let Err(error) = read {
                failed.store(true, Ordering::Relaxed);
                if let Ok(mut failure) = failure.lock() {
                    *failure = Some(error);
                }
                return;
            }
            let tile_bytes = TILE_ROWS * stored.row_bytes;
            part.pack_from(|tile| {
                let start = (tile - tiles.start) * tile_bytes;
                &bytes[start..bytes.len().min(start + tile_bytes)]
            });
        });
        drop(parts);
        match failure.into_inner() {
            Ok(None) => Ok(matrix),
            Ok(Some(error)) => Err(error),
            Err(_) => unreachable!("no thread panics while it holds the lock"),
        }
    }

    /// Reads a vector as 32-bit floats.
    fn vector(&self, place: &VectorPlace) -> Result<Vec<f32>, TensorError> {
        let stored = self.tensors.vector(place)?;
        let format = format_of(&stored)?;
        let mut bytes = vec![0; stored.bytes()];
        self.tensors.read(&stored, 0..1, &mut bytes)?;
        let mut values = vec![0.0; place.length];
        dequantize(format, &bytes, &mut values);
        report(&self.progress, bytes.len())?;
        Ok(values)
    }

    /// Reads a vector that the family may lack.
    fn vector_if(&self, place: &Option<VectorPlace>) -> Result<Option<Vec<f32>>, TensorError> {
        let place = place.as_ref();
        place.map(|place| self.vector(place)).transpose()
    }
}

fn format_of(stored: &Stored) -> Result<Format, TensorError> {
    Format::from_gguf(stored.ty.id()).ok_or_else(|| TensorError::Type {
        name: stored.name.clone(),
        ty: stored.ty.name(),
    })
}
