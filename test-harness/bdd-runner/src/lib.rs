//! Access to the real binaries for scenarios and measurements: a home of their own, commands, requests and streams.

pub mod chain;
pub mod checker;
pub mod clients;
pub mod determinism;
pub mod house;
pub mod leftovers;
pub mod memory;
pub mod process;
pub mod selection;
pub mod soak;
pub mod steps;
pub mod stream;

#[path = "../../../bin/llorch-candled/tests/support/tiny_model.rs"]
#[allow(dead_code)]
mod tiny_model;
