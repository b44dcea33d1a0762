//! Pools as the orchestrator's API shows them.

use jiff::Timestamp;
use pool_core::api::pool::PoolStatus;
use serde::{Deserialize, Serialize};

use crate::pool::PoolLiveness;

/// A pool in `GET /v2/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolView {
    /// Unique name.
    pub id: String,
    /// Address at which the orchestrator reaches the pool.
    pub url: String,
    /// State of the pool in one word.
    pub state: PoolViewState,
    /// Liveness of the pool: `online`, `suspect` or `offline`. An awaited pool is `suspect`, a stopped one `offline`.
    pub liveness: PoolLiveness,
    /// Time of registration.
    pub registered_at: Timestamp,
    /// Milliseconds since the pool's latest heartbeat. For an awaited pool: since its registration or, after a restart of the
    /// orchestrator, since the restart.
    pub heartbeat_age_ms: u64,
    /// Latest report of the pool; `None` before its first heartbeat.
    pub status: Option<PoolStatus>,
    /// Another instance that claims the same pool id; present as long as it keeps trying to register.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<PoolConflict>,
}

/// State of a pool in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum PoolViewState {
    /// Heartbeats arrive, and the pool takes work.
    Online,
    /// Heartbeats arrive. The pool takes no new work but is still finishing some.
    Draining,
    /// Heartbeats arrive. The pool takes no new work and runs none.
    Drained,
    /// One heartbeat is missing.
    Suspect,
    /// Three heartbeats are missing.
    Offline,
    /// The pool is registered, but no heartbeat has arrived yet, or none since the orchestrator restarted.
    Awaited,
    /// The pool stopped on purpose. Its workers may still run.
    Stopped,
}

impl PoolViewState {
    /// Returns the name used on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Suspect => "suspect",
            Self::Offline => "offline",
            Self::Awaited => "awaited",
            Self::Stopped => "stopped",
        }
    }
}

/// An instance whose registration is refused, because another live instance holds its pool id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolConflict {
    /// Address of the refused instance.
    pub url: String,
    /// Id of the refused instance.
    pub instance_id: String,
    /// Milliseconds since the instance's latest attempt to register.
    pub age_ms: u64,
}

/// Answer of `GET /v2/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolList {
    /// All registered pools, by name.
    pub pools: Vec<PoolView>,
}

/// Answer of `POST /v2/pools/register`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Registered {
    /// Name of the registered pool.
    pub pool_id: String,
}

/// Empty answer of `POST /v2/pools/{id}/heartbeat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HeartbeatAccepted {}
