//! The GPU of a Mac, which shares the main memory with the processors.
//!
//! The driver is read only on macOS and not in this project's tests.

const GIB: u64 = 1 << 30;

/// Returns the bytes that a Mac with `memory_bytes` lets its GPU use, which Metal reports as `recommendedMaxWorkingSetSize`.
/// Macs allow two thirds of up to 32 GiB, and three quarters of more: 10.7 GiB of 16, 21.3 of 32, 27 of 36, 48 of 64.
fn working_set_bytes(memory_bytes: u64, wired_limit_mib: Option<u64>) -> u64 {
    match wired_limit_mib {
        Some(limit) if limit > 0 => limit.saturating_mul(1 << 20).min(memory_bytes),
        _ if memory_bytes <= 32 * GIB => memory_bytes / 3 * 2,
        _ => memory_bytes / 4 * 3,
    }
}

#[cfg(target_os = "macos")]
pub use run::MetalSource;

#[cfg(target_os = "macos")]
mod run {
    use super::working_set_bytes;
    use crate::gpu::{GpuMemory, GpuReading, GpuSource, ReadError};
    use crate::kit::macos::{memory, sysctl};
    use crate::worker::Backend;

    /// Name of the user's limit for the GPU in MiB, which is 0 if unset. Older systems lack it.
    const WIRED_LIMIT: &str = "iogpu.wired_limit_mb";

    /// The GPU of a Mac with an Apple chip.
    pub struct MetalSource;

    impl GpuSource for MetalSource {
        fn backend(&self) -> Backend {
            Backend::Metal
        }

        fn count(&self) -> Result<u32, String> {
            Ok(u32::from(cfg!(target_arch = "aarch64")))
        }

        fn read(&self, _: u32) -> Result<GpuReading, ReadError> {
            let memory = memory().map_err(|error| ReadError::Failed(error.to_string()))?;
            let limit = sysctl(WIRED_LIMIT)
                .ok()
                .and_then(|limit| limit.parse().ok());
            let total_bytes = working_set_bytes(memory.total_bytes, limit);
            let free_bytes = memory.available_bytes.min(total_bytes);
            Ok(GpuReading {
                name: sysctl("machdep.cpu.brand_string").ok(),
                memory: Some(GpuMemory {
                    total_bytes,
                    used_bytes: total_bytes - free_bytes,
                    free_bytes,
                }),
                ..GpuReading::default()
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-093]
    fn the_gpu_of_a_mac_gets_its_share_of_the_memory() {
        let gib = |bytes: u64| bytes as f64 / GIB as f64;
        for (memory, limit, share) in [
            (16, None, 10.67),
            (32, Some(0), 21.33),
            (36, None, 27.0),
            (64, None, 48.0),
            (64, Some(57_344), 56.0),
            (16, Some(1_000_000), 16.0),
        ] {
            let found = gib(working_set_bytes(memory * GIB, limit));
            assert!((found - share).abs() < 0.01, "{memory}: {found}");
        }
    }
}
