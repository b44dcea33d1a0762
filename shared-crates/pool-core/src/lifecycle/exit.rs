//! Why a worker ended, told from what is known of its process.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use jiff::Timestamp;

use super::SpawnError;
use crate::worker::{ExitReason, WorkerExit};
use crate::worker_args::{EXIT_MODEL_INVALID, EXIT_PORT_TAKEN};

/// How a worker begins the line that says why it gives up.
const ERROR_PREFIX: &str = "error: ";

/// What is known of the end of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitFacts {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it.
    Signalled(i32),
    /// It has ended; it was not our child, so nobody can say how.
    Unknown,
    /// We killed it because it was not ready after this long.
    StartTimeout(Duration),
    /// It never came to be, for this reason.
    NotStarted(String),
}

impl ExitFacts {
    /// What the system says of a child.
    pub fn of(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, Some(signal)) => Self::Signalled(signal),
            (None, None) => Self::Unknown,
        }
    }

    pub(super) fn not_started(error: &SpawnError) -> Self {
        let cause = std::error::Error::source(error)
            .map(|cause| format!(": {cause}"))
            .unwrap_or_default();
        Self::NotStarted(format!("{error}{cause}"))
    }
}

/// The account of a worker's end. A worker that was told to stop has stopped, however its process ended; otherwise
/// the last line of its log that begins with `error: ` explains an end that the system can't.
pub fn classify_exit(
    facts: ExitFacts,
    stop_requested: bool,
    was_ready: bool,
    log_tail: Vec<String>,
    at: Timestamp,
) -> WorkerExit {
    let own_words = || {
        log_tail
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix(ERROR_PREFIX))
            .map(str::to_owned)
    };
    let (reason, message) = match facts {
        _ if stop_requested => (ExitReason::Stopped, "it was told to stop".to_owned()),
        ExitFacts::NotStarted(why) => (ExitReason::SpawnFailed, why),
        ExitFacts::StartTimeout(after) => (
            ExitReason::StartTimeout,
            format!(
                "it was not ready after {} s and was killed",
                after.as_secs()
            ),
        ),
        ExitFacts::Exited(EXIT_MODEL_INVALID) => (
            ExitReason::ModelInvalid,
            own_words().unwrap_or_else(|| "it refused its model file".to_owned()),
        ),
        ExitFacts::Exited(EXIT_PORT_TAKEN) => (
            ExitReason::Exited(Some(EXIT_PORT_TAKEN)),
            own_words()
                .unwrap_or_else(|| "its port was taken, and there was no other to try".to_owned()),
        ),
        ExitFacts::Exited(code) => (
            ExitReason::Exited(Some(code)),
            own_words().unwrap_or_else(|| format!("it exited with code {code}")),
        ),
        ExitFacts::Signalled(9) => (
            ExitReason::Signal(9),
            "it was killed (signal 9), perhaps because the host ran out of memory".to_owned(),
        ),
        ExitFacts::Signalled(signal) => (
            ExitReason::Signal(signal),
            format!("signal {signal} ended it"),
        ),
        ExitFacts::Unknown => (
            ExitReason::Exited(None),
            own_words().unwrap_or_else(|| {
                "its process is gone, and nobody was there to see how it ended".to_owned()
            }),
        ),
    };
    WorkerExit {
        reason,
        message,
        during_start: !was_ready,
        at,
        log_tail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    #[test] // [POOLD-017] [POOLD-018]
    fn every_kind_of_end_has_its_reason_and_a_sentence() {
        let log = vec![
            "error: an older one".into(),
            "error: tensor 3 lies outside the file".into(),
            "bye".into(),
        ];
        let mut table = String::new();
        for (facts, stop_requested, log) in [
            (ExitFacts::Exited(65), false, log.clone()),
            (ExitFacts::Exited(65), false, vec![]),
            (ExitFacts::Exited(75), false, vec![]),
            (ExitFacts::Exited(1), false, log.clone()),
            (ExitFacts::Exited(0), false, vec![]),
            (ExitFacts::Exited(0), true, log.clone()),
            (ExitFacts::Signalled(9), false, log.clone()),
            (ExitFacts::Signalled(9), true, vec![]),
            (ExitFacts::Signalled(11), false, vec![]),
            (ExitFacts::Unknown, false, log),
            (ExitFacts::Unknown, false, vec![]),
            (
                ExitFacts::StartTimeout(Duration::from_secs(120)),
                false,
                vec![],
            ),
            (
                ExitFacts::NotStarted("could not start `x`: no such file".into()),
                false,
                vec![],
            ),
        ] {
            let exit = classify_exit(facts, stop_requested, false, log, Timestamp::UNIX_EPOCH);
            writeln!(table, "{:<16} {}", exit.reason.to_string(), exit.message).unwrap();
        }
        insta::assert_snapshot!(table, @"
        model_invalid    tensor 3 lies outside the file
        model_invalid    it refused its model file
        exited(75)       its port was taken, and there was no other to try
        exited(1)        tensor 3 lies outside the file
        exited(0)        it exited with code 0
        stopped          it was told to stop
        signal(9)        it was killed (signal 9), perhaps because the host ran out of memory
        stopped          it was told to stop
        signal(11)       signal 11 ended it
        exited(unknown)  tensor 3 lies outside the file
        exited(unknown)  its process is gone, and nobody was there to see how it ended
        start_timeout    it was not ready after 120 s and was killed
        spawn_failed     could not start `x`: no such file
        ");
    }

    #[test]
    fn an_end_after_readiness_is_not_one_during_start() {
        let exit = |was_ready| {
            classify_exit(
                ExitFacts::Unknown,
                false,
                was_ready,
                vec![],
                Timestamp::UNIX_EPOCH,
            )
        };
        assert!(exit(false).during_start && !exit(true).during_start);
    }
}
