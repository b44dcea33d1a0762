//! Async runtime of a daemon, sized to the threads that the system allows.
//!
//! A runtime starts threads on demand, and panics or waits forever if the system allows none (a cgroup's `pids.max`, a
//! user's `RLIMIT_NPROC`). So this module counts the available threads first, and starts and keeps those that the control
//! path needs.

use std::io;
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};

use crate::kit::units::{human_bytes, human_bytes_up};

/// Fewest threads for blocking work, which are permanent.
const LEAST_BLOCKING: usize = 2;
/// Most threads for blocking work.
const MOST_BLOCKING: usize = 64;
/// Lifetime of an idle thread for blocking work. Threads are kept because the system may not allow new ones later.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most bytes of address space that a daemon's code, data and buffers take, not counting its threads.
const ADDRESS_SPACE: u64 = 256 << 20;
/// Bytes of address space of a thread's stack, including the system's overhead.
const STACK: u64 = (2 << 20) + (64 << 10);
/// Threads and processes left over for short-lived children of the daemon.
const MARGIN: usize = 4;

/// A runtime that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Too few threads allowed by the system.
    #[error("the system allows {found} more threads: at least {needed} are needed")]
    Threads {
        /// Additional threads that could be started.
        found: usize,
        /// Fewest additional threads with which the daemon works.
        needed: usize,
    },
    /// A limit on address space that is too low.
    #[error(
        "the limit on address space (`ulimit -v`) is {}: at least {} is needed",
        human_bytes(*limit),
        human_bytes_up(*needed)
    )]
    AddressSpace {
        /// The limit in force, in bytes.
        limit: u64,
        /// The lowest limit in bytes with which the daemon works.
        needed: u64,
    },
    /// Another error of the system.
    #[error("could not start the runtime")]
    System(#[source] io::Error),
}

impl RuntimeError {
    /// Returns a remedy, if there is one.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Threads { .. } => Some(
                "raise `pids.max` of the cgroup (`TasksMax=` of the systemd unit) or `ulimit -u`",
            ),
            Self::AddressSpace { .. } => Some(
                "raise `ulimit -v`, or bound the memory in use instead, with `memory.max` of the cgroup (`MemoryMax=` of the \
                 systemd unit)",
            ),
            Self::System(_) => None,
        }
    }
}

/// Returns how many threads, at most `wanted`, can run in addition to the running ones. Starts them to find out.
pub fn available(wanted: usize) -> usize {
    let (hold, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let mut started = Vec::with_capacity(wanted);
    for _ in 0..wanted {
        let held = Arc::clone(&held);
        let wait = move || {
            let held = held.lock();
            // Blocks until the sender is dropped.
            let _ = held.map(|held| held.recv());
        };
        match thread::Builder::new().spawn(wait) {
            Ok(thread) => started.push(thread),
            Err(_) => break,
        }
    }
    drop(hold);
    let found = started.len();
    for thread in started {
        let _ = thread.join();
    }
    found
}

/// Starts a runtime of at most `workers` worker threads that leaves `own` threads to the daemon.
pub fn runtime(workers: usize, own: usize) -> Result<Runtime, RuntimeError> {
    let needed = 1 + LEAST_BLOCKING + own;
    let comfortable = workers + 2 * LEAST_BLOCKING + own + MARGIN;
    fit_address_space((workers + MOST_BLOCKING + own + MARGIN) as u64)?;
    let found = available(comfortable.max(needed));
    if found < needed {
        return Err(RuntimeError::Threads { found, needed });
    }
    let ours = found - own;
    let (workers, blocking) = match found >= comfortable {
        true => (workers, MOST_BLOCKING),
        false => {
            let workers = workers.min((ours - LEAST_BLOCKING) / 2).max(1);
            (workers, (ours - workers).min(LEAST_BLOCKING))
        }
    };
    let runtime = Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(blocking)
        .thread_keep_alive(KEPT)
        .enable_all()
        .build()
        .map_err(RuntimeError::System)?;
    start_blocking_threads(&runtime, LEAST_BLOCKING);
    Ok(runtime)
}

/// Fails if this many threads don't fit the limit on address space; otherwise keeps the allocator from exceeding it.
fn fit_address_space(threads: u64) -> Result<(), RuntimeError> {
    let Some(limit) = getrlimit(Resource::As).current else {
        return Ok(());
    };
    // glibc gives each thread an arena that reserves 64 MiB or more, up to eight arenas for each processor.
    share_one_arena();
    let needed = ADDRESS_SPACE + threads * STACK;
    if limit < needed {
        return Err(RuntimeError::AddressSpace { limit, needed });
    }
    Ok(())
}

/// Makes all threads allocate from one arena. Only glibc's allocator needs this setting.
fn share_one_arena() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` takes two numbers and changes a setting of the allocator under the allocator's lock.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Starts `count` threads for blocking work and waits until all of them run, so that later work finds them idle.
fn start_blocking_threads(runtime: &Runtime, count: usize) {
    let all = Arc::new(Barrier::new(count + 1));
    for _ in 0..count {
        let all = Arc::clone(&all);
        runtime.spawn_blocking(move || all.wait());
    }
    all.wait();
}

/// Returns the number of processors available to this process.
pub fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-073] [P23]
    fn a_runtime_has_its_threads_from_the_start() {
        let runtime = runtime(2, 1).unwrap();
        assert_eq!(runtime.metrics().num_workers(), 2);
        let answer = runtime.block_on(async { tokio::task::spawn_blocking(|| 7).await });
        assert_eq!(answer.unwrap(), 7);
    }

    #[test] // [POOLCORE-073] [P23]
    fn threads_that_can_be_had_are_counted_and_given_back() {
        assert_eq!((available(0), available(5), available(5)), (0, 5, 5));
    }

    #[test] // [POOLCORE-073]
    fn too_few_threads_is_an_error_with_both_numbers() {
        let error = RuntimeError::Threads {
            found: 3,
            needed: 9,
        };
        assert_eq!(
            error.to_string(),
            "the system allows 3 more threads: at least 9 are needed"
        );
        assert!(error.hint().unwrap().contains("pids.max"));
    }
}
