//! The classification of a worker's end, based on what is known about its process.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use jiff::Timestamp;

use super::SpawnError;
use crate::registry::TerminationCause;
use crate::worker::{ExitReason, WorkerExit};
use crate::worker_args::{EXIT_MODEL_INVALID, EXIT_PORT_TAKEN};

/// Prefix of the log line in which a worker reports why it gives up.
const ERROR_PREFIX: &str = "error: ";

/// The known facts about the end of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitFacts {
    /// The process exited with this code.
    Exited(i32),
    /// This signal ended the process.
    Signalled(i32),
    /// The process has ended. It was not a child of this process, so its exit status is unknown.
    Unknown,
    /// The process could not be started, for this reason.
    NotStarted(String),
}

impl ExitFacts {
    /// Converts the exit status of a child.
    pub fn of(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, Some(signal)) => Self::Signalled(signal),
            (None, None) => Self::Unknown,
        }
    }

    /// Returns whether a process may end like this after being asked to stop and then killed by the pool.
    fn may_be_ours(&self) -> bool {
        matches!(
            self,
            Self::Exited(0) | Self::Signalled(9 | 15) | Self::Unknown
        )
    }

    pub(super) fn not_started(error: &SpawnError) -> Self {
        let cause = std::error::Error::source(error)
            .map(|cause| format!(": {cause}"))
            .unwrap_or_default();
        Self::NotStarted(format!("{error}{cause}"))
    }
}

/// The circumstances of a worker's end, apart from its process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Circumstances<'a> {
    /// True if the worker was asked to stop.
    pub stop_requested: bool,
    /// Reason for which the pool was ending the worker; `None` if it was not.
    pub verdict: Option<&'a TerminationCause>,
    /// True if the kernel has killed a process in the worker's memory cgroup since the worker was last seen healthy.
    pub oom_evidence: bool,
    /// True if the worker had become ready.
    pub was_ready: bool,
}

