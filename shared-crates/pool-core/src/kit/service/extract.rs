//! Variants of axum's extractors that answer with our error envelope instead of plain text.

use std::error::Error;
use std::time::Duration;

use axum::RequestExt as _;
use axum::body::{Bytes, HttpBody as _};
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::json;

use super::body::{BodiesFull, BodyTimeout};
use super::{ServiceError, ServiceResult, codes, strict};
use crate::kit::units::human_bytes;

/// A JSON body. `Option<Json<T>>` is `None` for a request without a body. As an answer, equivalent to `axum::Json`.
#[derive(Debug, Clone, Copy)]
pub struct Json<T>(pub T);

/// An unparsed body, within the limits on size and time.
#[derive(Debug, Clone)]
pub struct RawBody(pub Bytes);

/// Parameters of a query.
#[derive(Debug, Clone, Copy)]
pub struct Query<T>(pub T);

/// Parameters of a path.
#[derive(Debug, Clone, Copy)]
pub struct Path<T>(pub T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ServiceError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ServiceError> {
        if !is_json(request.headers()) {
            return Err(Self::undeclared());
        }
        let bytes = whole_body(request, state).await?;
        if bytes.trim_ascii_start().starts_with(b"[") {
            return Err(ServiceError::new(
                StatusCode::BAD_REQUEST,
                codes::INVALID_REQUEST,
                "the body is an array, not an object",
            )
            .hint("send one JSON object with named fields"));
        }
        let value = strict::from_slice(&bytes).map_err(|error| unreadable(&error))?;
        Ok(Self(value))
    }
}

/// Reads the body within its limits. A body that is announced as too large is not read at all, so that a client that sent
/// `Expect: 100-continue` is not asked for it.
async fn whole_body<S: Send + Sync>(request: Request, state: &S) -> ServiceResult<Bytes> {
    let announced = request.body().size_hint().lower();
    let request = request.with_limited_body();
    match request.body().size_hint().upper() {
        Some(limit) if announced > limit => Err(ServiceError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            codes::TOO_LARGE,
            format!(
                "the body of {} is larger than this daemon accepts: at most {}",
                human_bytes(announced),
                human_bytes(limit)
            ),
        )),
        _ => Ok(Bytes::from_request(request, state)
            .await
            .map_err(JsonRejection::from)?),
    }
}

impl<T> Json<T> {
    fn undeclared() -> ServiceError {
        ServiceError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            codes::UNSUPPORTED_MEDIA_TYPE,
            "the body is not declared as JSON",
        )
        .hint("send the header `Content-Type: application/json`")
    }
}

/// Returns whether the content type is `application/json` or another JSON type, such as `application/problem+json`.
fn is_json(headers: &HeaderMap) -> bool {
    let declared = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let kind = declared.split(';').next().unwrap_or_default().trim();
    kind.to_ascii_lowercase()
        .strip_prefix("application/")
        .is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}

fn unreadable(error: &serde_path_to_error::Error<serde_json::Error>) -> ServiceError {
    let (code, what) = match error.inner().classify() {
        Category::Data => (codes::INVALID_REQUEST, "invalid body"),
        _ => (codes::BAD_JSON, "the body is not JSON"),
    };
    let refusal = ServiceError::new(StatusCode::BAD_REQUEST, code, format!("{what}: {error}"));
    match error.path().iter().next() {
        Some(_) if code == codes::INVALID_REQUEST => {
            refusal.details(json!({"field": error.path().to_string()}))
        }
        _ => refusal,
    }
}

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ServiceError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ServiceError> {
        whole_body(request, state).await.map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> OptionalFromRequest<S> for Json<T> {
    type Rejection = ServiceError;

    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, ServiceError> {
        let headers = request.headers();
        let no_length = headers
            .get(header::CONTENT_LENGTH)
            .is_none_or(|length| length == "0");
        if no_length && !headers.contains_key(header::TRANSFER_ENCODING) {
            return Ok(None);
        }
        <Self as FromRequest<S>>::from_request(request, state)
            .await
            .map(Some)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ServiceError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ServiceError> {
        let axum::extract::Query(value) =
            axum::extract::Query::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ServiceError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ServiceError> {
        let axum::extract::Path(value) =
            <axum::extract::Path<T> as FromRequestParts<S>>::from_request_parts(parts, state)
                .await?;
        Ok(Self(value))
    }
}

impl From<JsonRejection> for ServiceError {
    fn from(rejection: JsonRejection) -> Self {
        let status = rejection.status();
        if let Some(late) = BodyTimeout::among(&rejection) {
            return Self::new(
                StatusCode::REQUEST_TIMEOUT,
                codes::REQUEST_TIMEOUT,
                late.to_string(),
            )
            .retriable(true)
            .hint("send the whole body at once");
        }
        if BodiesFull::is_among(&rejection) {
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                codes::OVERLOADED,
                BodiesFull.to_string(),
            )
            .retry_after(Duration::from_secs(1));
        }
        if status == StatusCode::PAYLOAD_TOO_LARGE {
            return Self::new(
                status,
                codes::TOO_LARGE,
                "the body is larger than this daemon accepts",
            );
        }
        Self::new(
            StatusCode::BAD_REQUEST,
            codes::INVALID_REQUEST,
            format!("the body could not be read: {}", cause(&rejection)),
        )
    }
}

impl From<QueryRejection> for ServiceError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            codes::INVALID_REQUEST,
            format!("invalid query: {}", cause(&rejection)),
        )
        .hint("use each parameter once, by its documented name and within its range")
    }
}

impl From<PathRejection> for ServiceError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            codes::INVALID_REQUEST,
            format!("invalid path: {}", cause(&rejection)),
        )
        .hint("write ids exactly as the API returned them")
    }
}

/// Returns the cause of a rejection, without axum's own preamble. The first cause below axum's layers names the field
/// (`serde_path_to_error`); the next one would not.
fn cause(rejection: &(dyn Error + 'static)) -> String {
    rejection.source().unwrap_or(rejection).to_string()
}
