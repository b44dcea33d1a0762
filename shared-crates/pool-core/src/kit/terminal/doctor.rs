//! Findings of the doctor commands, and their output.

pub mod host;

use serde::Serialize;

use super::paint::{self, Cell, Style};
use super::{CliError, Exit, Format, print_json, render_table, say};

/// Outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// No problem.
    Ok,
    /// Usable, with a disadvantage.
    Warn,
    /// Something required is missing.
    Fail,
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check.
    pub check: &'static str,
    /// Outcome of the check.
    pub status: CheckStatus,
    /// The observed state, in words.
    pub message: String,
    /// The command that fixes the problem, or advice in words; `None` without a problem.
    pub fix: Option<String>,
}

impl Finding {
    /// Returns a finding without a problem.
    pub fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            status: CheckStatus::Ok,
            message: message.into(),
            fix: None,
        }
    }

    /// Returns a finding of a tolerable problem.
    pub fn warn(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            status: CheckStatus::Warn,
            message: message.into(),
            fix: Some(fix.into()),
        }
    }

    /// Returns a finding that something required is missing.
    pub fn fail(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            status: CheckStatus::Fail,
            ..Self::warn(check, message, fix)
        }
    }
}

/// Prints findings. Returns the exit code of the command: 1 if something required is missing.
pub fn report(findings: &[Finding], format: Format) -> Result<Exit, CliError> {
    match format {
        Format::Json => print_json(findings)?,
        Format::Table => say(render(findings, paint::on_stdout()))?,
    }
    let failed = findings
        .iter()
        .any(|finding| finding.status == CheckStatus::Fail);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn render(findings: &[Finding], colour: bool) -> String {
    let rows = findings.iter().map(|finding| {
        let status = match finding.status {
            CheckStatus::Ok => Cell::new("ok", Style::Good),
            CheckStatus::Warn => Cell::new("warn", Style::Warn),
            CheckStatus::Fail => Cell::new("fail", Style::Bad),
        };
        let fix = finding.fix.clone().unwrap_or_default();
        vec![
            finding.check.into(),
            status,
            finding.message.clone().into(),
            fix.into(),
        ]
    });
    render_table(&["CHECK", "STATUS", "FINDING", "FIX"], rows, colour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-150]
    fn each_finding_has_a_line_with_its_cure() {
        let findings = [
            Finding::ok("disk", "98.0 GB free"),
            Finding::fail("port", "taken", "take another"),
        ];
        insta::assert_snapshot!(render(&findings, false), @r"
        CHECK  STATUS  FINDING       FIX
        disk   ok      98.0 GB free
        port   fail    taken         take another
        ");
    }
}