/// Classifies the end of a worker. The pool's verdict or a requested stop takes precedence over the exit status. If the system
/// does not explain the end, the last line of the log that begins with `error: ` does.
pub fn classify_exit(
    facts: ExitFacts,
    circumstances: Circumstances<'_>,
    log_tail: Vec<String>,
    at: Timestamp,
) -> WorkerExit {
    let Circumstances {
        stop_requested,
        verdict,
        oom_evidence,
        was_ready,
    } = circumstances;
    // A worker that ended before our signal arrived has a reason of its own.
    let verdict = verdict.filter(|_| facts.may_be_ours());
    let by_kill = matches!(facts, ExitFacts::Signalled(9) | ExitFacts::Unknown);
    let own_words = || {
        log_tail
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix(ERROR_PREFIX))
            .map(str::to_owned)
    };
    let ours = verdict.map(|verdict| {
        let ending = verdict.ending();
        (
            ending.reason,
            format!("{}; terminated by the pool", ending.message),
        )
    });
    let (reason, message) = ours.unwrap_or_else(|| match facts {
        _ if stop_requested => (ExitReason::Stopped, "stop requested".to_owned()),
        _ if by_kill && oom_evidence => (
            ExitReason::OomKilled,
            "the kernel killed it because its cgroup or the host ran out of memory".to_owned(),
        ),
        ExitFacts::NotStarted(why) => (ExitReason::SpawnFailed, why),
        ExitFacts::Exited(EXIT_MODEL_INVALID) => (
            ExitReason::ModelInvalid,
            own_words().unwrap_or_else(|| "it refused its model file".to_owned()),
        ),
        ExitFacts::Exited(EXIT_PORT_TAKEN) => (
            ExitReason::Exited(Some(EXIT_PORT_TAKEN)),
            own_words().unwrap_or_else(|| {
                "its port was taken, and no other port could be tried".to_owned()
            }),
        ),
        ExitFacts::Exited(code) => (
            ExitReason::Exited(Some(code)),
            own_words().unwrap_or_else(|| format!("it exited with code {code}")),
        ),
        ExitFacts::Signalled(9) => (
            ExitReason::Signal(9),
            "it was killed (signal 9); the system recorded no out-of-memory kill".to_owned(),
        ),
        ExitFacts::Signalled(signal) => (
            ExitReason::Signal(signal),
            format!("it was killed by signal {signal}"),
        ),
        ExitFacts::Unknown => (
            ExitReason::Exited(None),
            own_words().unwrap_or_else(|| {
                "its process is gone, and its exit status is unknown".to_owned()
            }),
        ),
    });
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

    #[test] // [POOLD-017] [POOLD-018] [POOLD-062] [POOLD-063]
    fn every_kind_of_end_has_a_reason_and_a_message() {
        let log = vec![
            "error: an older one".into(),
            "error: tensor 3 lies outside the file".into(),
            "bye".into(),
        ];
        let plain = Circumstances::default();
        let stop = Circumstances {
            stop_requested: true,
            ..plain
        };
        let oom = Circumstances {
            oom_evidence: true,
            ..plain
        };
        let late = TerminationCause::StartTimeout { after_s: 120 };
        let stuck = TerminationCause::Stalled {
            message: "no token for 31 s".into(),
        };
        let [late, stuck] = [&late, &stuck].map(|verdict| Circumstances {
            verdict: Some(verdict),
            ..plain
        });
        let stuck_then_stop = Circumstances {
            stop_requested: true,
            oom_evidence: true,
            ..stuck
        };
        let mut table = String::new();
        for (facts, circumstances, log) in [
            (ExitFacts::Exited(65), plain, log.clone()),
            (ExitFacts::Exited(65), plain, vec![]),
            (ExitFacts::Exited(75), plain, vec![]),
            (ExitFacts::Exited(1), plain, log.clone()),
            (ExitFacts::Exited(0), plain, vec![]),
            (ExitFacts::Exited(0), stop, log.clone()),
            (ExitFacts::Signalled(9), plain, log.clone()),
            (ExitFacts::Signalled(9), stop, vec![]),
            (ExitFacts::Signalled(9), oom, vec![]),
            (ExitFacts::Signalled(11), oom, vec![]),
            (ExitFacts::Exited(3), oom, vec![]),
            (ExitFacts::Unknown, plain, log.clone()),
            (ExitFacts::Unknown, plain, vec![]),
            (ExitFacts::Unknown, oom, vec![]),
            (ExitFacts::Signalled(9), late, vec![]),
            (ExitFacts::Exited(0), late, vec![]),
            (ExitFacts::Exited(65), late, log.clone()),
            (ExitFacts::Signalled(15), stuck, vec![]),
            (ExitFacts::Unknown, stuck_then_stop, vec![]),
            (
                ExitFacts::NotStarted("could not start `x`: no such file".into()),
                plain,
                vec![],
            ),
        ] {
            let exit = classify_exit(facts, circumstances, log, Timestamp::UNIX_EPOCH);
            writeln!(table, "{:<16} {}", exit.reason.to_string(), exit.message).unwrap();
        }
        insta::assert_snapshot!(table, @"
        model_invalid    tensor 3 lies outside the file
        model_invalid    it refused its model file
        exited(75)       its port was taken, and no other port could be tried
        exited(1)        tensor 3 lies outside the file
        exited(0)        it exited with code 0
        stopped          stop requested
        signal(9)        it was killed (signal 9); the system recorded no out-of-memory kill
        stopped          stop requested
        oom_killed       the kernel killed it because its cgroup or the host ran out of memory
        signal(11)       it was killed by signal 11
        exited(3)        it exited with code 3
        exited(unknown)  tensor 3 lies outside the file
        exited(unknown)  its process is gone, and its exit status is unknown
        oom_killed       the kernel killed it because its cgroup or the host ran out of memory
        start_timeout    not ready after 2m; terminated by the pool
        start_timeout    not ready after 2m; terminated by the pool
        model_invalid    tensor 3 lies outside the file
        stalled          no token for 31 s; terminated by the pool
        stalled          no token for 31 s; terminated by the pool
        spawn_failed     could not start `x`: no such file
        ");
    }

    #[test]
    fn an_end_after_readiness_is_not_one_during_start() {
        let exit = |was_ready| {
            let circumstances = Circumstances {
                was_ready,
                ..Circumstances::default()
            };
            classify_exit(
                ExitFacts::Unknown,
                circumstances,
                vec![],
                Timestamp::UNIX_EPOCH,
            )
        };
        assert!(exit(false).during_start && !exit(true).during_start);
    }
}
