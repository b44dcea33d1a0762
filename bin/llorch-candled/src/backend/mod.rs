//! Where a model is computed. The seam for other devices, and for kernels of our own.

pub mod cpu;

use candle_core::Device;
use pool_core::worker::Backend;

/// Why a backend can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This build doesn't have it.
    #[error("this build of llorch-candled has no `{backend}` backend, only `cpu`")]
    NotBuilt {
        /// What was asked for.
        backend: Backend,
    },
}

/// Opens the device of a backend.
pub fn open(backend: Backend) -> Result<Device, BackendError> {
    match backend {
        Backend::Cpu => Ok(Device::Cpu),
        Backend::Cuda | Backend::Metal => Err(BackendError::NotBuilt { backend }),
    }
}
