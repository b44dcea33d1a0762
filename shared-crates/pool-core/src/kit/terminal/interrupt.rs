//! Ctrl-C, SIGTERM and a closed terminal as a state that can be awaited or polled.

use std::ops::ControlFlow;

use super::{CliError, Exit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// A request to end this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// Starts catching SIGINT, SIGTERM and SIGHUP, which from now on no longer end the process.
    pub fn catch() -> Result<Self, CliError> {
        let mut signals = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ]
        .into_iter()
        .map(signal)
        .collect::<Result<Vec<_>, _>>()?;
        let (told, asked) = watch::channel(false);
        tokio::spawn(async move {
            std::future::poll_fn(|context| {
                let came = signals
                    .iter_mut()
                    .any(|signal| signal.poll_recv(context).is_ready());
                if came {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            })
            .await;
            // Fails if all receivers are gone, which is harmless.
            let _ = told.send(true);
            // Keeps the channel open while receivers exist, so that a later `wait` does not fail.
            told.closed().await;
        });
        Ok(Self(asked))
    }

    /// Waits for a signal. Returns at once if one has arrived.
    pub async fn wait(&self) {
        // Can't fail: the sender lives as long as any receiver.
        let _ = self.0.clone().wait_for(|asked| *asked).await;
    }

    /// Returns `Break` once a signal has arrived.
    pub fn check(&self) -> ControlFlow<()> {
        if *self.0.borrow() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// Returns the error of an interrupted command. `what` names the interrupted work or the state it leaves behind.
pub fn interrupted(what: &str) -> CliError {
    CliError::new(Exit::Interrupted, format!("interrupted: {what}"))
}
