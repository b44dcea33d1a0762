//! Routes that daemons have in common: `/version`, `/health`, and `/openapi.json` of what describes itself.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde::Serialize;
use serde_json::Value;

use super::{Json, ServiceError, ServiceResult};
use crate::api::version::VersionInfo;

/// Which program answers, and which API it speaks.
///
/// The service that all daemons share answers it, so a daemon describes it and does not route it.
#[cfg_attr(
    feature = "openapi",
    utoipa::path(get, path = "/version", tag = "daemon", responses((status = 200, body = VersionInfo)))
)]
pub async fn version(State(version): State<VersionInfo>) -> Json<VersionInfo> {
    Json(version)
}

/// Answer of `/health` and `/ready`.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    /// `ok` or `ready`.
    pub status: &'static str,
}

/// The process answers.
#[cfg_attr(
    feature = "openapi",
    utoipa::path(get, path = "/health", tag = "daemon", security(()), responses((status = 200, body = Health)))
)]
pub async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// A description of an API as it is sent; an extension that [`openapi`] looks for.
#[derive(Debug, Clone)]
pub struct Document(Arc<Result<Vec<u8>, serde_json::Error>>);

impl Document {
    /// The description, written as text.
    pub fn of(description: serde_json::Result<Value>) -> Self {
        let text = description.and_then(|description| serde_json::to_vec(&description));
        Self(Arc::new(text))
    }
}

/// This description.
#[cfg_attr(
    feature = "openapi",
    utoipa::path(get, path = "/openapi.json", tag = "daemon", responses((status = 200, description = "An OpenAPI 3.1 document.")))
)]
pub async fn openapi(
    Extension(document): Extension<Document>,
) -> ServiceResult<impl IntoResponse + use<>> {
    match document.0.as_ref() {
        Ok(json) => Ok((
            [(CONTENT_TYPE, HeaderValue::from_static("application/json"))],
            json.clone(),
        )),
        Err(cause) => Err(ServiceError::internal(cause)),
    }
}
