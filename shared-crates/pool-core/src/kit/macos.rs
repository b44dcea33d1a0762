//! Readings of a Mac's main memory, and of its kernel's values.
//!
//! The programs run only on macOS and not in this project's tests. The parsing of their output is plain text processing, which
//! is tested everywhere.

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
pub use run::{memory, sysctl};

#[cfg(target_os = "macos")]
mod run {
    use std::io;
    use std::process::Command;

    use super::available_bytes;
    use crate::kit::host_memory::HostMemory;

    /// Returns the main memory of this host.
    pub fn memory() -> io::Result<HostMemory> {
        let total_bytes: u64 = sysctl("hw.memsize")?.parse().map_err(io::Error::other)?;
        let available = available_bytes(&output("/usr/bin/vm_stat", &[])?)
            .ok_or_else(|| io::Error::other("vm_stat has an unknown format"))?;
        Ok(HostMemory {
            total_bytes,
            available_bytes: available.min(total_bytes),
        })
    }

    /// Returns the kernel's value of this name.
    pub fn sysctl(name: &str) -> io::Result<String> {
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
