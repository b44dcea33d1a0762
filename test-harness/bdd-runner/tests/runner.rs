//! Tests of `bdd-runner` as a program: its help, its selection of scenarios, and the state after its end.

#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use bdd_runner::process::left_running;
use pool_core::kit::process::{ProcessIdentity, Signal};

/// Time limit of every wait; only a failing test reaches it.
const LIMIT: Duration = Duration::from_secs(180);

fn runner(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bdd-runner"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = runner(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test] // [BDD-902]
fn help_says_what_there_is() {
    let (code, help, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    // Line breaks depend on the text and on the terminal.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "Usage: bdd-runner",
        "soak",
        "--name <REGEX>",
        "--tags <EXPR>",
        "--list",
        "Examples:",
        "@soak",
        "LLORCH_TEST_MODEL",
        "Exit codes:",
        "N passed, N failed",
    ] {
        assert!(help.contains(part), "`{part}` is missing: {help}");
    }
    // Cucumber's own help describes none of this.
    for part in ["cucumber", "Cucumber", "watch-leftovers"] {
        assert!(!help.contains(part), "{help}");
    }
    let (code, help, _) = run(&["soak", "--help"]);
    assert_eq!(code, Some(0));
    assert!(
        help.contains("--kills") && help.contains("--seed"),
        "{help}"
    );
    assert_eq!(run(&["--no-such"]).0, Some(2));
    assert_eq!(run(&["--name", "("]).0, Some(2));
    assert_eq!(run(&["--tags", "@a and"]).0, Some(2));
}

fn listed(args: &[&str]) -> Vec<String> {
    let (code, out, err) = run(&[args, &["--list"]].concat());
    assert_eq!(code, Some(0), "{args:?}: {err}");
    out.lines().map(str::to_owned).collect()
}

#[test] // [BDD-903]
fn long_scenarios_run_only_where_their_tag_is_asked_for() {
    let all = listed(&[]);
    let long = listed(&["--tags", "@soak"]);
    assert!(all.len() > 20 && long.len() > 1, "{all:?} {long:?}");
    // Neither a broad name nor the absence of another tag selects a long scenario.
    assert_eq!(listed(&["--name", "."]), all);
    assert_eq!(listed(&["--tags", "not @soak"]), all);
    let name = "Kills over the whole chain";
    let kills = |lines: &[String]| lines.iter().filter(|line| line.contains(name)).count();
    assert_eq!((kills(&all), kills(&long)), (1, 1));
    assert_eq!(listed(&["--name", name]).len(), 1);
    // Name and tags together narrow the selection.
    assert_eq!(listed(&["--name", name, "--tags", "@soak"]).len(), 1);
    assert_eq!(
        listed(&["--name", name, "--tags", "@soak or not @soak"]).len(),
        2
    );
}

#[test] // [BDD-901]
fn a_filter_that_matches_nothing_fails() {
    for (args, reason) in [
        (["--name", "no such scenario"], "no such scenario"),
        (["--tags", "@sok"], "no scenario has the tag `@sok`"),
        (["--tags", "@soak and not @soak"], "no scenario"),
    ] {
        let (code, out, err) = run(&args);
        assert_eq!((code, out.as_str()), (Some(1), "0 passed, 0 failed\n"));
        assert!(err.contains(reason), "{err}");
    }
}

/// A run whose homes are in a folder of this test.
struct Started {
    child: std::process::Child,
    folder: tempfile::TempDir,
}

impl Started {
    fn new(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = runner(args);
        command
            .env("TMPDIR", folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().unwrap();
        Self { child, folder }
    }

    /// Returns the processes of the run, which all have its folder in their environment.
    fn processes(&self) -> Vec<(u32, String)> {
        let mut processes = left_running(self.folder.path());
        processes.retain(|(_, name)| name != "bdd-runner");
        processes
    }

    /// Waits until a daemon runs.
    fn until_busy(&mut self) {
        let daemons = ["orchestratord", "pool-managerd"];
        until("a daemon runs", || {
            assert_eq!(self.child.try_wait().unwrap(), None, "it ended by itself");
            let processes = self.processes();
            processes
                .iter()
                .any(|(_, name)| daemons.contains(&name.as_str()))
        });
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        let identity = ProcessIdentity::of(self.child.id()).unwrap().unwrap();
        identity.signal(signal).unwrap();
        until("the runner ends", || {
            self.child.try_wait().unwrap().is_some()
        });
        self.child.wait().unwrap()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < LIMIT, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

/// Scenarios with daemons that need no model, and the long run.
const RUNS: [&[&str]; 2] = [
    &[
        "--name",
        "^An orchestrator continues from a copy|^Daemons start once",
    ],
    &[
        "soak",
        "--kills",
        "100000",
        "--seed",
        "1",
        "--pools",
        "1",
        "--clients",
        "1",
    ],
];

#[test] // [BDD-904]
fn a_run_that_is_told_to_stop_leaves_nothing() {
    for run in RUNS {
        for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
            let mut started = Started::new(run);
            started.until_busy();
            let status = started.end(signal);
            assert_eq!(status.code(), Some(code), "{run:?}");
            // At once: after its end, no process may remain.
            assert_eq!(started.processes(), [], "{run:?} {code}");
            assert!(is_empty(started.folder.path()), "{run:?} {code}");
        }
    }
}

#[test] // [BDD-904]
fn a_run_that_is_killed_leaves_nothing() {
    for run in RUNS {
        let mut started = Started::new(run);
        started.until_busy();
        let status = started.end(Signal::KILL);
        assert_eq!(status.signal(), Some(9));
        until("nothing is left", || is_empty(started.folder.path()));
        assert_eq!(started.processes(), []);
    }
}
