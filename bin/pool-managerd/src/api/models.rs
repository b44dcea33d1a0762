//! The route `/models/download`.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use pool_core::api::models::{DownloadEvent, ModelDownloadRequest};
use pool_core::kit::service::Json;
use pool_core::kit::sse::SseEvent as _;
use pool_core::kit::wire::ErrorEnvelope;
use tokio::sync::watch;

use super::App;
use super::error::ApiResult;
use crate::downloads;

/// Interval between keep-alive messages on a stream without events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Downloads a model and streams the download's events.
///
/// A second request for the same model follows the same download. A client that disconnects does not end the download. The
/// stream carries any number of `progress` and `waiting` events, then exactly one `end` or `error`.
#[utoipa::path(
    post, path = "/models/download", tag = "pool",
    request_body = ModelDownloadRequest,
    responses(
        (status = 200, description = "The events `progress`, `waiting`, `end` or `error`.", body = DownloadEvent, content_type = "text/event-stream"),
        (status = 400, description = "`MODEL_NOT_ALLOWED` for an `hf:` reference without `models.allow_hub`, or a `file:`.", body = ErrorEnvelope),
        (status = 404, description = "Unknown model.", body = ErrorEnvelope),
        (status = 422, description = "`MODEL_UNSUPPORTED`: no worker could run it.", body = ErrorEnvelope),
        (status = 503, description = "`NO_DOWNLOADER`: `llorch-pool` is not installed.", body = ErrorEnvelope),
    )
)]
pub async fn download(
    State(pool): App,
    Json(request): Json<ModelDownloadRequest>,
) -> ApiResult<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    let download = pool
        .blocking(move |pool| downloads::start(pool, &request.model))
        .await?;
    Ok(Sse::new(follow(download)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

fn follow(
    mut download: watch::Receiver<Option<DownloadEvent>>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    async_stream::stream! {
        loop {
            let event = download.borrow_and_update().clone();
            if let Some(event) = event {
                yield Ok(Event::default().event(event.name()).data(event.data()));
                if event.is_last() {
                    return;
                }
            }
            if download.changed().await.is_err() {
                return;
            }
        }
    }
}
