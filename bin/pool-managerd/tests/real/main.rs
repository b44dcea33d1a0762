//! The daemon as a process, so that it can be killed. Where it says so, with the real worker and the real model; else
//! with the fake worker of the other tests.

#![allow(clippy::unwrap_used)]

mod crash;
mod ends;
mod house;
mod restarts;
mod strangers;
