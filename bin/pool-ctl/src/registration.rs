//! The pool's registration with its orchestrator: in words, and after a change that tasks can see.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use pool_core::api::pool::{PoolReport, Registration, RegistrationState as State};
use pool_core::kit::terminal::doctor::Finding;
use pool_core::kit::terminal::{age, note, say};
use serde_json::json;

use crate::context::Context;
use crate::pool::Pool;

/// Time limit for the orchestrator's first answer to a new daemon before `daemon start` returns.
const FIRST_OUTCOME: Duration = Duration::from_secs(3);
/// Interval between checks within that limit.
const POLL: Duration = Duration::from_millis(50);
/// Time limit for the daemon to report a change. Longer than the daemon's own wait for the outcome.
const REPORT_TIMEOUT: Duration = Duration::from_secs(8);

/// Returns the registration as a part of a sentence about the pool.
pub fn words(registration: &Registration) -> String {
    let orchestrator = registration.orchestrator.as_deref();
    let at = orchestrator.unwrap_or("its orchestrator");
    let since = || age(registration.since, Timestamp::now());
    let why = registration.message.as_deref().unwrap_or("no reason given");
    match registration.state {
        State::Off => "reports to no orchestrator (`orchestrator_url` is `none`)".to_owned(),
        State::Pending => "is not registered yet".to_owned(),
        State::Registered => format!("has been registered with {at} for {}", since()),
        State::Refused => format!("has been refused by {at} for {}: {why}", since()),
        State::Unreachable => format!("has not reached {at} for {}: {why}", since()),
        State::NoOrchestrator => {
            "is not registered: no orchestrator is running on this host; the pool registers when one starts"
                .to_owned()
        }
        State::Failed => format!("has failed to report to {at} for {}: {why}", since()),
    }
}

/// Returns whether the pool gets no work until a person acts.
fn is_trouble(registration: &Registration) -> bool {
    matches!(
        registration.state,
        State::Refused | State::Unreachable | State::Failed
    )
}

/// Prints the registration, and a remedy if one is needed.
pub fn show(registration: &Registration) -> Result<(), pool_core::kit::terminal::CliError> {
    let text = words(registration);
    if !is_trouble(registration) {
        return say(format!("the pool {text}"));
    }
    note(format!("warning: the pool {text}"));
    if let Some(hint) = &registration.hint {
        note(format!("hint: {hint}"));
    }
    Ok(())
}

/// Waits briefly for the first outcome of a new daemon, and prints it.
pub async fn show_first_outcome(
    context: &Context,
) -> Result<(), pool_core::kit::terminal::CliError> {
    let Ok(Pool::Daemon(client)) = Pool::of_this_home(context).await else {
        return Ok(());
    };
    let deadline = Instant::now() + FIRST_OUTCOME;
    loop {
        let report = client.get::<PoolReport>("/status").await;
        let Ok(Some(registration)) = report.map(|report| report.registration) else {
            return Ok(());
        };
        if registration.state != State::Pending {
            return show(&registration);
        }
        if Instant::now() >= deadline {
            note("the orchestrator has not answered yet; check with `llorch-pool daemon status`");
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Has the daemon of this home report to its orchestrator now, because the models on disk changed. Returns the
/// resulting registration; `None` without a daemon that answers.
pub async fn report_change(context: &Context) -> Option<Registration> {
    let Ok(Pool::Daemon(client)) = Pool::of_this_home(context).await else {
        return None;
    };
    let call = client.with_answer_timeout(REPORT_TIMEOUT);
    call.post("/heartbeat", &json!({})).await.ok()
}

/// Returns the finding about the registration of a running daemon.
pub fn finding(registration: &Registration) -> Finding {
    let message = format!("the pool {}", words(registration));
    let fix = |default: &str| {
        registration
            .hint
            .clone()
            .unwrap_or_else(|| default.to_owned())
    };
    match registration.state {
        State::Off | State::Registered | State::NoOrchestrator => {
            Finding::ok("registration", message)
        }
        State::Pending => Finding::warn("registration", message, "llorch-pool daemon status"),
        State::Unreachable => Finding::warn(
            "registration",
            message,
            fix("start the orchestrator, or set LLORCH_ORCHESTRATOR_URL to its address"),
        ),
        State::Refused | State::Failed => {
            Finding::fail("registration", message, fix("llorch-pool daemon logs"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::kit::terminal::doctor::CheckStatus;

    #[test] // [POOLCTL-039] P24
    fn a_refused_pool_is_told_with_its_remedy() {
        let registration = |state| Registration {
            state,
            orchestrator: Some("http://blep:8080".into()),
            since: Timestamp::now(),
            accepted_at: None,
            code: None,
            message: Some(
                "pool id `mac` is held by another instance at http://10.0.0.7:9200".into(),
            ),
            hint: Some("set LLORCH_POOL_ID".into()),
            next_try_at: None,
        };
        let refused = registration(State::Refused);
        let text = words(&refused);
        assert!(
            text.contains("refused by http://blep:8080") && text.contains("10.0.0.7"),
            "{text}"
        );
        let found = finding(&refused);
        assert_eq!(
            (found.status, found.fix.as_deref()),
            (CheckStatus::Fail, Some("set LLORCH_POOL_ID"))
        );
        for (state, verdict) in [
            (State::Registered, CheckStatus::Ok),
            (State::Off, CheckStatus::Ok),
            (State::NoOrchestrator, CheckStatus::Ok),
            (State::Pending, CheckStatus::Warn),
            (State::Unreachable, CheckStatus::Warn),
            (State::Failed, CheckStatus::Fail),
        ] {
            assert_eq!(finding(&registration(state)).status, verdict, "{state:?}");
        }
    }
}
