//! The operator's own policy: a script in a file, reloaded when the file changes.
//!
//! A version that does not compile changes nothing: the previous one stays in force. A script costs a pass at most its time
//! limit; after that, the built-in policy decides. Scripts run on a thread of their own.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use orchestrator_core::api::scheduler::{
    LastScriptError, ScriptError, ScriptErrorKind, ScriptView,
};
use orchestrator_core::config::SchedulerConfig;
use orchestrator_core::decide::{Costs, Decision, offer, settle};
use orchestrator_core::scheduler::{Policy, Snapshot, schedule};
use orchestrator_core::script::{MAX_SOURCE, Runner, Script, source_hash, too_long};

use super::Scheduler;
use crate::clock;
use crate::metrics::Metrics;

/// Interval of checks for a new version: an operator who saves the file waits no longer than this.
const LOOK: Duration = Duration::from_secs(1);
/// Maximum number of kinds of errors logged for one version.
const LOGGED: usize = 100;

/// The script that decides, if the settings name one.
#[derive(Debug)]
pub struct ScriptPolicy {
    costs: Costs,
    limit: Duration,
    file: Option<ScriptFile>,
}

#[derive(Debug)]
struct ScriptFile {
    path: PathBuf,
    runner: Runner,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    in_force: Option<(Script, Timestamp)>,
    /// Stamp of the file as last read.
    seen: Option<Stamp>,
    refused: Option<LastScriptError>,
    last_error: Option<LastScriptError>,
    runs: u64,
    fallbacks: u64,
    errors: BTreeMap<ScriptErrorKind, u64>,
    /// Kinds and lines of logged errors of the version in force. An error in every pass would otherwise fill the log.
    logged: HashSet<(ScriptErrorKind, Option<usize>)>,
}

/// Metadata of the file that distinguishes its versions without reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    bytes: u64,
    inode: u64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            bytes: metadata.len(),
            inode: metadata.ino(),
        }
    }
}

impl State {
    fn failed(&mut self, sha256: Option<String>, error: &ScriptError, metrics: &Metrics) {
        let kind = error.kind;
        metrics
            .script_errors
            .with_label_values(&[kind.as_str()])
            .inc();
        *self.errors.entry(kind).or_default() += 1;
        self.last_error = Some(LastScriptError {
            at: clock::wall(clock::now()),
            sha256,
            error: error.clone(),
        });
    }
}

impl ScriptPolicy {
    /// Loads the script that the settings name. A script that can't be loaded does not prevent a start: the built-in policy
    /// decides until the file is fixed.
    pub fn start(config: &SchedulerConfig, metrics: &Metrics) -> std::io::Result<Self> {
        let file = match &config.script {
            None => None,
            Some(path) => Some(ScriptFile {
                path: path.clone(),
                runner: Runner::start()?,
                state: Mutex::default(),
            }),
        };
        let policy = Self {
            costs: Arc::new(config.costs.0.clone()),
            limit: config.script_limit(),
            file,
        };
        policy.reload(metrics);
        Ok(policy)
    }

    /// Returns whether a script decides.
    pub fn is_in_force(&self) -> bool {
        self.file
            .as_ref()
            .is_some_and(|file| file.lock().in_force.is_some())
    }

    /// Returns the costs of hosts, from the settings.
    pub fn costs(&self) -> &Costs {
        &self.costs
    }

