//! Request to stop, shared by all parts of a daemon.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// A request to stop a daemon. Clones share the request, which can't be withdrawn.
#[derive(Debug, Clone)]
pub struct Shutdown {
    state: watch::Sender<bool>,
}

impl Shutdown {
    /// Returns a request that only [`Shutdown::trigger`] makes.
    pub fn manual() -> Self {
        Self {
            state: watch::Sender::new(false),
        }
    }

    /// Returns a request that SIGTERM and SIGINT make as well. Must be called within a tokio runtime.
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

    /// Requests the stop.
    pub fn trigger(&self) {
        self.state.send_replace(true);
    }

    /// Returns whether the stop was requested.
    pub fn is_requested(&self) -> bool {
        *self.state.borrow()
    }

    /// Waits until the stop is requested. Returns at once if it already was.
    pub async fn requested(&self) {
        // `self` holds a sender, so the channel can't close.
        let _ = self
            .state
            .subscribe()
            .wait_for(|requested| *requested)
            .await;
    }
}
