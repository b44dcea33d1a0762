//! What an answer's tokens depend on beside the request: the model file and the arithmetic.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use pool_core::api::worker::Origin;
use pool_core::catalog::gguf::GgufError;

use crate::backend::Device;

/// The origin of what a model file gives on a device. Without a hash of the file its place on the disk, size and time of
/// change stand for it: two files that agree in all of them are one.
pub fn of(path: &Path, device: Device) -> Result<Origin, GgufError> {
    let metadata = std::fs::metadata(path)?;
    let (device_id, inode, size) = (metadata.dev(), metadata.ino(), metadata.len());
    let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Origin {
        model: format!("file:{device_id}.{inode}.{size}.{seconds}.{nanos}"),
        build: device.arithmetic().to_owned(),
    })
}
