//! Wire types of the orchestrator's API.

pub mod error;
pub mod events;
pub mod models;
pub mod pools;
pub mod scheduler;
pub mod tasks;
