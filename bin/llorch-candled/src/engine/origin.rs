//! What an answer's tokens depend on beside the request: the model file and the build.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use candle_core::Device;
use pool_core::api::worker::Origin;
use pool_core::catalog::gguf::GgufError;

/// The origin of what a model file gives on a device. Without a hash of the file its place on the disk, size and time of
/// change stand for it: two files that agree in all of them are one.
pub fn of(path: &Path, device: &Device) -> Result<Origin, GgufError> {
    let metadata = std::fs::metadata(path)?;
    let (device_id, inode, size) = (metadata.dev(), metadata.ino(), metadata.len());
    let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Origin {
        model: format!("file:{device_id}.{inode}.{size}.{seconds}.{nanos}"),
        build: build(device),
    })
}

/// Names everything of the program and the processor that may change how a product is rounded: kernels are chosen when the
/// program is built, and again for the processor that runs it.
fn build(device: &Device) -> String {
    let place = match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    };
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let parts = [
        env!("CARGO_PKG_VERSION"),
        profile,
        std::env::consts::OS,
        std::env::consts::ARCH,
        place,
    ];
    parts
        .into_iter()
        .chain(instructions())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> impl Iterator<Item = &'static str> {
    let found = [
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("built-avx2", cfg!(target_feature = "avx2")),
        ("built-fma", cfg!(target_feature = "fma")),
        ("built-avx512f", cfg!(target_feature = "avx512f")),
    ];
    found
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> impl Iterator<Item = &'static str> {
    let found = [
        ("built-neon", cfg!(target_feature = "neon")),
        ("built-dotprod", cfg!(target_feature = "dotprod")),
        ("built-fp16", cfg!(target_feature = "fp16")),
    ];
    found
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
}
