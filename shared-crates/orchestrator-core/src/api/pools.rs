//! The fleet as the orchestrator shows it.

use jiff::Timestamp;
use pool_core::api::pool::PoolStatus;
use serde::{Deserialize, Serialize};

use crate::pool::PoolLiveness;

/// A pool as `GET /v2/pools` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolView {
    /// Name.
    pub id: String,
    /// Where the orchestrator reaches it.
    pub url: String,
    /// Whether it is heard from.
    pub liveness: PoolLiveness,
    /// When it registered.
    pub registered_at: Timestamp,
    /// Milliseconds since its latest heartbeat.
    pub heartbeat_age_ms: u64,
    /// What it said last; `None` before its first heartbeat.
    pub status: Option<PoolStatus>,
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
    /// The pool.
    pub pool_id: String,
}

/// Answer of `POST /v2/pools/{id}/heartbeat`: it was taken in. There is nothing to say yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HeartbeatAccepted {}
