//! Backends that compute models, by kind of processor.

pub mod candle;
pub mod cpu;
mod tensors;

use std::ops::ControlFlow;
use std::path::Path;

use pool_core::catalog::gguf::GgufFile;
use pool_core::kit::units::human_bytes;
use pool_core::worker::Backend;

use crate::model::Model;
use crate::model::description::{Description, DescriptionError};
use cpu::lanes::Tier;
pub use tensors::TensorError;

/// Reason why a backend can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This build doesn't contain the backend.
    #[error("this build of llorch-candled has no `{backend}` backend, only `cpu`")]
    NotBuilt {
        /// Backend that was requested.
        backend: Backend,
    },
}

/// Reason why a model can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A number or feature of the model is not supported.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// A tensor can't be used.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The system refused memory for the cache.
    #[error("could not reserve {} for the cache", human_bytes(*bytes))]
    Cache {
        /// Bytes of the whole cache.
        bytes: u64,
        /// Reason of the system.
        source: std::io::Error,
    },
    /// The file can't be read, or the system refused threads or memory.
    #[error("could not load the model")]
    Io(#[from] std::io::Error),
    /// The backend's library failed.
    #[error("could not load the model: {0}")]
    Backend(String),
}

impl From<candle_core::Error> for LoadError {
    fn from(error: candle_core::Error) -> Self {
        Self::Backend(error.to_string())
    }
}

/// The code and resources that compute a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Our own kernels on the CPU.
    Cpu {
        /// Number of threads.
        threads: usize,
        /// Instructions that the kernels use.
        tier: Tier,
    },
    /// candle on the CPU, the reference.
    Reference,
}

impl Device {
    /// Returns the device of a backend.
    ///
    /// # Errors
    ///
    /// Fails if this build doesn't have the backend.
    pub fn of(backend: Backend, threads: usize) -> Result<Self, BackendError> {
        match backend {
            Backend::Cpu => Ok(Self::Cpu {
                threads,
                tier: Tier::best(),
            }),
            Backend::Cuda | Backend::Metal => Err(BackendError::NotBuilt { backend }),
        }
    }

    /// Returns the name of the arithmetic, on which the bits of a result depend besides the model.
    pub fn arithmetic(self) -> &'static str {
        match self {
            Self::Cpu { .. } => cpu::ARITHMETIC,
            Self::Reference => "candle",
        }
    }

    /// Loads a model from the file at `path`, which `header` was read from, with a cache of `blocks` blocks. Calls `progress`
    /// with the bytes read so far; a `Break` stops the loading.
    ///
    /// # Errors
    ///
    /// Fails if the file lacks a tensor, if the system refuses threads or memory, or if `progress` stops the loading.
    pub fn load(
        self,
        path: &Path,
        header: &GgufFile,
        description: Description,
        blocks: usize,
        progress: &mut (dyn FnMut(u64) -> ControlFlow<()> + Send),
    ) -> Result<Box<dyn Model>, LoadError> {
        Ok(match self {
            Self::Cpu { threads, tier } => {
                let load = cpu::Load {
                    threads,
                    tier,
                    blocks,
                };
                Box::new(load.model(path, header, description, progress)?)
            }
            Self::Reference => {
                let device = candle_core::Device::Cpu;
                Box::new(candle::CandleModel::load(
                    path,
                    header,
                    description,
                    &device,
                    blocks,
                    progress,
                )?)
            }
        })
    }
}
