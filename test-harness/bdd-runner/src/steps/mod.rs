//! Definitions of the scenarios' steps.

mod api;
mod attempts;
mod commands;
mod contexts;
mod demo;
mod durability;
mod fleet;
mod jobs;
pub mod memory;
mod orchestrator;
mod setting;
mod soak;
