//! axum's extractors with our error envelope instead of plain text.

use std::error::Error;

use axum::body::Bytes;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::body::BodyTimeout;
use super::{ServiceError, codes};

/// A JSON body; as an answer the same as `axum::Json`. `Option<Json<T>>` is `None` for a request without a body.
#[derive(Debug, Clone, Copy)]
pub struct Json<T>(pub T);

/// A body as it came, within the limits on its size and time.
#[derive(Debug, Clone)]
pub struct RawBody(pub Bytes);

/// The parameters of a query.
#[derive(Debug, Clone, Copy)]
pub struct Query<T>(pub T);

/// The parameters of a path.
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
        let (parts, body) = request.into_parts();
        let whole = Request::from_parts(parts.clone(), body);
        let bytes = Bytes::from_request(whole, state)
            .await
            .map_err(JsonRejection::from)?;
        // serde would take an array for a structure and assign its values by position.
        if bytes.trim_ascii_start().starts_with(b"[") {
            return Err(ServiceError::new(
                StatusCode::BAD_REQUEST,
                codes::INVALID_REQUEST,
                "the body is an array, not an object",
            )
            .hint("send one JSON object with named fields"));
        }
        let whole = Request::from_parts(parts, bytes.into());
        let axum::Json(value) =
            <axum::Json<T> as FromRequest<S>>::from_request(whole, state).await?;
        Ok(Self(value))
    }
}

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ServiceError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ServiceError> {
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(JsonRejection::from)?;
        Ok(Self(bytes))
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
        match &rejection {
            // The innermost cause names the field and the place; what wraps it says only that JSON failed.
            JsonRejection::JsonDataError(error) => Self::new(
                StatusCode::BAD_REQUEST,
                codes::INVALID_REQUEST,
                format!("the body does not fit: {}", cause(error)),
            ),
            JsonRejection::JsonSyntaxError(error) => Self::new(
                StatusCode::BAD_REQUEST,
                codes::BAD_JSON,
                format!("the body is not JSON: {}", cause(error)),
            ),
            JsonRejection::MissingJsonContentType(_) => Self::new(
                status,
                codes::UNSUPPORTED_MEDIA_TYPE,
                "the body is not declared as JSON",
            )
            .hint("send the header `Content-Type: application/json`"),
            _ if status == StatusCode::PAYLOAD_TOO_LARGE => Self::new(
                status,
                codes::TOO_LARGE,
                "the body is larger than this daemon takes",
            ),
            _ => Self::new(
                StatusCode::BAD_REQUEST,
                codes::INVALID_REQUEST,
                format!("the body could not be read: {}", cause(&rejection)),
            ),
        }
    }
}

impl From<QueryRejection> for ServiceError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            codes::INVALID_REQUEST,
            format!("the query does not fit: {}", cause(&rejection)),
        )
        .hint("use each parameter once, by its documented name and within its range")
    }
}

impl From<PathRejection> for ServiceError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            codes::INVALID_REQUEST,
            format!("the path does not fit: {}", cause(&rejection)),
        )
        .hint("write ids as they were answered")
    }
}

/// What axum's rejection says about its cause, without axum's own preamble. The first cause below axum's layers
/// carries the field (`serde_path_to_error`), the next one would not.
fn cause(rejection: &(dyn Error + 'static)) -> String {
    rejection.source().unwrap_or(rejection).to_string()
}
