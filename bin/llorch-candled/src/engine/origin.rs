//! The origin of tokens: the model file and the arithmetic, on which an answer depends in addition to the request.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use pool_core::api::worker::Origin;
use pool_core::catalog::gguf::GgufError;

use crate::backend::Device;

/// Returns the origin of tokens that a model file yields on a device. While the hash of the file is unknown, its device, inode,
/// size and modification time identify it: two files that agree in all of them count as one.
pub fn of(path: &Path, device: Device) -> Result<Origin, GgufError> {
    let metadata = std::fs::metadata(path)?;
    let (device_id, inode, size) = (metadata.dev(), metadata.ino(), metadata.len());
    let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Origin {
        model: format!("file:{device_id}.{inode}.{size}.{seconds}.{nanos}"),
        build: device.arithmetic().to_owned(),
    })
}
