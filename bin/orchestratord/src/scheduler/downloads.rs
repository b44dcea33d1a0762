//! Downloads that the scheduler requests from pools: their requests, progress and outcomes.

use std::sync::Arc;

use futures_util::StreamExt as _;
use pool_core::ModelRef;
use pool_core::api::models::{
    DownloadEvent, DownloadPhase, DownloadProgress, ModelDownloadRequest,
};
use pool_core::kit::client::{ApiClient, Method};
use pool_core::kit::sse::SseEvent as _;

use super::Scheduler;
use crate::clock;

/// The failure of a download, and whether a later request may succeed.
struct Failure {
    message: String,
    retriable: bool,
}

impl Failure {
    fn passing(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            retriable: true,
        }
    }
}

impl Scheduler {
    /// Requests a model from a pool. If the pool is already downloading it, the request follows that download.
    pub(super) fn download(self: &Arc<Self>, pool: &str, model: &ModelRef) {
        let size = self.catalog.find(model).and_then(|entry| entry.size_bytes);
        let Some(client) = self
            .fleet
            .begin_download(pool, model, size.unwrap_or_default())
        else {
            return;
        };
        tracing::info!(pool, %model, "asking for a download");
        let (scheduler, pool, model) = (Arc::clone(self), pool.to_owned(), model.clone());
        self.background.spawn(async move {
            let ended = tokio::select! {
                ended = scheduler.follow(&client, &pool, &model) => ended,
                () = scheduler.jobs.shutdown.requested() => return,
            };
            match ended {
                Ok(()) => {
                    tracing::info!(pool, %model, "downloaded");
                    scheduler.fleet.download_ended(&pool, &model, clock::now());
                }
                Err(Failure { message, retriable }) => {
                    tracing::warn!(pool, %model, error = message, "a download failed");
                    scheduler.fleet.download_failed(
                        &pool,
                        &model,
                        message,
                        retriable,
                        clock::now(),
                    );
                }
            }
            scheduler.jobs.changed.notify_one();
        });
    }

    /// Records the progress of a download until it ends.
    async fn follow(
        &self,
        client: &ApiClient,
        pool: &str,
        model: &ModelRef,
    ) -> Result<(), Failure> {
        let request = ModelDownloadRequest {
            model: model.clone(),
        };
        let call = client
            .request(Method::POST, "/models/download")
            .json(&request);
        let mut events = client.events(call).await.map_err(|error| Failure {
            message: error.to_string(),
            // A pool's outright refusal lasts until its cause is fixed.
            retriable: error.api().is_none_or(|body| body.retriable),
        })?;
        while let Some(event) = events.next().await {
            let event = event.map_err(|error| Failure::passing(error.to_string()))?;
            match DownloadEvent::parse(&event.event, &event.data).ok() {
                Some(DownloadEvent::Progress(progress)) => {
                    if let Some(percent) = percent(&progress)
                        && self.fleet.download_moved(pool, model, percent)
                    {
                        self.jobs.changed.notify_one();
                    }
                }
                Some(DownloadEvent::End(_)) => return Ok(()),
                Some(DownloadEvent::Error(failure)) => {
                    return Err(Failure {
                        message: failure.message,
                        retriable: failure.retriable,
                    });
                }
                // Another process of the pool downloads the model, or a newer pool sends an event unknown to this release.
                Some(DownloadEvent::Waiting(_)) | None => {}
            }
        }
        Err(Failure::passing(
            "the pool's event stream ended before the download did",
        ))
    }
}

/// Returns the percentage of bytes downloaded. Unpacking and checking count as 100, because they follow the last byte.
fn percent(progress: &DownloadProgress) -> Option<u8> {
    match progress.phase {
        DownloadPhase::Downloading => {
            let total = progress.total_bytes.filter(|total| *total > 0)?;
            let done = u128::from(progress.done_bytes);
            u8::try_from((done * 100 / u128::from(total)).min(100)).ok()
        }
        DownloadPhase::Unpacking | DownloadPhase::Checking => Some(100),
    }
}
