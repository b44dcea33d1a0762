//! The host's processors.

use std::fs;

/// Compute threads where nobody says how many: one less than the host's processors, and at least one.
///
/// candle's threads spin at a barrier after every operation, some 200 times a token. As soon as one of them has to share
/// its processor, all of them wait for it: on two processors, one of them busy, two threads make 3 tokens in the time in
/// which one makes 18.
pub fn default_threads() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors)
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .max(1)
}

/// Bounds the threads that candle and rayon compute with. Both read their number once, from these variables, when they
/// first compute.
///
/// # Safety
///
/// No other thread may run yet: changing the environment while another thread reads it is undefined.
#[allow(unsafe_code)]
pub unsafe fn limit_threads(threads: u32) {
    for variable in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        // SAFETY: the caller vouches that this is the only thread.
        unsafe { std::env::set_var(variable, threads.max(1).to_string()) };
    }
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
