//! Checks of metrics and scrape settings with Prometheus' own `promtool`.

// A panic in a helper fails the test, and each test file uses only some helpers.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::Write as _;
use std::process::{Command, Stdio};

/// Fails if `promtool` objects to metrics in the text format, including their names and help texts.
pub fn check_metrics(text: &str) {
    check(&["check", "metrics"], text);
}

/// Fails if `promtool` rejects a Prometheus configuration.
pub fn check_config(text: &str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    check(&["check", "config", file.path().to_str().unwrap()], "");
}

fn check(args: &[&str], input: &str) {
    let mut promtool = Command::new("promtool");
    promtool.args(args).stdin(Stdio::piped());
    let child = promtool
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap_or_else(|error| {
        panic!("`promtool` is needed and could not be started ({error}): see `.ci/run`")
    });
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(
        output.status.success(),
        "promtool {args:?}: {said}\n{input}"
    );
}
