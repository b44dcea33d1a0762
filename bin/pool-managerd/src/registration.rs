//! The pool's standing with its orchestrator, as in `GET /status`, and requests for an immediate heartbeat.

use std::time::Duration;

use jiff::Timestamp;
use pool_core::api::pool::{Registration, RegistrationState};
use tokio::sync::watch;
use tokio::time::timeout;

/// Longest wait for the outcome of a requested heartbeat: slightly more than the time limit of one call.
const OUTCOME_PATIENCE: Duration = Duration::from_secs(6);

/// State shared between the heartbeat task and its readers.
pub struct Link {
    standing: watch::Sender<Registration>,
    /// Number of requested heartbeats.
    asked: watch::Sender<u64>,
    /// Highest number in `asked` that a finished attempt covers.
    answered: watch::Sender<u64>,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            standing: watch::Sender::new(standing(RegistrationState::Off)),
            asked: watch::Sender::new(0),
            answered: watch::Sender::new(0),
        }
    }
}

impl Link {
    /// Returns the present standing.
    pub fn standing(&self) -> Registration {
        self.standing.borrow().clone()
    }

    /// Replaces the standing. Keeps `since` and the time of the latest accepted heartbeat if the state is unchanged.
    pub fn set(&self, mut new: Registration) {
        self.standing.send_modify(|old| {
            let same = |a: &Registration, b: &Registration| {
                (a.state, &a.orchestrator, &a.code) == (b.state, &b.orchestrator, &b.code)
            };
            if same(old, &new) {
                new.since = old.since;
            }
            new.accepted_at = new.accepted_at.or(old.accepted_at);
            *old = new;
        });
    }

    /// Returns a receiver that wakes on each [`Link::ask`]. Its value is the number of requested heartbeats.
    pub fn asked(&self) -> watch::Receiver<u64> {
        self.asked.subscribe()
    }

    /// Records that an attempt covers the first `count` requests.
    pub fn answer(&self, count: u64) {
        self.answered.send_replace(count);
    }

    /// Requests a heartbeat now, and returns the standing after it, or after a few seconds without an outcome.
    pub async fn ask(&self) -> Registration {
        if self.standing.borrow().state == RegistrationState::Off {
            return self.standing();
        }
        let mut answered = self.answered.subscribe();
        let mut number = 0;
        self.asked.send_modify(|count| {
            *count += 1;
            number = *count;
        });
        let _ = timeout(
            OUTCOME_PATIENCE,
            answered.wait_for(|covered| *covered >= number),
        )
        .await;
        self.standing()
    }
}

/// Returns a standing with this state from now on, without details.
pub fn standing(state: RegistrationState) -> Registration {
    Registration {
        state,
        orchestrator: None,
        since: Timestamp::now(),
        accepted_at: None,
        code: None,
        message: None,
        hint: None,
        next_try_at: None,
    }
}
