//! Whose the state folder is: one daemon's at a time, and who may take it from a frozen one.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use pool_core::client::ApiClient;
use pool_core::fsio::{self, LockGuard};
use pool_core::run_files;
use pool_core::service::BindError;
use pool_core::service::state_files::{ClaimError, RunFiles};

use crate::state::StoreError;
use crate::{Hinted, NAME, VERSION, hinted};

/// How long a daemon may take to answer `/health` until it counts as frozen.
const ANSWER: Duration = Duration::from_secs(3);
/// Held while one daemon takes over from another.
const TAKE_OVER_LOCK: &str = "take-over.lock";

/// What to do about a daemon that holds the state folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Leave it alone, and don't start.
    Respect,
    /// Take the folder from it, if it does not answer.
    Replace,
}

/// A claim on the state folder.
pub(crate) enum Claim {
    /// The folder is ours.
    Ours(RunFiles),
    /// A frozen daemon holds it, and we may take it.
    Frozen(TakeOver),
}

/// The right to take the folder from a frozen daemon.
pub(crate) struct TakeOver {
    /// Nobody else does the same meanwhile.
    _alone: LockGuard,
    /// The frozen one's pid.
    pid: Option<u32>,
}

impl TakeOver {
    /// The frozen daemon still listens where this one shall.
    pub(crate) fn address_in_use(&self, error: BindError) -> anyhow::Error {
        let hint = format!(
            "the frozen orchestratord still has the address: end it with `kill -9 {}`, or choose another address with --bind",
            self.pid()
        );
        hinted(Some(&hint), error)
    }

    /// The frozen daemon holds the database's lock.
    pub(crate) fn database_locked(&self, error: StoreError) -> anyhow::Error {
        let hint = format!(
            "the frozen orchestratord stands in the midst of a write: end it with `kill -9 {}`; what it has not finished \
             to write is undone",
            self.pid()
        );
        hinted(Some(&hint), error)
    }

    fn pid(&self) -> String {
        self.pid.map_or("PID".to_owned(), |pid| pid.to_string())
    }

    /// Takes the folder. The database must be ours by then: that is what keeps the frozen daemon from doing harm.
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

/// Claims the folder, or says who holds it.
pub(crate) async fn claim(dir: &Path, holder: Holder) -> anyhow::Result<Claim> {
    let error = match RunFiles::claim(dir, NAME, VERSION) {
        Ok(files) => return Ok(Claim::Ours(files)),
        Err(error) => error,
    };
    let (ClaimError::Held { pid, .. }, Holder::Replace) = (&error, holder) else {
        return Err(hinted(error.hint(), error));
    };
    let pid = *pid;
    let alone = fsio::try_lock_exclusive(dir.join(TAKE_OVER_LOCK))
        .with_context(|| format!("could not lock {}", dir.join(TAKE_OVER_LOCK).display()))?;
    let Some(alone) = alone else {
        return Err(Hinted::of(
            "another orchestratord is just taking over",
            "see `llorch orchestrator status`",
        ));
    };
    if let Some(url) = run_files::local_url(dir)
        && answers(&url).await
    {
        let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        return Err(Hinted::of(
            format!("orchestratord{pid} runs and answers at {url}: there is nothing to take over"),
            "stop it with `llorch orchestrator stop`; --take-over is for one that is frozen",
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
        .fetch::<serde::de::IgnoredAny>(client.request(pool_core::client::Method::GET, "/health"))
        .await
        .is_ok()
}
