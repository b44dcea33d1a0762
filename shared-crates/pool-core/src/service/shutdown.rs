//! One request to stop that every part of a daemon hears.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Asks a daemon to stop. Clones are the same request; it can't be taken back.
#[derive(Debug, Clone)]
pub struct Shutdown {
    state: watch::Sender<bool>,
}

impl Shutdown {
    /// A request that only [`Shutdown::trigger`] makes.
    pub fn manual() -> Self {
        Self {
            state: watch::Sender::new(false),
        }
    }

    /// A request that SIGTERM or SIGINT makes as well. Must be called within a tokio runtime.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::manual();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let asked = shutdown.clone();
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::info!(signal = name, "stopping");
            asked.trigger();
        });
        Ok(shutdown)
    }

    /// Makes the request.
    pub fn trigger(&self) {
        self.state.send_replace(true);
    }

    /// Whether it was made.
    pub fn is_requested(&self) -> bool {
        *self.state.borrow()
    }

    /// Returns when it is made, at once if it was.
    pub async fn requested(&self) {
        // This side holds a sender itself, so the channel can't close.
        let _ = self
            .state
            .subscribe()
            .wait_for(|requested| *requested)
            .await;
    }
}
