//! Waiting for a process to end.

use std::io;
use std::process::Child;
use std::time::Duration;

use pool_core::lifecycle::ExitFacts;
use pool_core::process::ProcessIdentity;
use tokio::sync::oneshot;

/// The pause after a wait that failed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Tells how the process ends, as far as that can be known: a child's exit status is its parent's to read, and of
/// any other process only the end itself can be seen.
///
/// A plain thread waits, and not one of the runtime's, because the runtime waits for its own when the daemon stops;
/// workers outlive the daemon.
pub fn of(identity: Option<ProcessIdentity>, child: Option<Child>) -> oneshot::Receiver<ExitFacts> {
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || {
        let facts = match (child, identity) {
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
        };
        // Nobody listens any more once the daemon stops.
        let _ = tell.send(facts);
    });
    told
}

/// Returns once the process is known to have ended. What can't be told is no end: with no file handle to spare nothing
/// can, and memory that is still in use would be promised again.
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
                tracing::warn!(pid = identity.pid, %error, "could not wait for a process; looking again");
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

    #[test] // [POOLD-014]
    fn a_process_that_cannot_be_looked_at_has_not_ended() {
        let identity = ProcessIdentity::current().unwrap();
        let failed = || Err(io::Error::other("too many open files"));
        let mut looks = vec![failed(), Ok(true), failed(), Ok(false)].into_iter();
        until_gone(&identity, failed, || looks.next().unwrap());
        assert_eq!(looks.len(), 0, "it was given up before it had ended");
    }
}
