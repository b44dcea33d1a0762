//! `GET /version`, the same on every daemon.

use serde::{Deserialize, Serialize};

/// Which program answers, and which API it speaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VersionInfo {
    /// The program's name.
    pub name: String,
    /// The program's version.
    pub version: String,
    /// The version of its HTTP API.
    pub api_version: u32,
}
