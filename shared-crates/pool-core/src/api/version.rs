//! The answer of `GET /version`, common to all daemons.

use serde::{Deserialize, Serialize};

/// Name and version of the answering program, and the version of its API.
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
