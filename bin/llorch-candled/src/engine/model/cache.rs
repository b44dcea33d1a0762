//! Keys and values of the positions a sequence has been through.

use candle_core::{DType, Device, Result, Tensor};

use super::config::ModelConfig;

/// Width of a cache element: 32-bit floats.
pub const ELEMENT_BYTES: u64 = 4;

/// The KV cache of one sequence. It is made for one job and dropped with it, so nothing of one job can reach another.
pub struct KvCache {
    blocks: Vec<(Tensor, Tensor)>,
    length: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions. The memory is zeroed by the system as it is used.
    pub fn new(config: &ModelConfig, capacity: usize, device: &Device) -> Result<Self> {
        let shape = (config.kv_heads, capacity, config.head_dim);
        let blocks = (0..config.blocks)
            .map(|_| {
                Ok((
                    Tensor::zeros(shape, DType::F32, device)?,
                    Tensor::zeros(shape, DType::F32, device)?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            blocks,
            length: 0,
            capacity,
        })
    }

    /// Positions filled.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Stores keys and values (heads, positions, width) of a block after those it has; gives back all of them.
    /// The positions count once [`KvCache::advance`] is called for the whole pass.
    pub(super) fn append(
        &self,
        block: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (all_keys, all_values) = &self.blocks[block];
        all_keys.slice_set(keys, 1, self.length)?;
        all_values.slice_set(values, 1, self.length)?;
        let end = self.length + keys.dim(1)?;
        Ok((all_keys.narrow(1, 0, end)?, all_values.narrow(1, 0, end)?))
    }

    /// Counts `positions` more positions as filled.
    pub(super) fn advance(&mut self, positions: usize) {
        self.length += positions;
    }
}
