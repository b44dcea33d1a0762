//! Ctrl-C, SIGTERM and a closed terminal, as something that can be awaited and asked.

use std::ops::ControlFlow;

use super::{CliError, Exit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Whether this process was asked to end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// From now on the signals no longer end the process by themselves: whoever holds this does.
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
            // Nobody may be listening any more, which is fine.
            let _ = told.send(true);
            // The channel stays open, so that those who await it later see it too.
            told.closed().await;
        });
        Ok(Self(asked))
    }

    /// Returns when a signal has come.
    pub async fn wait(&self) {
        // The sender lives as long as a receiver does, so this can't fail.
        let _ = self.0.clone().wait_for(|asked| *asked).await;
    }

    /// Breaks off a loop once a signal has come.
    pub fn check(&self) -> ControlFlow<()> {
        if *self.0.borrow() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// The error of a command that was interrupted.
pub fn interrupted(what: &str) -> CliError {
    CliError::new(Exit::Interrupted, format!("interrupted: {what}"))
}
