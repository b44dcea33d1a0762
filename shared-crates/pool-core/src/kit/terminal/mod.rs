//! The base of both command-line programs: arguments, exit codes, errors with hints, tables and JSON, progress, and
//! starting and stopping a daemon. Results go to standard output, everything else to standard error.

pub mod daemon;
pub mod daemon_commands;
pub mod doctor;
mod elsewhere;
mod exit;
pub mod interrupt;
mod output;
pub mod progress;
pub mod sanitize;
mod settings_table;
mod wording;

pub use exit::{CliError, Exit, parse, run_cli};
pub use output::{
    Format, age, note, paint, print_json, print_table, render_table, say, shorten, shorten_start,
    width, write,
};
pub use settings_table::print_settings;
pub use wording::in_commands;

pub use crate::kit::units::{
    human_bytes, human_count, human_duration, human_ms, parse_bytes, parse_duration, parse_ms,
};
