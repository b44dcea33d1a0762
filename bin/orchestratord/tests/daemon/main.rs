//! The daemon in-process, over real HTTP, with a fake pool and fake workers that speak the real contract.

// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used)]

mod attempts;
mod backup;
mod clocks;
mod context;
mod crash;
mod crash_points;
#[path = "../../../../shared-crates/pool-core/tests/support/described.rs"]
mod described;
mod disk;
mod event_source;
mod events;
#[path = "../../../../shared-crates/pool-core/tests/support/exact_numbers.rs"]
mod exact_numbers;
mod hangup;
mod limits;
mod metrics;
mod numbers;
mod openapi;
mod pools;
mod process;
#[path = "../../../../shared-crates/pool-core/tests/support/promtool.rs"]
mod promtool;
mod receipts;
mod restart;
mod retention;
mod scheduling;
mod schema;
mod scripts;
mod service;
mod silence;
mod small_disk;
mod standing;
mod submit;
mod support;
mod take_over;
