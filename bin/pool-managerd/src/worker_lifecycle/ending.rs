//! Waiting for a process to end.

use std::process::Child;
use std::time::Duration;

use pool_core::lifecycle::ExitFacts;
use pool_core::process::ProcessIdentity;
use tokio::sync::oneshot;

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
                until_gone(&identity);
                ExitFacts::Unknown
            }
            (None, None) => ExitFacts::Unknown,
        };
        // Nobody listens any more once the daemon stops.
        let _ = tell.send(facts);
    });
    told
}

fn until_gone(identity: &ProcessIdentity) {
    loop {
        match identity.wait_gone(Duration::from_secs(3600)) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(pid = identity.pid, %error, "could not wait for a process; looking again");
                std::thread::sleep(Duration::from_millis(500));
                if !identity.is_alive() {
                    return;
                }
            }
        }
    }
}
