//! Our own kernels: quantised weights repacked at load, several threads, and identical bits on every processor.
//!
//! Products of whole blocks are exact integers, and all rounding happens in one fixed order. So a row's result depends only on
//! the model and on the row's sequence: not on the instructions of the processor, the number of threads, or the other rows in
//! the batch.

pub mod attention;
pub mod cache;
pub mod elementwise;
pub mod exp;
pub mod format;
pub mod host;
#[allow(unsafe_code)]
pub mod lanes;
mod load;
#[allow(unsafe_code)]
mod model;
pub mod pack;
mod pages;
pub mod product;
pub mod quantize;
#[allow(unsafe_code)]
mod shared;
#[allow(unsafe_code)]
pub mod team;
#[cfg(test)]
mod testing;

pub use load::Load;

/// Name of this backend's arithmetic. A change to any bit of a result must change the number: only the arithmetic that began an
/// answer may continue it.
pub const ARITHMETIC: &str = "cpu 2";
