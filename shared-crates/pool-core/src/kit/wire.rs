//! Answers common to all daemons: the error envelope and the version.

use serde::{Deserialize, Serialize};

/// The envelope of every error answer: `{"error": {...}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorEnvelope {
    /// Code, message and details of the error.
    pub error: ErrorBody,
}

/// One error, as a client sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// Code in UPPER_SNAKE case, from the API's list of codes.
    pub code: String,
    /// Human-readable failure and its cause.
    pub message: String,
    /// Suggested remedy; absent if none is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Values behind the message, as JSON; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<serde_json::Value>,
    /// Identifier of the request in the daemons' logs.
    #[serde(default)]
    pub correlation_id: String,
    /// True if a retry of the same request may succeed.
    #[serde(default)]
    pub retriable: bool,
    /// Milliseconds to wait before a retry; absent if no delay is suggested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// Name and version of the answering program, and the version of its API: the answer of `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VersionInfo {
    /// Name of the program, such as `pool-managerd`.
    pub name: String,
    /// Version of the program, such as `0.1.0`.
    pub version: String,
    /// Version of the program's HTTP API.
    pub api_version: u32,
}
