//! How a daemon that can't run says so.

use std::error::Error;
use std::process::ExitCode;

/// Prints on standard error what is wrong, why, and what to try; returns the exit code that goes with it.
pub fn report_failure(error: &(dyn Error + 'static), hint: Option<&str>) -> ExitCode {
    eprintln!("error: {error}");
    for cause in std::iter::successors(error.source(), |cause| (*cause).source()) {
        eprintln!("caused by: {cause}");
    }
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::FAILURE
}
