//! Errors of requests, in the envelope that all daemons use.

use std::any::Any;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::{CONNECTION, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::CorrelationId;
use crate::kit::errors::with_causes;
use crate::kit::wire::{ErrorBody, ErrorEnvelope};

/// Error codes common to all daemons.
pub mod codes {
    /// 400: the request or its body is invalid.
    pub const INVALID_REQUEST: &str = "INVALID_REQUEST";
    /// 400: the body is not JSON.
    pub const BAD_JSON: &str = "BAD_JSON";
    /// 401: no token, or a wrong one.
    pub const UNAUTHORIZED: &str = "UNAUTHORIZED";
    /// 403: the `Host` header does not name this server.
    pub const UNKNOWN_HOST: &str = "UNKNOWN_HOST";
    /// 403: a browser sent the request for a page of another origin.
    pub const FOREIGN_ORIGIN: &str = "FOREIGN_ORIGIN";
    /// 404: there is no such path.
    pub const NO_SUCH_PATH: &str = "NO_SUCH_PATH";
    /// 405: the path does not support the method.
    pub const METHOD_NOT_ALLOWED: &str = "METHOD_NOT_ALLOWED";
    /// 408: the body did not arrive in time.
    pub const REQUEST_TIMEOUT: &str = "REQUEST_TIMEOUT";
    /// 413: the body is larger than the daemon accepts.
    pub const TOO_LARGE: &str = "TOO_LARGE";
    /// 415: the body is not declared as JSON.
    pub const UNSUPPORTED_MEDIA_TYPE: &str = "UNSUPPORTED_MEDIA_TYPE";
    /// 500: an internal error of the daemon.
    pub const INTERNAL: &str = "INTERNAL";
    /// 503: too many connections, event streams or request bodies at once.
    pub const OVERLOADED: &str = "OVERLOADED";
    /// 503: the daemon is stopping and did not complete the request.
    pub const STOPPING: &str = "STOPPING";
}

/// An error answer. As the error of a handler, it becomes the envelope.
#[derive(Debug, Clone)]
pub struct ServiceError {
    status: StatusCode,
    body: Box<ErrorBody>,
}

/// Return type of handlers.
pub type ServiceResult<T> = Result<T, ServiceError>;

impl ServiceError {
    /// Returns an error with a status, code and message. 429 and 503 are retriable by default.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let retriable = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        let body = ErrorBody {
            code: code.to_owned(),
            message: message.into(),
            hint: None,
            details: None,
            correlation_id: String::new(),
            retriable,
            retry_after_ms: None,
        };
        Self {
            status,
            body: Box::new(body),
        }
    }

    /// Returns an internal error. Logs the cause and withholds it from the client: it may contain paths or the content of
    /// requests.
    pub fn internal(cause: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = with_causes(cause), "internal error");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            codes::INTERNAL,
            "the daemon failed to handle this request",
        )
        .hint("look up this correlation id in its log")
    }

    /// Sets the remedy.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// Sets the values behind the message, for programs.
    #[must_use]
    pub fn details(mut self, details: serde_json::Value) -> Self {
        self.body.details = Some(details);
        self
    }

    /// Sets whether the same request may succeed later.
    #[must_use]
    pub fn retriable(mut self, retriable: bool) -> Self {
        self.body.retriable = retriable;
        self
    }

    /// Marks the error as retriable after this time. `Retry-After` gives the time in whole seconds, rounded up.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.body.retriable = true;
        self.body.retry_after_ms = Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Returns the HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Returns the content of the envelope. The correlation id is still empty.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }

    /// Converts the error into the envelope, with the correlation id of the current request.
    pub(super) fn envelope(self) -> ErrorEnvelope {
        let id = CorrelationId::current().unwrap_or_else(CorrelationId::random);
        ErrorEnvelope {
            error: ErrorBody {
                correlation_id: id.as_str().to_owned(),
                ..*self.body
            },
        }
    }
}

impl std::fmt::Display for ServiceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.body.message)
    }
}

impl std::error::Error for ServiceError {}

impl IntoResponse for ServiceError {
    fn into_response(self) -> Response {
        let status = self.status;
        let envelope = self.envelope();
        let retry_after = envelope.error.retry_after_ms.map(|ms| ms.div_ceil(1000));
        tracing::debug!(
            status = status.as_u16(),
            code = envelope.error.code,
            "refused"
        );
        let mut response = (status, axum::Json(envelope)).into_response();
        if let Some(seconds) = retry_after {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::PAYLOAD_TOO_LARGE
        ) {
            // The rest of the body may still arrive, and must not be parsed as the next request.
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

pub(super) async fn no_such_path(request: Request) -> ServiceError {
    let path = request.uri().path();
    ServiceError::new(
        StatusCode::NOT_FOUND,
        codes::NO_SUCH_PATH,
        format!("there is no path {path}"),
    )
    .hint("`GET /version` shows which daemon this is and which API version it speaks")
}

pub(super) async fn no_such_method(request: Request) -> ServiceError {
    let (method, path) = (request.method(), request.uri().path());
    ServiceError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        codes::METHOD_NOT_ALLOWED,
        format!("{path} does not support {method}"),
    )
    .hint("use a method from the `Allow` header")
}

/// Turns a handler's panic into an internal error, so that the daemon continues.
#[allow(clippy::needless_pass_by_value)] // The signature that tower-http's panic layer requires.
pub(super) fn from_panic(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    ServiceError::internal(&std::io::Error::other(format!(
        "a handler panicked: {}",
        text.unwrap_or("no message")
    )))
    .into_response()
}
