//! What went wrong with a request, in the one form that every daemon answers.

use std::any::Any;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::{CONNECTION, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::CorrelationId;
use crate::api::error::{ErrorBody, ErrorEnvelope};
use crate::errors::with_causes;

/// The codes of errors that any daemon can give.
pub mod codes {
    /// 400: the request or its body can't be understood.
    pub const INVALID_REQUEST: &str = "INVALID_REQUEST";
    /// 400: the body is not JSON.
    pub const BAD_JSON: &str = "BAD_JSON";
    /// 401: no token, or a wrong one.
    pub const UNAUTHORIZED: &str = "UNAUTHORIZED";
    /// 403: the `Host` header names no name of this server.
    pub const UNKNOWN_HOST: &str = "UNKNOWN_HOST";
    /// 403: a browser sends this for a page of another origin.
    pub const FOREIGN_ORIGIN: &str = "FOREIGN_ORIGIN";
    /// 404: there is no such path.
    pub const NO_SUCH_PATH: &str = "NO_SUCH_PATH";
    /// 405: the path exists, the method does not.
    pub const METHOD_NOT_ALLOWED: &str = "METHOD_NOT_ALLOWED";
    /// 408: the body did not arrive in time.
    pub const REQUEST_TIMEOUT: &str = "REQUEST_TIMEOUT";
    /// 413: the body is larger than the daemon takes.
    pub const TOO_LARGE: &str = "TOO_LARGE";
    /// 415: the body is not declared as JSON.
    pub const UNSUPPORTED_MEDIA_TYPE: &str = "UNSUPPORTED_MEDIA_TYPE";
    /// 500: a fault of the daemon.
    pub const INTERNAL: &str = "INTERNAL";
    /// 503: too many connections.
    pub const OVERLOADED: &str = "OVERLOADED";
    /// 503: the daemon stops before what was asked for is done.
    pub const STOPPING: &str = "STOPPING";
}

/// An error on its way to the client. `?` in a handler turns it into the envelope.
#[derive(Debug, Clone)]
pub struct ServiceError {
    status: StatusCode,
    body: Box<ErrorBody>,
}

/// What a handler returns.
pub type ServiceResult<T> = Result<T, ServiceError>;

impl ServiceError {
    /// An error with its status, its code and what went wrong. 429 and 503 are retriable from the start.
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

    /// A fault of ours. The cause goes to the log, not to the client: it may name paths or hold what somebody wrote.
    pub fn internal(cause: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = with_causes(cause), "internal error");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            codes::INTERNAL,
            "the daemon failed to handle this request",
        )
        .hint("its log has the cause beside this correlation id")
    }

    /// Says what to try.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// Adds the numbers behind the message.
    #[must_use]
    pub fn details(mut self, details: serde_json::Value) -> Self {
        self.body.details = Some(details);
        self
    }

    /// Says whether the same request may succeed later.
    #[must_use]
    pub fn retriable(mut self, retriable: bool) -> Self {
        self.body.retriable = retriable;
        self
    }

    /// Says when to try again; sets `Retry-After`, in whole seconds rounded up.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.body.retriable = true;
        self.body.retry_after_ms = Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The error as the envelope will hold it.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }

    /// The envelope, with the correlation id of the request being answered.
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
            // The rest of the body may still be on its way, and is no next request.
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
    .hint("`GET /version` tells which daemon this is and which API it speaks")
}

pub(super) async fn no_such_method(request: Request) -> ServiceError {
    let (method, path) = (request.method(), request.uri().path());
    ServiceError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        codes::METHOD_NOT_ALLOWED,
        format!("{path} does not take {method}"),
    )
    .hint("the `Allow` header lists what it takes")
}

/// A handler that panicked is a fault of ours like any other; the daemon goes on.
#[allow(clippy::needless_pass_by_value)] // The shape that tower-http's panic layer asks for.
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
