//! The host's processors.

use std::fs;

/// Compute threads where nobody says how many: one less than the host's processors, and at least one.
///
/// The last processor is for the system, the worker's own threads and its neighbours: two threads on two processors, one of
/// them busy, are no faster than one.
pub fn default_threads() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors)
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .max(1)
}

/// Private bytes of this process: memory that is its own and not a mapped file. `None` where the system doesn't tell.
pub fn private_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
