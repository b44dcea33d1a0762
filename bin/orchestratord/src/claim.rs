//! The claim on the state folder: one daemon holds it at a time, and another may take it over from a frozen one.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use pool_core::kit::client::ApiClient;
use pool_core::kit::files::{self, LockGuard};
use pool_core::kit::run_files;
use pool_core::kit::service::BindError;
use pool_core::kit::service::state_files::{ClaimError, RunFiles};

use crate::state::StoreError;
use crate::{Hinted, NAME, VERSION, hinted};

/// Time after which a daemon that has not answered `/health` counts as frozen.
const ANSWER: Duration = Duration::from_secs(3);
/// Lock file held during a take-over, so that only one daemon takes over at a time.
const TAKE_OVER_LOCK: &str = "take-over.lock";

/// Treatment of a daemon that already holds the state folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Respect the claim and fail to start.
    Respect,
    /// Take over the folder if the holder does not answer.
    Replace,
}

/// A claim on the state folder.
pub(crate) enum Claim {
    /// The folder is claimed by this process.
    Ours(RunFiles),
    /// The folder is held by a frozen daemon, and this process may take it over.
    Frozen(TakeOver),
}

/// The right to take over the folder from a frozen daemon.
pub(crate) struct TakeOver {
    /// Excludes other take-overs.
    _alone: LockGuard,
    /// Process id of the frozen daemon, if its record names one.
    pid: Option<u32>,
}

impl TakeOver {
    /// Returns the error for an address on which the frozen daemon still listens.
    pub(crate) fn address_in_use(&self, error: BindError) -> anyhow::Error {
        let hint = format!(
            "the frozen orchestratord still has the address: end it with `kill -9 {}`, or choose another address with --bind",
            self.pid()
        );
        hinted(Some(&hint), error)
    }

    /// Returns the error for a database that the frozen daemon keeps locked.
    pub(crate) fn database_locked(&self, error: StoreError) -> anyhow::Error {
        let hint = format!(
            "the frozen orchestratord is in the middle of a write: end it with `kill -9 {}`; its unfinished write is rolled \
             back",
            self.pid()
        );
        hinted(Some(&hint), error)
    }

    fn pid(&self) -> String {
        self.pid.map_or("PID".to_owned(), |pid| pid.to_string())
    }

    /// Takes over the folder. The database must be open by then: its new epoch keeps a frozen daemon that wakes up from writing.
    pub(crate) fn finish(self, dir: &Path) -> anyhow::Result<RunFiles> {
        let files = RunFiles::take_over(dir, VERSION);
        let files = files.map_err(|error| hinted(error.hint(), error))?;
        tracing::warn!(
            pid = self.pid,
            "took over from an orchestratord that does not answer"
        );
        Ok(files)
    }
}

/// Claims the folder. Fails if another daemon holds it, unless `holder` allows a take-over and that daemon does not answer.
pub(crate) async fn claim(dir: &Path, holder: Holder) -> anyhow::Result<Claim> {
    let error = match RunFiles::claim(dir, NAME, VERSION) {
        Ok(files) => return Ok(Claim::Ours(files)),
        Err(error) => error,
    };
    let (ClaimError::Held { pid, .. }, Holder::Replace) = (&error, holder) else {
        return Err(hinted(error.hint(), error));
    };
    let pid = *pid;
    // Locked before the probe, so that two take-overs can't both find the holder frozen.
    let alone = files::try_lock_exclusive(dir.join(TAKE_OVER_LOCK))
        .with_context(|| format!("could not lock {}", dir.join(TAKE_OVER_LOCK).display()))?;
    let Some(alone) = alone else {
        return Err(Hinted::of(
            "another orchestratord is already taking over",
            "see `llorch orchestrator status`",
        ));
    };
    if let Some(url) = run_files::local_url(dir)
        && answers(&url).await
    {
        let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        return Err(Hinted::of(
            format!(
                "orchestratord{pid} is running and answers at {url}: there is nothing to take over"
            ),
            "stop it with `llorch orchestrator stop`; --take-over is only for a frozen orchestratord",
        ));
    }
    Ok(Claim::Frozen(TakeOver { _alone: alone, pid }))
}

async fn answers(url: &str) -> bool {
    let Ok(client) = ApiClient::new(url, None) else {
        return false;
    };
    let client = client.with_answer_timeout(ANSWER);
    client
        .fetch::<serde::de::IgnoredAny>(
            client.request(pool_core::kit::client::Method::GET, "/health"),
        )
        .await
        .is_ok()
}
