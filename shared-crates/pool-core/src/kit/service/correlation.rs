//! Correlation ids, which identify a request in the logs of all daemons that it passes through.

use std::fmt;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use super::ServiceError;

/// The header that carries the correlation id.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-correlation-id");
const MAX_LEN: usize = 64;

tokio::task_local! {
    static CURRENT: CorrelationId;
}

/// A correlation id: `[A-Za-z0-9-]{1,64}`. As an argument of a handler, the id of the current request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorrelationId(String);

impl CorrelationId {
    /// Returns the id of the request that the current task answers; `None` outside a request.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// Returns a new id: a random UUID.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the caller's id, if it is valid. An invalid id is replaced rather than refused, because it only serves to
    /// search logs.
    fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(HEADER)?.to_str().ok()?;
        let fits = (1..=MAX_LEN).contains(&text.len())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        fits.then(|| Self(text.to_owned()))
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for CorrelationId {
    type Rejection = ServiceError;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Self, ServiceError> {
        Ok(Self::current().unwrap_or_else(Self::random))
    }
}

/// Attaches the request's id to its task, its log lines and its answer.
pub(super) async fn scope(request: Request, next: Next) -> Response {
    let id = CorrelationId::from_headers(request.headers()).unwrap_or_else(CorrelationId::random);
    // Log the path without its query, which may contain confidential data.
    let span = tracing::info_span!("request", correlation_id = %id, method = %request.method(), path = request.uri().path());
    let mut response = CURRENT
        .scope(id.clone(), next.run(request).instrument(span))
        .await;
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}
