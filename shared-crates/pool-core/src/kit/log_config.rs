//! The `[log]` section of a daemon's settings.

use serde::{Deserialize, Serialize};

/// The `[log]` section of either daemon. SIGHUP applies changes to this section; all others require a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Logged events, such as `info,orchestratord=debug`; the variable `LLORCH_LOG` overrides it. Default `info`.
    pub filter: String,
    /// Size in bytes at which the log file (`--log-file`) is rotated, at least 4096; 0 for never. Default 67108864 (64 MiB).
    pub max_bytes: u64,
    /// Number of earlier log files to keep, 0 to 100: `NAME.log.1` is the newest. Default 5.
    pub keep: u32,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            max_bytes: 64 << 20,
            keep: 5,
        }
    }
}

impl LogConfig {
    /// Returns the key of an invalid value and the reason, or `None` if all values are valid.
    pub fn fault(&self) -> Option<(&'static str, &'static str)> {
        match self {
            Self {
                max_bytes: 1..4096, ..
            } => Some(("log.max_bytes", "must be 4096 or more, or 0 for no limit")),
            Self { keep: 101.., .. } => Some(("log.keep", "must be 0 to 100")),
            _ => None,
        }
    }
}
