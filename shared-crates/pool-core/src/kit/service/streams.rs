//! Limit on event streams: they stay open for long, and must leave connections to short requests.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{ACCEPT, CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;

use super::capacity::{Load, Want};
use super::{ServiceError, codes};

const EVENT_STREAM: &str = "text/event-stream";

/// Returns whether a request asks for events, according to its path or its `Accept` header.
pub fn asks_for_events(_: &Method, path: &str, headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter();
    path.ends_with("/events")
        || accepted
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.to_ascii_lowercase().contains(EVENT_STREAM))
}

/// Limit of one service on event streams.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub load: Load,
    pub is_stream: fn(&Method, &str, &HeaderMap) -> bool,
}

/// Refuses an event stream if no place is free. Runs before the handler, because a task that is already stored must not be
/// answered with a refusal.
pub(super) async fn limit(State(bound): State<Bound>, request: Request, next: Next) -> Response {
    let Bound { load, is_stream } = bound;
    if !is_stream(request.method(), request.uri().path(), request.headers()) {
        return next.run(request).await;
    }
    let Some(place) = load.stream() else {
        load.refuse(Want::Streams);
        let refusal = ServiceError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            codes::OVERLOADED,
            "this daemon has too many event streams open",
        )
        .hint("poll the state instead of following it, or retry later")
        .retry_after(Duration::from_secs(1));
        // A refused reader must not hold a connection that others could use.
        return ([(CONNECTION, "close")], refusal).into_response();
    };
    let response = next.run(request).await;
    let kind = response.headers().get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(EVENT_STREAM.as_bytes())) {
        return response.map(|inner| {
            Body::new(Held {
                inner,
                _place: place,
            })
        });
    }
    response
}

/// A body that holds a place until it is dropped.
struct Held {
    inner: Body,
    _place: OwnedSemaphorePermit,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
