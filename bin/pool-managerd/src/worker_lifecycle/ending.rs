//! The wait for the end of a process.

use std::io;
use std::process::Child;
use std::sync::mpsc;
use std::time::Duration;

use pool_core::kit::process::ProcessIdentity;
use pool_core::lifecycle::ExitFacts;
use tokio::sync::oneshot;

/// Pause after a wait that failed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Waits until the process has ended, and returns what can be known of its end. Only a parent can read a child's exit status;
/// for any other process only the end itself can be seen.
///
/// The wait needs a plain thread. The runtime waits for its own threads when the daemon stops, and workers outlive the daemon.
pub async fn of(identity: Option<ProcessIdentity>, child: Option<Child>) -> ExitFacts {
    let thread = std::thread::Builder::new;
    of_in(Process { identity, child }, |wait| {
        thread().name("worker-end".into()).spawn(wait).map(drop)
    })
    .await
}

/// Closure that waits for a process.
type Wait = Box<dyn FnOnce() + Send>;

/// Implements [`of`] with threads started by `start`. While the system can't start one, `process` stays here and is checked at
/// intervals, so that a missing thread never counts as an end.
async fn of_in(mut process: Process, mut start: impl FnMut(Wait) -> io::Result<()>) -> ExitFacts {
    let mut warned = false;
    loop {
        if let Some(facts) = process.look() {
            return facts;
        }
        // Hand the process over only once a thread receives it: a closure that never runs is dropped with all it holds.
        let (hand, handed) = mpsc::channel::<Process>();
        let (tell, told) = oneshot::channel();
        let wait = move || {
            if let Ok(process) = handed.recv() {
                // There is no receiver any more once the daemon stops.
                let _ = tell.send(process.wait());
            }
        };
        match start(Box::new(wait)) {
            Ok(()) => {
                let identity = process.identity.clone();
                let _ = hand.send(process);
                match told.await {
                    Ok(facts) => return facts,
                    // The thread failed and lost the child's exit status. The process may still run.
                    Err(_) => {
                        process = Process {
                            identity,
                            child: None,
                        };
                    }
                }
            }
            Err(error) if !warned => {
                warned = true;
                let pid = process.identity.as_ref().map(|identity| identity.pid);
                tracing::warn!(pid, %error, "could not start a thread to wait for a worker's end; polling instead");
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// A process, with its handle if it is a child of this daemon.
struct Process {
    identity: Option<ProcessIdentity>,
    child: Option<Child>,
}

impl Process {
    /// Blocks until the process has ended.
    fn wait(self) -> ExitFacts {
        match (self.child, self.identity) {
            (Some(mut child), _) => child.wait().map_or(ExitFacts::Unknown, ExitFacts::of),
            (None, Some(identity)) => {
                until_gone(
                    &identity,
                    || identity.wait_gone(Duration::from_secs(3600)),
                    || identity.runs(),
                );
                ExitFacts::Unknown
            }
            (None, None) => ExitFacts::Unknown,
        }
    }

    /// Returns how the process ended, or `None` while it runs.
    fn look(&mut self) -> Option<ExitFacts> {
        match (&mut self.child, &self.identity) {
            (Some(child), _) => match child.try_wait() {
                Ok(status) => status.map(ExitFacts::of),
                Err(_) => Some(ExitFacts::Unknown),
            },
            (None, Some(identity)) => {
                matches!(identity.runs(), Ok(false)).then_some(ExitFacts::Unknown)
            }
            (None, None) => Some(ExitFacts::Unknown),
        }
    }
}

/// Returns once the process is known to have ended. An error proves no end: without free file descriptors every check fails,
/// and memory that is still in use would be promised again.
fn until_gone(
    identity: &ProcessIdentity,
    mut wait: impl FnMut() -> io::Result<bool>,
    mut runs: impl FnMut() -> io::Result<bool>,
) {
    loop {
        match wait() {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(pid = identity.pid, %error, "could not wait for a process; trying again");
                std::thread::sleep(LOOK_AGAIN);
                if matches!(runs(), Ok(false)) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test] // [POOLD-014]
    fn a_process_that_cannot_be_looked_at_has_not_ended() {
        let identity = ProcessIdentity::current().unwrap();
        let failed = || Err(io::Error::other("too many open files"));
        let mut looks = vec![failed(), Ok(true), failed(), Ok(false)].into_iter();
        until_gone(&identity, failed, || looks.next().unwrap());
        assert_eq!(
            looks.len(),
            0,
            "the wait was abandoned before the process had ended"
        );
    }

    /// Starts a child that exits with 3 when its standard input is closed.
    fn child() -> Process {
        let child = Command::new("sh")
            .args(["-c", "read line; exit 3"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Process {
            identity: ProcessIdentity::of(child.id()).unwrap(),
            child: Some(child),
        }
    }

    #[tokio::test] // [POOLD-023]
    async fn a_child_without_a_thread_stays_watched_and_tells_how_it_ended() {
        // Never a thread, and then one at the third attempt.
        for threads_from in [usize::MAX, 3] {
            let mut process = child();
            let mut told_to_end = process.child.as_mut().unwrap().stdin.take();
            let mut attempts = 0;
            let facts = of_in(process, |wait| {
                attempts += 1;
                if attempts == 3 {
                    drop(told_to_end.take());
                }
                if attempts < threads_from {
                    return Err(io::Error::from(io::ErrorKind::WouldBlock));
                }
                std::thread::spawn(wait);
                Ok(())
            });
            assert_eq!(facts.await, ExitFacts::Exited(3));
        }
    }

    #[tokio::test] // [POOLD-023]
    async fn a_thread_that_fails_ends_no_worker() {
        let mut process = child();
        let mut told_to_end = process.child.as_mut().unwrap().stdin.take();
        let mut attempts = 0;
        let facts = of_in(process, |wait| {
            attempts += 1;
            match attempts {
                // Dropped with all that it holds, as after a panic.
                1 => drop(wait),
                2 => {
                    drop(told_to_end.take());
                    std::thread::spawn(wait);
                }
                _ => unreachable!("the second attempt waits until the end"),
            }
            Ok(())
        });
        assert_eq!(facts.await, ExitFacts::Unknown);
        assert_eq!(attempts, 2, "the process was reported as ended too early");
    }
}
