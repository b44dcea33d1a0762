//! The daemon as a process, so that it can be killed. Where it says so, with the real worker and the real model; else
//! with the fake worker of the other tests.

#![allow(clippy::unwrap_used)]

mod crash;
mod ends;
mod house;
mod limits;
#[path = "../../../../shared-crates/pool-core/tests/support/program.rs"]
mod program;
mod restarts;
mod strangers;
