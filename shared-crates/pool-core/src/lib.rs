//! Domain types of a pool host: model references, the catalogue, workers and their registry, and the wire types that
//! `pool-managerd`, `llorch-pool`, the worker and the orchestrator exchange.
//!
//! [`kit`] holds the code that several binaries merely share, and uses nothing else of this crate. Parts of the crate are behind
//! features that are off by default: `chat-template` (the dialect of chat templates), `cli` (the worker's argument list),
//! `client` (a client of our HTTP APIs), `openapi` (schemas of the wire types and settings), `service` (the HTTP service of
//! the daemons) and `terminal` (the base of both command-line programs).

pub mod api;
pub mod catalog;
#[cfg(feature = "chat-template")]
pub mod chat_template;
pub mod config;
pub mod gpu;
pub mod gpu_sources;
pub mod kit;
pub mod lifecycle;
#[cfg(any(target_os = "macos", test))]
mod macos;
pub mod model_ref;
#[cfg(feature = "nvml")]
mod nvml;
#[cfg(feature = "openapi")]
mod openapi;
pub mod registry;
pub mod worker;
pub mod worker_args;

pub use model_ref::ModelRef;

/// Version of the orchestrator's HTTP API in this build, as `/version` reports it.
pub const ORCHESTRATOR_API_VERSION: u32 = 2;
/// Version of the pool manager's HTTP API in this build.
pub const POOL_API_VERSION: u32 = 1;
/// Version of the worker's HTTP API in this build.
pub const WORKER_API_VERSION: u32 = 1;
