//! The main memory of this host, the part of it that this process may use, and the part that a process holds.

use std::io;

#[cfg(target_os = "linux")]
use super::cgroup;
#[cfg(target_os = "macos")]
use super::macos;

/// A reading of the main memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// Bytes that this process and its workers may take in total.
    pub total_bytes: u64,
    /// Bytes of these that were unused at the time of the reading.
    pub available_bytes: u64,
}

#[cfg(any(target_os = "linux", test))]
impl HostMemory {
    /// Restricts the memory to that of a cgroup with a limit of `limit` bytes, of which `left` remain.
    fn inside(self, limit: Option<u64>, left: Option<u64>) -> Self {
        let at_most = |bytes: u64, most: Option<u64>| most.map_or(bytes, |most| bytes.min(most));
        Self {
            total_bytes: at_most(self.total_bytes, limit),
            available_bytes: at_most(self.available_bytes, left),
        }
    }
}

/// Returns the main memory for this process and its workers: the host's, or the remainder of the memory cgroup. Clean page
/// cache counts as available; dirty pages do not.
#[cfg(target_os = "linux")]
pub fn read() -> io::Result<HostMemory> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let host = parse_meminfo(&text)
        .ok_or_else(|| io::Error::other("/proc/meminfo has an unknown format"))?;
    Ok(host.inside(cgroup::memory_limit(), cgroup::memory_left()))
}

#[cfg(target_os = "linux")]
fn parse_meminfo(text: &str) -> Option<HostMemory> {
    let pages = |name| kibibytes(text, name).unwrap_or(0);
    let unwritten = pages("Dirty:").saturating_add(pages("Writeback:"));
    Some(HostMemory {
        total_bytes: kibibytes(text, "MemTotal:")?,
        // The kernel's own estimate includes the page cache, even dirty pages.
        available_bytes: kibibytes(text, "MemAvailable:")?.saturating_sub(unwritten),
    })
}

/// Returns a field of a file in `/proc`, converted from `kB` to bytes.
#[cfg(target_os = "linux")]
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Returns the main memory of this host. This project's tests do not run this function, but they do test the parsing.
#[cfg(target_os = "macos")]
pub fn read() -> io::Result<HostMemory> {
    macos::memory()
}

/// Returns the private memory of a process (no mapped files, not swapped out), or `None` if the system does not report it.
#[cfg(target_os = "linux")]
pub fn private_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    kibibytes(&status, "RssAnon:")
}

/// Returns `None`, because this system does not report the private memory of a process.
#[cfg(not(target_os = "linux"))]
pub fn private_bytes(_pid: u32) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    #[test] // [POOLD-014]
    fn a_cgroup_lowers_what_the_host_has() {
        let host = HostMemory {
            total_bytes: 16 * GB,
            available_bytes: 10 * GB,
        };
        assert_eq!(host.inside(None, None), host);
        let inside = host.inside(Some(4 * GB), Some(3 * GB));
        assert_eq!(
            (inside.total_bytes, inside.available_bytes),
            (4 * GB, 3 * GB)
        );
        let full = host.inside(Some(4 * GB), Some(0));
        assert_eq!(full.available_bytes, 0);
        assert_eq!(host.inside(Some(64 * GB), Some(63 * GB)), host);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_reports_its_memory() {
        let memory = read().unwrap();
        assert!(memory.available_bytes > 0 && memory.available_bytes <= memory.total_bytes);
        assert_eq!(
            parse_meminfo("MemTotal: 2 kB\nMemAvailable: 1 kB\n")
                .unwrap()
                .available_bytes,
            1024
        );
        // [POOLCORE-131]
        let unwritten = "MemTotal: 20 kB\nMemAvailable: 10 kB\nActive(file): 8 kB\nDirty: 2 kB\nWriteback: 1 kB\n";
        let available = parse_meminfo(unwritten).unwrap().available_bytes;
        assert_eq!(available, 7 * 1024);
        assert_eq!(parse_meminfo("MemTotal: many\n"), None);
    }
}
