//! The daemon in this process, with a fake worker program: the behaviour that users of its API and the orchestrator rely on.
//! bdd-runner covers the real worker.

#![allow(clippy::unwrap_used)]

mod cleanup;
#[path = "../../../../shared-crates/pool-core/tests/support/described.rs"]
mod described;
mod downloads;
mod drain;
#[path = "../../../../shared-crates/pool-core/tests/support/exact_numbers.rs"]
mod exact_numbers;
mod gpus;
mod heartbeat;
mod numbers;
mod openapi;
#[path = "../../../../shared-crates/pool-core/tests/support/program.rs"]
mod program;
#[path = "../../../../shared-crates/pool-core/tests/support/promtool.rs"]
mod promtool;
mod relay;
mod support;
mod workers;
