//! Kernels of our own: quantised weights repacked at load, several threads, the same bits on every processor.
//!
//! Products of whole blocks are exact integers, and everything that is rounded is rounded in one fixed order, so a row's
//! result depends on the model and the row's sequence alone: not on the instructions of the processor, the number of threads, or
//! what else is in the batch.

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
#[allow(unsafe_code)]
pub mod product;
pub mod quantize;
#[allow(unsafe_code)]
mod shared;
#[allow(unsafe_code)]
pub mod team;
#[cfg(test)]
mod testing;

pub use load::Load;

/// Names the arithmetic of this backend. A change that changes a bit of a result changes the number: an answer is continued only
/// by the arithmetic that began it.
pub const ARITHMETIC: &str = "cpu 2";
