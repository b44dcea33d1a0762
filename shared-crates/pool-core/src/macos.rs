//! Readings of a Mac's memory, which the CPU and the GPU share, and of the GPU.
//!
//! The programs run only on macOS and not in this project's tests. The parsing of their output is plain text processing, which
//! is tested everywhere.

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

/// Returns the bytes that are unused or immediately reclaimable, according to the output of `vm_stat`.
fn available_bytes(vm_stat: &str) -> Option<u64> {
    let (_, after) = vm_stat.split_once("page size of ")?;
    let page_bytes: u64 = after.split_whitespace().next()?.parse().ok()?;
    let pages = |name: &str| -> Option<u64> {
        let line = vm_stat.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches('.').parse().ok()
    };
    let idle = pages("Pages free:")?
        .saturating_add(pages("Pages inactive:")?)
        .saturating_add(pages("Pages speculative:").unwrap_or(0));
    Some(idle.saturating_mul(page_bytes))
}

#[cfg(target_os = "macos")]
pub use run::{MetalSource, memory};

#[cfg(target_os = "macos")]
mod run {
    use std::io;
    use std::process::Command;

    use super::{available_bytes, working_set_bytes};
    use crate::gpu::{GpuMemory, GpuReading, GpuSource, ReadError};
    use crate::lifecycle::DeviceMemory;
    use crate::worker::Backend;

    /// Name of the user's limit for the GPU in MiB, which is 0 if unset. Older systems lack it.
    const WIRED_LIMIT: &str = "iogpu.wired_limit_mb";

    /// Returns the main memory of this host.
    pub fn memory() -> io::Result<DeviceMemory> {
        let total_bytes: u64 = sysctl("hw.memsize")?.parse().map_err(io::Error::other)?;
        let available = available_bytes(&output("/usr/bin/vm_stat", &[])?)
            .ok_or_else(|| io::Error::other("vm_stat has an unknown format"))?;
        Ok(DeviceMemory {
            total_bytes,
            available_bytes: available.min(total_bytes),
            as_of: None,
        })
    }

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

    fn sysctl(name: &str) -> io::Result<String> {
        output("/usr/sbin/sysctl", &["-n", name])
    }

    fn output(program: &str, args: &[&str]) -> io::Result<String> {
        let output = Command::new(program).args(args).output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!("{program}: {}", output.status)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
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

    #[test] // [POOLD-093]
    fn free_memory_is_read_from_vm_stat() {
        let text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n\
            Pages free:                               24105.\n\
            Pages active:                            401923.\n\
            Pages inactive:                          399514.\n\
            Pages speculative:                         1376.\n\
            Pages throttled:                              0.\n\
            Pages wired down:                        120214.\n";
        assert_eq!(
            available_bytes(text),
            Some((24_105 + 399_514 + 1_376) * 16_384)
        );
        assert_eq!(available_bytes("Pages free: many."), None);
        assert_eq!(available_bytes(""), None);
    }
}
