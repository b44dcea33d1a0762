//! The real binaries as a scenario or a measurement sees them: a home of its own, commands, requests and streams.

pub mod checker;
pub mod house;
pub mod memory;
pub mod process;
pub mod steps;
pub mod stream;
