//! Reads tensors from a model file, checking each against the shape that the decoder needs.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Tensor};
use pool_core::catalog::gguf::{GgmlType, GgufFile, TensorInfo};

/// Strictest alignment of any block type: candle looks at the bytes as blocks, so they must begin on such a border.
const BLOCK_ALIGNMENT: usize = 16;

/// Bytes that are read before loading tells that it moves: a large tensor on a slow disk takes minutes.
const STEP: usize = 16 << 20;

/// Why a tensor can't be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The file doesn't have it.
    #[error("the file has no tensor `{name}`")]
    Missing {
        /// Its name.
        name: String,
    },
    /// It has another shape than the model's numbers say.
    #[error("tensor `{name}` is {found:?}, the model's numbers ask for {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Its dimensions in the file, outermost first.
        found: Vec<u64>,
        /// What they should be.
        expected: Vec<usize>,
    },
    /// Its element type can't be computed with.
    #[error("tensor `{name}` is stored as {ty}, which is not supported")]
    Type {
        /// Its name.
        name: String,
        /// Its element type.
        ty: &'static str,
    },
    /// The file can't be read.
    #[error("could not read tensor `{name}`")]
    Io {
        /// Its name.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// candle refuses it.
    #[error("could not prepare tensor `{name}`")]
    Compute {
        /// Its name.
        name: String,
        /// What candle said.
        source: candle_core::Error,
    },
}

/// The tensors of an open model file, on their way to a device.
pub struct Weights<'a> {
    header: &'a GgufFile,
    file: File,
    device: &'a Device,
    /// Reused from tensor to tensor, so that loading needs little more than the weights themselves.
    buffer: Vec<u8>,
    loaded_bytes: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<'a> Weights<'a> {
    /// Opens the file that `header` was read from. `progress` hears the bytes read so far after each tensor, and
    /// several times within a large one.
    pub fn open(
        path: &Path,
        header: &'a GgufFile,
        device: &'a Device,
        progress: &'a mut dyn FnMut(u64),
    ) -> std::io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self {
            header,
            file,
            device,
            buffer: Vec::new(),
            loaded_bytes: 0,
            progress,
        })
    }

    /// Whether the file has this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.header.tensor(name).is_some()
    }

    /// The size of a tensor's outermost dimension, for sizes that only the tensors tell.
    pub fn rows(&self, name: &str) -> Result<usize, WeightError> {
        let info = self.info(name)?;
        Ok(info.dims.last().copied().unwrap_or_default() as usize)
    }

    /// A matrix to multiply with.
    pub fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<QMatMul, WeightError> {
        let tensor = self.quantized(name, &[rows, columns])?;
        QMatMul::from_qtensor(tensor).map_err(|source| WeightError::Compute {
            name: name.to_owned(),
            source,
        })
    }

    /// A vector of 32-bit floats.
    pub fn vector(&mut self, name: &str, length: usize) -> Result<Tensor, WeightError> {
        let tensor = self.quantized(name, &[length])?;
        tensor
            .dequantize(self.device)
            .map_err(|source| WeightError::Compute {
                name: name.to_owned(),
                source,
            })
    }

    /// A tensor as it is stored.
    pub fn quantized(&mut self, name: &str, shape: &[usize]) -> Result<QTensor, WeightError> {
        let info = self.info(name)?;
        let found: Vec<u64> = info.dims.iter().rev().copied().collect();
        if !found.iter().copied().eq(shape.iter().map(|d| *d as u64)) {
            return Err(WeightError::Shape {
                name: name.to_owned(),
                found,
                expected: shape.to_vec(),
            });
        }
        let dtype = candle_type(info.ty).ok_or_else(|| WeightError::Type {
            name: name.to_owned(),
            ty: info.ty.name(),
        })?;
        let start = self.header.data_offset() + info.offset;
        let device = self.device;
        // The header was checked: the tensor lies inside the file.
        let length = info.size_bytes as usize;
        let bytes = self.read(start, length).map_err(|source| WeightError::Io {
            name: name.to_owned(),
            source,
        })?;
        let storage = QStorage::from_data(Cow::Borrowed(bytes), device, dtype);
        let tensor = storage
            .and_then(|storage| QTensor::new(storage, shape))
            .map_err(|source| WeightError::Compute {
                name: name.to_owned(),
                source,
            })?;
        self.loaded_bytes += length as u64;
        (self.progress)(self.loaded_bytes);
        Ok(tensor)
    }

    fn info(&self, name: &str) -> Result<&'a TensorInfo, WeightError> {
        self.header
            .tensor(name)
            .ok_or_else(|| WeightError::Missing {
                name: name.to_owned(),
            })
    }

    /// `length` bytes from `start` on, on a border of [`BLOCK_ALIGNMENT`].
    fn read(&mut self, start: u64, length: usize) -> std::io::Result<&[u8]> {
        if self.buffer.len() < length + BLOCK_ALIGNMENT {
            self.buffer.resize(length + BLOCK_ALIGNMENT, 0);
        }
        let shift = self.buffer.as_ptr().align_offset(BLOCK_ALIGNMENT);
        let bytes = &mut self.buffer[shift..shift + length];
        self.file.seek(SeekFrom::Start(start))?;
        let mut done = self.loaded_bytes;
        for step in bytes.chunks_mut(STEP) {
            self.file.read_exact(step)?;
            done += step.len() as u64;
            (self.progress)(done);
        }
        Ok(bytes)
    }
}

/// The element types that candle multiplies with.
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
    fn the_element_types_that_models_are_accepted_by_are_those_computed_with() {
        for ty in (0..64).filter_map(GgmlType::from_id) {
            let accepted = TENSOR_TYPES.contains(&ty.name());
            assert_eq!(candle_type(ty).is_some(), accepted, "{}", ty.name());
        }
    }
}