    /// Returns the script's state for `GET /v2/scheduler`; `None` if the settings name no script.
    pub fn view(&self) -> Option<ScriptView> {
        let file = self.file.as_ref()?;
        let state = file.lock();
        Some(ScriptView {
            path: file.path.display().to_string(),
            sha256: state
                .in_force
                .as_ref()
                .map(|(script, _)| script.sha256().to_owned()),
            loaded_at: state.in_force.as_ref().map(|(_, at)| *at),
            limit_ms: u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX),
            runs: state.runs,
            fallbacks: state.fallbacks,
            errors: state.errors.clone(),
            last_error: state.last_error.clone(),
            refused: state.refused.clone(),
        })
    }

    /// Decides a pass, within the script's limit.
    pub async fn decide(
        &self,
        snapshot: &Arc<Snapshot>,
        policy: &'static dyn Policy,
        metrics: &Metrics,
    ) -> Decision {
        let script = self.file.as_ref().and_then(|file| {
            let script = file.in_force()?;
            Some((file, script))
        });
        let (seen, costs) = (Arc::clone(snapshot), Arc::clone(&self.costs));
        let asked = script.is_some();
        let (built_in, pass) = aside(move || {
            let built_in = schedule(&seen, policy);
            let pass = asked.then(|| offer(&seen, &built_in, &costs)).flatten();
            (built_in, pass)
        })
        .await;
        let Some((file, script)) = script else {
            return Decision::built_in(built_in);
        };
        let Some(pass) = pass else {
            return Decision::built_in(built_in).with(&script);
        };
        let (done, came) = tokio::sync::oneshot::channel();
        let submitted = file
            .runner
            .submit(&script, Arc::clone(&pass), self.limit, false, |ran| {
                // After a timeout nothing waits for the result; drop it.
                let _ = done.send(ran);
            });
        let answer = match submitted {
            Err(error) => Err(error),
            Ok(()) => match tokio::time::timeout(self.limit, came).await {
                Ok(Ok(ran)) => ran.result,
                Ok(Err(_)) | Err(_) => Err(too_long(self.limit)),
            },
        };
        let decision = aside(move || settle(policy, built_in, &pass, answer)).await;
        file.note(&script, decision.error.as_ref(), metrics);
        decision.with(&script)
    }

    /// Puts a new version of the file into force if it compiles. Blocks while reading and compiling. Returns whether another
    /// version is in force.
    pub fn reload(&self, metrics: &Metrics) -> bool {
        self.file.as_ref().is_some_and(|file| file.reload(metrics))
    }
}

impl ScriptFile {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_force(&self) -> Option<Script> {
        self.lock()
            .in_force
            .as_ref()
            .map(|(script, _)| script.clone())
    }

    fn note(&self, script: &Script, error: Option<&ScriptError>, metrics: &Metrics) {
        let mut state = self.lock();
        state.runs += 1;
        let Some(error) = error else { return };
        state.fallbacks += 1;
        state.failed(Some(script.sha256().to_owned()), error, metrics);
        let news = state.logged.len() < LOGGED && state.logged.insert((error.kind, error.line));
        if news {
            tracing::warn!(
                script = %self.path.display(), kind = %error.kind, %error,
                "the scheduler's script failed; the built-in policy decides (logged once per error)"
            );
        }
    }

    fn reload(&self, metrics: &Metrics) -> bool {
        let (stamp, source) = match self.read() {
            Ok(None) => return false,
            Ok(Some((stamp, source))) => (Some(stamp), Ok(source)),
            Err(error) => (None, Err(error)),
        };
        let loaded = source.map_err(|error| (None, error)).and_then(|source| {
            let sha256 = source_hash(&source);
            Script::compile(&source).map_err(|error| (Some(sha256), error))
        });
        // The lock is taken only now, so that no pass waits for a compilation.
        let mut state = self.lock();
        match loaded {
            Ok(script) => {
                state.seen = stamp;
                state.refused = None;
                metrics.script_refused.set(0);
                let known = state.in_force.as_ref().map(|(known, _)| known.sha256());
                if known == Some(script.sha256()) {
                    return false;
                }
                tracing::info!(script = %self.path.display(), sha256 = script.sha256(), "the scheduler's script is in force");
                state.logged.clear();
                state.in_force = Some((script, clock::wall(clock::now())));
                true
            }
            Err((sha256, error)) => {
                let known = state.refused.as_ref();
                let news = known.is_none_or(|known| known.error != error || known.sha256 != sha256);
                // A file that can't be read is tried again, but the error is reported once.
                state.seen = stamp;
                if news {
                    state.failed(sha256, &error, metrics);
                    state.refused = state.last_error.clone();
                    metrics.script_refused.set(1);
                    let decides = match state.in_force {
                        Some(_) => "the previous version stays in force",
                        None => "the built-in policy decides",
                    };
                    tracing::error!(script = %self.path.display(), %error, "the scheduler's script is refused; {decides}");
                }
                false
            }
        }
    }

