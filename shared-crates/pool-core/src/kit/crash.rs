//! Crash points for tests. Without the feature `crash-points`, which only tests enable, they do nothing.

/// Kills this process with SIGKILL if the variable `LLORCH_CRASH_AT` names this point: `name`, or `name@N` for the Nth
/// time that the point is reached.
#[cfg(feature = "crash-points")]
pub fn crash_point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);

    let wanted = WANTED.get_or_init(|| {
        let wanted = std::env::var("LLORCH_CRASH_AT").ok()?;
        Some(match wanted.rsplit_once('@') {
            Some((name, nth)) => (name.to_owned(), nth.parse().ok()?),
            None => (wanted, 1),
        })
    });
    let here = wanted.as_ref().filter(|(wanted, _)| wanted == name);
    if here.is_some_and(|(_, nth)| REACHED.fetch_add(1, Ordering::Relaxed) + 1 == *nth) {
        // SIGKILL, so that nothing is flushed, dropped or answered any more.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// Does nothing: this build has no crash points.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub fn crash_point(_name: &str) {}
