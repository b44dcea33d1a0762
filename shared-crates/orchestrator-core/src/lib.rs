//! Core of the orchestrator: jobs and their states, queue order, scheduling decisions and the wire types of the API.
//!
//! This crate contains types, pure decisions and validation. `orchestratord` adds HTTP, SQLite and background work; `llorch`
//! adds a command line.

pub mod adopt;
pub mod api;
#[cfg(feature = "script")]
pub mod check;
pub mod config;
#[cfg(feature = "script")]
pub mod decide;
pub mod job;
pub mod pool;
pub mod queue;
pub mod sampling;
pub mod scheduler;
#[cfg(feature = "script")]
pub mod script;
#[cfg(feature = "script")]
pub mod simulate;
pub mod trace;

pub use api::tasks::TaskSubmitRequest;
pub use job::{Job, JobId, JobStatus};
pub use queue::JobQueue;
