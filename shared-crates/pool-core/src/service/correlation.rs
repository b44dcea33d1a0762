//! The id that finds one request in the logs of every daemon it passed through.

use std::fmt;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use super::ServiceError;

/// The header that carries it.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-correlation-id");
const MAX_LEN: usize = 64;

tokio::task_local! {
    static CURRENT: CorrelationId;
}

/// A correlation id: `[A-Za-z0-9-]{1,64}`. As a handler's argument it is the request's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorrelationId(String);

impl CorrelationId {
    /// The id of the request that the current task answers.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// A fresh one.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id that a caller gave, if it is one. Anything else is replaced rather than refused: it is only a name.
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

/// Gives the request its id: in the task, in the log, in the answer.
pub(super) async fn scope(request: Request, next: Next) -> Response {
    let id = CorrelationId::from_headers(request.headers()).unwrap_or_else(CorrelationId::random);
    // The path without its query: a query may hold what belongs in no log.
    let span = tracing::info_span!("request", correlation_id = %id, method = %request.method(), path = request.uri().path());
    let mut response = CURRENT
        .scope(id.clone(), next.run(request).instrument(span))
        .await;
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}
