//! Reads tensors from a model file, checking each against the shape that the model's description asks for.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use pool_core::catalog::gguf::{GgmlType, GgufFile};

use crate::engine::model::places::Place;

/// Why a tensor can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
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
    /// Loading was stopped.
    #[error("loading was stopped")]
    Stopped,
    /// The backend's library refuses it.
    #[error("could not prepare tensor `{name}`: {reason}")]
    Backend {
        /// Its name.
        name: String,
        /// What the library said.
        reason: String,
    },
}

/// The tensors of an open model file.
#[derive(Debug)]
pub struct Tensors<'a> {
    header: &'a GgufFile,
    file: File,
}

/// A tensor, or some rows of one, as it stands in the file.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Name of the tensor.
    pub name: String,
    /// Its element type.
    pub ty: GgmlType,
    /// Number of these rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    offset: u64,
}

impl Stored {
    /// Returns the number of bytes of all rows.
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
    /// Fails if the system can't open it.
    pub fn open(path: &Path, header: &'a GgufFile) -> std::io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self { header, file })
    }

    /// Returns whether the file has this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.header.tensor(name).is_some()
    }

    /// Finds a matrix.
    ///
    /// # Errors
    ///
    /// Fails if the file doesn't have its tensor, or has it in another shape.
    pub fn matrix(&self, place: &Place) -> Result<Stored, TensorError> {
        let whole = self.find(&place.name, &[place.of, place.columns])?;
        Ok(whole.part(place.first, place.rows))
    }

    /// Finds a vector, as a matrix of one row.
    ///
    /// # Errors
    ///
    /// Fails if the file doesn't have it, or has it in another length.
    pub fn vector(&self, name: &str, length: usize) -> Result<Stored, TensorError> {
        self.find(name, &[length])
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
            _ => unreachable!("tensors of other ranks are not asked for"),
        };
        Ok(Stored {
            name,
            ty: info.ty,
            rows,
            columns,
            // The header was checked: a row is a whole number of blocks.
            row_bytes: info.size_bytes as usize / rows,
            offset: self.header.data_offset() + info.offset,
        })
    }

    /// Reads `rows` of a tensor, counted from the first of `stored`, into `buffer`, which has exactly their size.
    ///
    /// # Errors
    ///
    /// Fails if the system can't read them.
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
