//! The host's processors.

use std::fs;

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
