//! Wire types of the pool manager's API and the worker's.

pub mod gpu;
pub mod models;
pub mod pool;
pub mod receipt;
pub mod sampling;
pub mod worker;
