//! Cleanup of everything that a run has started, however the run itself ends.
//!
//! Each home folder is registered before any process starts in it. A run that returns, panics or gets a signal cleans
//! up by itself. A killed run can't: a second process, the watcher, reads the same registrations from a pipe and cleans
//! up once the pipe breaks.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, BufRead, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pool_core::kit::process::{ProcessIdentity, Signal};

use crate::process;

/// Longest time that killed processes of one home may take to disappear.
const PATIENCE: Duration = Duration::from_secs(30);
/// Name of the hidden command that runs the watcher.
pub const WATCH: &str = "watch-leftovers";
/// End mark of a registration: the one byte that no path contains.
const END: u8 = 0;

struct State {
    homes: BTreeSet<PathBuf>,
    watcher: Option<ChildStdin>,
}

static STATE: Mutex<State> = Mutex::new(State {
    homes: BTreeSet::new(),
    watcher: None,
});

fn state() -> MutexGuard<'static, State> {
    // Every change is complete before anything could panic.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn report(&mut self, mark: u8, home: &Path) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        let line = [&[mark], home.as_os_str().as_bytes(), &[END]].concat();
        // A killed watcher matters only if the run is killed as well.
        if watcher.write_all(&line).is_err() {
            self.watcher = None;
        }
    }
}

/// Registers a home folder, before any process starts in it.
pub fn register(home: &Path) {
    let mut state = state();
    state.homes.insert(home.to_owned());
    state.report(b'+', home);
}

/// Ends the processes of a registered home and removes its registration. The folder stays.
pub fn close(home: &Path) {
    end_processes(home);
    let mut state = state();
    state.homes.remove(home);
    state.report(b'-', home);
}

/// Ends the processes of every registered home, and removes the folders.
pub fn end_all() {
    let homes: Vec<_> = state().homes.iter().cloned().collect();
    for home in homes {
        close(&home);
        remove(&home);
    }
}

fn end_processes(home: &Path) {
    let begun = Instant::now();
    let mut quiet = 0;
    // A process may start another while the list is read, so two empty lists in a row are required.
    while quiet < 2 && begun.elapsed() < PATIENCE {
        let left = process::left_running(home);
        quiet = if left.is_empty() { quiet + 1 } else { 0 };
        for (pid, _) in left {
            if let Ok(Some(identity)) = ProcessIdentity::of(pid) {
                let _ = identity.signal(Signal::KILL);
            }
        }
        if quiet == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove(home: &Path) {
    match std::fs::remove_dir_all(home) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("could not remove {}: {error}", home.display());
        }
        _ => {}
    }
}

/// A guard that ends all processes on drop: at the end of `main`, and after a panic.
#[derive(Debug)]
pub struct EndsAll(());

impl EndsAll {
    /// Returns a guard, and starts the watcher. The watcher leaves this process's group, so that a signal to the group
    /// spares it.
    pub fn with_watcher() -> io::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .arg(WATCH)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()?;
        state().watcher = child.stdin;
        Ok(Self(()))
    }
}

impl Drop for EndsAll {
    fn drop(&mut self) {
        end_all();
    }
}

/// Reads registrations until the registering process is gone, and then cleans up what is still registered.
pub fn watch(registrations: &mut impl BufRead) -> io::Result<()> {
    let mut homes = BTreeSet::new();
    let mut line = Vec::new();
    while registrations.read_until(END, &mut line)? > 0 {
        let complete = line.pop() == Some(END);
        if let (true, Some((mark, home))) = (complete, line.split_first()) {
            let home = PathBuf::from(OsStr::from_bytes(home));
            match mark {
                b'+' => homes.insert(home),
                _ => homes.remove(&home),
            };
        }
        line.clear();
    }
    for home in homes {
        end_processes(&home);
        remove(&home);
    }
    Ok(())
}