    /// Reads the file; `None` if it has not changed.
    fn read(&self) -> Result<Option<(Stamp, Vec<u8>)>, ScriptError> {
        let unreadable = |error: std::io::Error| ScriptError {
            kind: ScriptErrorKind::Compile,
            message: format!("the file can't be read: {error}"),
            line: None,
            column: None,
        };
        let metadata = std::fs::metadata(&self.path).map_err(unreadable)?;
        if !metadata.is_file() {
            // Opening a pipe could block forever.
            return Err(unreadable(std::io::Error::other("not a regular file")));
        }
        let stamp = Stamp::of(&metadata);
        if self.lock().seen == Some(stamp) {
            return Ok(None);
        }
        let mut source = Vec::new();
        File::open(&self.path)
            .and_then(|file| file.take(MAX_SOURCE as u64 + 1).read_to_end(&mut source))
            .map_err(unreadable)?;
        Ok(Some((stamp, source)))
    }
}

/// Works out a decision on a blocking thread: for a large fleet, the work takes too long for the runtime's threads.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(_) => std::future::pending().await,
        },
    }
}

impl Scheduler {
    /// Watches the file for new versions of the script until the daemon stops.
    pub async fn watch_script(self: Arc<Self>) {
        if self.script.file.is_none() {
            return;
        }
        loop {
            tokio::select! {
                () = self.jobs.shutdown.requested() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let looked = {
                let scheduler = Arc::clone(&self);
                let look = move || scheduler.script.reload(&scheduler.jobs.metrics);
                tokio::task::spawn_blocking(look).await
            };
            if looked.unwrap_or(false) {
                self.jobs.changed.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use orchestrator_core::check::sample;
    use orchestrator_core::scheduler::LeastLoaded;
    use orchestrator_core::trace::By;
    use pool_core::kit::service::{Load, Places};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// Returns the sample on a fleet so large that one look at all of it takes longer than a pass may.
    fn large() -> Arc<Snapshot> {
        let mut snapshot = sample();
        let pool = snapshot.pools[0].as_ref().clone();
        snapshot.pools.extend((0..60_000).map(|number| {
            let mut pool = pool.clone();
            pool.id = format!("pool-{number:05}");
            Arc::new(pool)
        }));
        Arc::new(snapshot)
    }

    // [ORCHD-142] [P21] A pass does not wait for a call that can't be interrupted.
    #[tokio::test]
    async fn a_run_that_goes_on_is_not_waited_for() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let slow = "fn schedule(ctx) { let j = ctx.jobs[0]; loop { best_worker(ctx, j); best_device(ctx, j); } }";
        file.write_all(slow.as_bytes()).unwrap();
        let config = SchedulerConfig {
            script: Some(file.path().to_owned()),
            script_limit_ms: 5,
            ..SchedulerConfig::default()
        };
        let metrics = Metrics::new([], Load::new(Places::default())).unwrap();
        let script = ScriptPolicy::start(&config, &metrics).unwrap();
        let snapshot = large();
        let built_in = schedule(&snapshot, &LeastLoaded);
        let file = script.file.as_ref().unwrap();
        let quick = Script::compile(b"fn schedule(ctx) { [] }").unwrap();
        let pass = offer(&snapshot, &built_in, &Costs::default()).unwrap();
        for attempt in 1.. {
            let decision = script.decide(&snapshot, &LeastLoaded, &metrics).await;
            assert_eq!(decision.plan, built_in);
            assert!(matches!(decision.by, By::Fallback(_)));
            let (done, came) = tokio::sync::oneshot::channel();
            let next = file
                .runner
                .submit(&quick, Arc::clone(&pass), LIMIT, false, |ran| {
                    let _ = done.send(ran);
                });
            // A run still under way was not waited for. On a busy machine, a run may begin late and end at once.
            match next {
                Ok(()) => assert!(came.await.unwrap().result.is_ok()),
                Err(busy) => {
                    assert_eq!(busy.kind, ScriptErrorKind::Busy);
                    break;
                }
            }
            assert!(attempt < 50, "every run was waited for");
        }
    }
}
