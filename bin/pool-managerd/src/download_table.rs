//! The downloads under way, as the rest of the daemon sees them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pool_core::ModelRef;
use pool_core::api::models::DownloadEvent;
use pool_core::kit::sse::SseEvent as _;
use tokio::sync::watch;

/// The latest event of a download; `None` before the first.
pub type Latest = Option<DownloadEvent>;

/// The downloads under way.
pub struct Downloads {
    running: Mutex<HashMap<ModelRef, watch::Receiver<Latest>>>,
    /// Set to true once all downloads must end.
    over: watch::Sender<bool>,
}

impl Default for Downloads {
    fn default() -> Self {
        Self {
            running: Mutex::default(),
            over: watch::Sender::new(false),
        }
    }
}

impl Downloads {
    /// Asks all downloads to end. Partial files are kept, and later downloads resume from them.
    pub fn end(&self) {
        self.over.send_replace(true);
    }

    /// Returns a receiver of the order to end, which is true once all downloads must.
    pub fn end_order(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }

    /// Waits until all downloads have ended.
    pub async fn ended(&self) {
        let running: Vec<_> = self.running().values().cloned().collect();
        for mut download in running {
            let last = |event: &Latest| event.as_ref().is_some_and(DownloadEvent::is_last);
            // A dropped sender belongs to a download that has ended.
            let _ = download.wait_for(last).await;
        }
    }

    /// Returns the models that are being downloaded, by name.
    pub fn models(&self) -> Vec<ModelRef> {
        let mut models: Vec<_> = self.running().keys().cloned().collect();
        models.sort();
        models
    }

    /// Returns whether `model` is being downloaded, even if it names no revision or file.
    pub fn is_under_way(&self, model: &ModelRef) -> bool {
        let running = self.running();
        running
            .keys()
            .any(|other| other == model || other.is_meant_by(model))
    }

    /// Returns the downloads under way, by model, with the events of each.
    pub fn running(&self) -> MutexGuard<'_, HashMap<ModelRef, watch::Receiver<Latest>>> {
        // A panic under the lock can't leave a partial entry.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
