//! The sources of GPU readings in this build: NVIDIA's driver with the feature `nvml`, and a Mac's own GPU.

use std::path::Path;
use std::sync::Arc;

use crate::config::GpuConfig;
use crate::gpu::{GpuInventory, GpuSource};

/// Creates an inventory of the GPUs that this build can read.
pub fn inventory(config: &GpuConfig) -> GpuInventory {
    let library = config.nvml_library.clone();
    GpuInventory::new(config, move || open(library.as_deref()))
}

/// Opens the driver's library, if this build and this host have one.
fn open(library: Option<&Path>) -> Result<Arc<dyn GpuSource>, String> {
    #[cfg(feature = "nvml")]
    if library.is_some() || !cfg!(target_os = "macos") {
        return crate::nvml::NvmlSource::open(library)
            .map(|source| Arc::new(source) as Arc<dyn GpuSource>);
    }
    let _ = library;
    #[cfg(target_os = "macos")]
    return Ok(Arc::new(crate::macos::MetalSource));
    #[cfg(not(target_os = "macos"))]
    Err("this build supports no GPU driver".to_owned())
}
