//! Report of a daemon that can't run.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use super::telemetry;

/// Prints an error with its causes and hint on standard error, and returns the exit code of failure.
pub fn report_failure(error: &(dyn Error + 'static), hint: Option<&str>) -> ExitCode {
    let mut text = format!("error: {error}\n");
    for cause in std::iter::successors(error.source(), |cause| (*cause).source()) {
        text += &format!("caused by: {cause}\n");
    }
    if let Some(hint) = hint {
        text += &format!("hint: {hint}\n");
    }
    // If writing fails, for example on a full disk, the exit code must suffice.
    let _ = io::stderr().write_all(text.as_bytes());
    telemetry::notify_starter(&text);
    ExitCode::FAILURE
}
