//! Code that daemons and command-line programs share, without knowledge of pools, models or workers. Nothing here uses the rest
//! of the crate.

pub mod address;
pub mod backoff;
pub mod cgroup;
#[cfg(feature = "client")]
pub mod client;
pub mod clock;
pub mod crash;
pub mod errors;
pub mod files;
pub mod hex;
pub mod home;
pub mod host_id;
pub mod host_memory;
pub mod json_number;
pub mod log_config;
#[cfg(any(target_os = "macos", test))]
pub mod macos;
#[cfg(feature = "openapi")]
pub mod openapi;
pub mod process;
pub mod programs;
pub mod run_files;
pub mod secret;
#[cfg(feature = "service")]
pub mod service;
pub mod settings;
pub mod sse;
#[cfg(feature = "terminal")]
pub mod terminal;
pub mod units;
pub mod wire;
