//! Routes common to all daemons: `/version`, `/health`, and `/openapi.json` for APIs that describe themselves.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde::Serialize;
use serde_json::Value;

use super::{Json, ServiceError, ServiceResult};
use crate::kit::wire::VersionInfo;

/// Returns the program's name and version, and the version of its API.
// The service routes this path itself. Daemons only add it to the description of their API.
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

/// Returns `ok` while the process can answer.
#[cfg_attr(
    feature = "openapi",
    utoipa::path(get, path = "/health", tag = "daemon", security(()), responses((status = 200, body = Health)))
)]
pub async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// The serialised description of an API. An extension of requests to [`openapi`].
#[derive(Debug, Clone)]
pub struct Document(Arc<Result<Vec<u8>, serde_json::Error>>);

impl Document {
    /// Serialises the description.
    pub fn of(description: serde_json::Result<Value>) -> Self {
        let text = description.and_then(|description| serde_json::to_vec(&description));
        Self(Arc::new(text))
    }
}

/// Returns this description of the API.
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
