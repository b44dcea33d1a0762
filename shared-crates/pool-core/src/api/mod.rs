//! Wire types: the error envelope of every daemon, the pool manager's API, and the worker's.

pub mod error;
pub mod models;
pub mod pool;
pub mod receipt;
pub mod version;
pub mod worker;
