//! Watches the memory that workers hold, and the memory that is reserved for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pool_core::kit::home::Home;
use pool_core::registry::Registry;

/// Pause between two samples.
const INTERVAL: Duration = Duration::from_millis(20);

/// The largest values of all samples, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Most {
    /// Memory reserved for live workers.
    pub reserved: u64,
    /// Private memory of the workers' processes.
    pub private: u64,
    /// Number of samples.
    pub samples: u64,
}

/// A thread that takes samples until it is stopped.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Most>>,
}

impl Watch {
    /// Starts to watch the workers of this home.
    pub fn start(home: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, home) = (Arc::clone(&stop), home.to_owned());
        let thread = std::thread::spawn(move || look(&home, &theirs));
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Stops the thread, and returns the largest values.
    pub fn end(&mut self) -> Most {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("`end` is called once");
        thread.join().expect("the watching thread succeeded")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn look(home: &Path, stop: &AtomicBool) -> Most {
    let registry = Registry::new(&Home::at(home));
    let mut most = Most::default();
    while !stop.load(Ordering::Relaxed) {
        // Before the first worker there may be no folder yet.
        let records = registry.load().map(|contents| contents.records);
        let records = records.unwrap_or_default();
        let reserved = records.iter().map(|record| record.reserved_bytes()).sum();
        let processes = records.iter().filter_map(|record| record.info.pid);
        let private = processes.map(private_bytes).sum();
        most.reserved = most.reserved.max(reserved);
        most.private = most.private.max(private);
        most.samples += 1;
        std::thread::sleep(INTERVAL);
    }
    most
}

/// Returns the memory that a process shares with no other, including clean pages of files; 0 for a process that is gone.
fn private_bytes(pid: u32) -> u64 {
    let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
    let text = fs::read_to_string(path).unwrap_or_default();
    let kibibytes = text
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kibibytes.sum::<u64>() * 1024
}
