//! The daemon as a process, so that it can be killed. Tests use the real worker with the real model if they say so, otherwise
//! the fake worker of the other tests.

#![allow(clippy::unwrap_used)]

mod crash;
mod ends;
mod house;
mod limits;
#[path = "../../../../shared-crates/pool-core/tests/support/program.rs"]
mod program;
mod restarts;
mod strangers;
