//! Conversion of a model file's tensors to candle's.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Tensor};
use pool_core::catalog::gguf::{GgmlType, GgufFile};

use crate::backend::tensors::{Stored, TensorError, Tensors};
use crate::model::places::{Place, VectorPlace};

/// Strictest alignment of any block type. candle casts the bytes to blocks, so they must be aligned.
const BLOCK_ALIGNMENT: usize = 16;

/// Bytes read between calls of `progress`: a large tensor on a slow disk takes minutes.
const STEP: usize = 16 << 20;

/// The tensors of an open model file, on their way to a device.
pub struct Weights<'a> {
    tensors: Tensors<'a>,
    device: &'a Device,
    /// Reused between tensors, so that loading needs little more memory than the weights themselves.
    buffer: Vec<u8>,
    loaded_bytes: u64,
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
}

impl<'a> Weights<'a> {
    /// Opens the file that `header` was read from. `progress` is called with the bytes read so far after each tensor, and
    /// several times within a large one.
    pub fn open(
        path: &Path,
        header: &'a GgufFile,
        device: &'a Device,
        progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            tensors: Tensors::open(path, header)?,
            device,
            buffer: Vec::new(),
            loaded_bytes: 0,
            progress,
        })
    }

    /// Returns the device that tensors are moved to.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Returns whether the file has a tensor with this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.has(name)
    }

    /// Reads a matrix to multiply with.
    pub fn matrix(&mut self, place: &Place) -> Result<QMatMul, TensorError> {
        let tensor = self.quantized(place)?;
        QMatMul::from_qtensor(tensor).map_err(|error| refused(&place.name, &error))
    }

    /// Reads a vector of 32-bit floats.
    pub fn vector(&mut self, place: &VectorPlace) -> Result<Tensor, TensorError> {
        let stored = self.tensors.vector(place)?;
        let tensor = self.tensor(&stored, &[place.length])?;
        tensor
            .dequantize(self.device)
            .map_err(|error| refused(&place.name, &error))
    }

    /// Reads a vector that the family may lack.
    pub fn vector_if(
        &mut self,
        place: &Option<VectorPlace>,
    ) -> Result<Option<Tensor>, TensorError> {
        let place = place.as_ref();
        place.map(|place| self.vector(place)).transpose()
    }

    /// Reads a matrix in its stored form.
    pub fn quantized(&mut self, place: &Place) -> Result<QTensor, TensorError> {
        let stored = self.tensors.matrix(place)?;
        self.tensor(&stored, &[stored.rows, stored.columns])
    }

    fn tensor(&mut self, stored: &Stored, shape: &[usize]) -> Result<QTensor, TensorError> {
        let name = &stored.name;
        let dtype = candle_type(stored.ty).ok_or_else(|| TensorError::Type {
            name: name.clone(),
            ty: stored.ty.name(),
        })?;
        let device = self.device;
        let storage = QStorage::from_data(Cow::Borrowed(self.read(stored)?), device, dtype);
        storage
            .and_then(|storage| QTensor::new(storage, shape))
            .map_err(|error| refused(name, &error))
    }

    /// Reads the bytes of a tensor, aligned to [`BLOCK_ALIGNMENT`].
    fn read(&mut self, stored: &Stored) -> Result<&[u8], TensorError> {
        let length = stored.bytes();
        if self.buffer.len() < length + BLOCK_ALIGNMENT {
            self.buffer.resize(length + BLOCK_ALIGNMENT, 0);
        }
        let shift = self.buffer.as_ptr().align_offset(BLOCK_ALIGNMENT);
        let bytes = &mut self.buffer[shift..shift + length];
        let step = (STEP / stored.row_bytes.max(1)).max(1);
        for first in (0..stored.rows).step_by(step) {
            let rows = first..stored.rows.min(first + step);
            let part = &mut bytes[rows.start * stored.row_bytes..rows.end * stored.row_bytes];
            self.loaded_bytes += part.len() as u64;
            self.tensors.read(stored, rows, part)?;
            if (self.progress)(self.loaded_bytes).is_break() {
                return Err(TensorError::Stopped);
            }
        }
        Ok(bytes)
    }
}

fn refused(name: &str, error: &candle_core::Error) -> TensorError {
    TensorError::Backend {
        name: name.to_owned(),
        reason: error.to_string(),
    }
}

/// Returns candle's element type for `ty`, or `None` if candle can't multiply with it.
fn candle_type(ty: GgmlType) -> Option<GgmlDType> {
    Some(match ty.name() {
        "F32" => GgmlDType::F32,
        "F16" => GgmlDType::F16,
        "BF16" => GgmlDType::BF16,
        "Q4_0" => GgmlDType::Q4_0,
        "Q4_1" => GgmlDType::Q4_1,
        "Q5_0" => GgmlDType::Q5_0,
        "Q5_1" => GgmlDType::Q5_1,
        "Q8_0" => GgmlDType::Q8_0,
        "Q2_K" => GgmlDType::Q2K,
        "Q3_K" => GgmlDType::Q3K,
        "Q4_K" => GgmlDType::Q4K,
        "Q5_K" => GgmlDType::Q5K,
        "Q6_K" => GgmlDType::Q6K,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::catalog::support::TENSOR_TYPES;

    #[test] // [CAND-090]
    fn accepted_element_types_are_those_that_can_be_computed() {
        for ty in (0..64).filter_map(GgmlType::from_id) {
            let accepted = TENSOR_TYPES.contains(&ty.name());
            assert_eq!(candle_type(ty).is_some(), accepted, "{}", ty.name());
        }
    }
}
