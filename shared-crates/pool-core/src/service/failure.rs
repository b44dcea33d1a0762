//! How a daemon that can't run says so.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use super::telemetry;

/// Prints on standard error what is wrong, why, and what to try; returns the exit code that goes with it.
pub fn report_failure(error: &(dyn Error + 'static), hint: Option<&str>) -> ExitCode {
    let mut text = format!("error: {error}\n");
    for cause in std::iter::successors(error.source(), |cause| (*cause).source()) {
        text += &format!("caused by: {cause}\n");
    }
    if let Some(hint) = hint {
        text += &format!("hint: {hint}\n");
    }
    // Where it can't be written, as on a disk that is full, the exit code has to do.
    let _ = io::stderr().write_all(text.as_bytes());
    telemetry::notify_starter(&text);
    ExitCode::FAILURE
}
