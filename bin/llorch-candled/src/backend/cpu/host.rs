//! Processors and memory of the host.

use std::fs;

/// Returns the default number of compute threads: one less than the host's processors, and at least one.
///
/// The last processor is for the system and other programs. With one of two processors busy, two threads compute a prompt at
/// 0.7 of the speed of one: a thread that loses its processor in the middle of a unit delays the others.
pub fn default_threads() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors)
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .max(1)
}

/// Returns the private bytes of this process, without mapped files; `None` if the system doesn't report them.
pub fn private_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
