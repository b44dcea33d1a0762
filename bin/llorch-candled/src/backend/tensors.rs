//! Reading of tensors from a model file, each checked against the shape that the model's description expects.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use pool_core::catalog::gguf::{GgmlType, GgufFile};

use crate::model::places::{Place, VectorPlace};

/// Reason why a tensor can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// The file doesn't have the tensor.
    #[error("the file has no tensor `{name}`")]
    Missing {
        /// Name of the tensor.
        name: String,
    },
    /// The shape of the tensor contradicts the model's numbers.
    #[error("tensor `{name}` is {found:?}, but the header requires {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Dimensions in the file, outermost first.
        found: Vec<u64>,
        /// Dimensions that the model's numbers require.
        expected: Vec<usize>,
    },
    /// The element type of the tensor is not supported.
    #[error("tensor `{name}` is stored as {ty}, which is not supported")]
    Type {
        /// Name of the tensor.
        name: String,
        /// Element type of the tensor, as ggml names it.
        ty: &'static str,
    },
    /// The tensor can't be read from the file.
    #[error("could not read tensor `{name}`")]
    Io {
        /// Name of the tensor.
        name: String,
        /// Error from the system.
        source: std::io::Error,
    },
    /// The caller stopped the loading.
    #[error("loading was stopped")]
    Stopped,
    /// The backend's library refused the tensor.
    #[error("could not prepare tensor `{name}`: {reason}")]
    Backend {
        /// Name of the tensor.
        name: String,
        /// Message of the library.
        reason: String,
    },
}

/// The tensors of an open model file.
#[derive(Debug)]
pub struct Tensors<'a> {
    header: &'a GgufFile,
    file: File,
}

/// A tensor in the file, or some rows of one.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Name of the tensor.
    pub name: String,
    /// Element type of the tensor.
    pub ty: GgmlType,
    /// Number of rows, which may be a part of the tensor's.
    pub rows: usize,
    /// Number of elements in a row.
    pub columns: usize,
    /// Number of bytes in a row.
    pub row_bytes: usize,
    offset: u64,
}

impl Stored {
    /// Returns the number of bytes of these rows.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    /// Returns `rows` rows from `first`.
    fn part(self, first: usize, rows: usize) -> Self {
        debug_assert!(first + rows <= self.rows);
        Self {
            rows,
            offset: self.offset + (first * self.row_bytes) as u64,
            ..self
        }
    }
}

impl<'a> Tensors<'a> {
    /// Opens the file that `header` was read from.
    ///
    /// # Errors
    ///
    /// Fails if the system can't open the file.
    pub fn open(path: &Path, header: &'a GgufFile) -> std::io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self { header, file })
    }

    /// Returns whether the file has a tensor with this name.
    pub fn has(&self, name: &str) -> bool {
        self.header.tensor(name).is_some()
    }

    /// Finds a matrix.
    ///
    /// # Errors
    ///
    /// Fails if the file doesn't have the tensor, or has it in another shape.
    pub fn matrix(&self, place: &Place) -> Result<Stored, TensorError> {
        let whole = self.find(&place.name, &[place.tensor_rows, place.columns])?;
        Ok(whole.part(place.first, place.rows))
    }

    /// Finds a vector, as a matrix of one row.
    ///
    /// # Errors
    ///
    /// Fails if the file doesn't have the vector, or has it in another length.
    pub fn vector(&self, place: &VectorPlace) -> Result<Stored, TensorError> {
        self.find(&place.name, &[place.length])
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<Stored, TensorError> {
        let name = name.to_owned();
        let Some(info) = self.header.tensor(&name) else {
            return Err(TensorError::Missing { name });
        };
        let found: Vec<u64> = info.dims.iter().rev().copied().collect();
        if !found.iter().copied().eq(shape.iter().map(|d| *d as u64)) {
            return Err(TensorError::Shape {
                name,
                found,
                expected: shape.to_vec(),
            });
        }
        let (rows, columns) = match shape {
            [columns] => (1, *columns),
            [rows, columns] => (*rows, *columns),
            _ => unreachable!("no caller requests a tensor of another rank"),
        };
        Ok(Stored {
            name,
            ty: info.ty,
            rows,
            columns,
            // The header was checked, so a row is a whole number of blocks.
            row_bytes: info.size_bytes as usize / rows,
            offset: self.header.data_offset() + info.offset,
        })
    }

    /// Reads `rows` of a tensor, counted from the first of `stored`, into `buffer`, which must have exactly their size.
    ///
    /// # Errors
    ///
    /// Fails if the system can't read the rows.
    pub fn read(
        &self,
        stored: &Stored,
        rows: Range<usize>,
        buffer: &mut [u8],
    ) -> Result<(), TensorError> {
        debug_assert_eq!(buffer.len(), rows.len() * stored.row_bytes);
        let start = stored.offset + (rows.start * stored.row_bytes) as u64;
        self.file
            .read_exact_at(buffer, start)
            .map_err(|source| TensorError::Io {
                name: stored.name.clone(),
                source,
            })
    }
}
