//! Downloads of models, each run by `llorch-pool` as a child process. A download for the daemon and one for the owner at the
//! keyboard are then the same operation, under the same lock.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use pool_core::ModelRef;
use pool_core::api::models::{DownloadErrorCode, DownloadEvent, DownloadFailure};
use pool_core::catalog::store::ResolveError;
use pool_core::catalog::support::{self, Unsupported};
use pool_core::kit::process::Signal;
use pool_core::kit::programs;
use pool_core::kit::sse::SseEvent as _;
use rustix::process::{Pid, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::download_table::Latest;
use crate::pool::Pool;

/// Name of the program that downloads models.
const PROGRAM: &str = "llorch-pool";
/// Time the program has to end after each signal. Fits in the daemon's own time to stop.
const GRACE: Duration = Duration::from_millis(1500);

/// Reason a download is not started.
#[derive(Debug, thiserror::Error)]
pub enum DownloadRefused {
    /// Reference that can't be resolved to a model.
    #[error(transparent)]
    Model(#[from] ResolveError),
    /// Model that no worker of this version can run.
    #[error("`{model_ref}` can't run: {reason}")]
    Unsupported {
        /// Requested reference.
        model_ref: ModelRef,
        /// Reason against the model.
        reason: Box<Unsupported>,
    },
    /// Model without a download source, such as a file of this host.
    #[error("no download source for `{model_ref}`")]
    NowhereFrom {
        /// Reference of the model, as catalogued if it is in the catalogue.
        model_ref: ModelRef,
    },
    /// Model outside the catalogue, on a host whose owner has not set `models.allow_hub`.
    #[error("`{model_ref}` is not in the catalogue, and this pool downloads no other models")]
    HubNotAllowed {
        /// Requested reference.
        model_ref: ModelRef,
    },
    /// Missing `llorch-pool`.
    #[error("`{PROGRAM}` is not installed on this host")]
    NoProgram,
}

impl DownloadRefused {
    /// Returns what to try next; `None` if there is nothing to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::Unsupported { reason, .. } => Some(reason.hint().to_owned()),
            Self::NowhereFrom { .. } => None,
            Self::HubNotAllowed { model_ref } => Some(format!(
                "on the host, run `llorch-pool models download {model_ref}`, or set `models.allow_hub = true`"
            )),
            Self::NoProgram => {
                Some("install it next to `pool-managerd`, or on its PATH".to_owned())
            }
        }
    }
}

/// Starts the download of `model`, or joins the one under way. Reads files.
pub fn start(
    pool: &Arc<Pool>,
    model: &ModelRef,
) -> Result<watch::Receiver<Latest>, DownloadRefused> {
    let model = checked(pool, model)?;
    let config = pool.lifecycle.config();
    let program = programs::find_in(PROGRAM, config.workers.programs_dir.clone())
        .or_else(|| programs::find_beside_or_on_path(PROGRAM))
        .ok_or(DownloadRefused::NoProgram)?;
    let (download, begun) = follow_or_begin(pool, &model);
    if let Some(begun) = begun {
        pool.changed();
        tokio::spawn(run(begun, program));
    }
    Ok(download)
}

/// Returns the download of `model` that is under way, or registers a new one for the caller to run.
fn follow_or_begin(
    pool: &Arc<Pool>,
    model: &ModelRef,
) -> (watch::Receiver<Latest>, Option<UnderWay>) {
    let mut running = pool.downloads.running();
    if let Some(download) = running.get(model) {
        return (download.clone(), None);
    }
    let (tell, download) = watch::channel(None);
    running.insert(model.clone(), download.clone());
    let begun = UnderWay {
        pool: Arc::clone(pool),
        model: model.clone(),
        tell,
        last: None,
    };
    (download, Some(begun))
}

/// A download that others can find and follow. On drop, even after a panic, it deregisters itself and sends its followers a
/// final event.
struct UnderWay {
    pool: Arc<Pool>,
    model: ModelRef,
    tell: watch::Sender<Latest>,
    /// Final event; `None` until the download has ended.
    last: Option<DownloadEvent>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let last = self.last.take().unwrap_or_else(|| {
            tracing::error!(model = %self.model, "a download was abandoned without a result");
            failed(
                DownloadErrorCode::DownloadFailed,
                "the pool manager abandoned the download because of an internal error; see its log"
                    .to_owned(),
            )
        });
        // Deregister before the final event: a request between the two starts a new download, which finds the file.
        self.pool.downloads.running().remove(&self.model);
        self.pool.changed();
        self.tell.send_replace(Some(last));
    }
}

/// Returns the reference under which `model` is downloaded, if this pool may download it.
fn checked(pool: &Pool, model: &ModelRef) -> Result<ModelRef, DownloadRefused> {
    let nowhere = |model_ref| DownloadRefused::NowhereFrom { model_ref };
    let unsupported = |model_ref, reason| DownloadRefused::Unsupported {
        model_ref,
        reason: Box::new(reason),
    };
    if let ModelRef::File(_) = model {
        return Err(nowhere(model.clone()));
    }
    let lifecycle = &pool.lifecycle;
    match lifecycle.store().slot(model, lifecycle.catalog()) {
        Ok(slot) if slot.sources.is_empty() => Err(nowhere(slot.model_ref)),
        Ok(slot) => match slot.unsupported(lifecycle.catalog()) {
            Some(reason) => Err(unsupported(slot.model_ref, reason)),
            None => Ok(slot.model_ref),
        },
        Err(ResolveError::NotCatalogued { model_ref }) => {
            if !lifecycle.config().models.allow_hub {
                return Err(DownloadRefused::HubNotAllowed { model_ref });
            }
            match &model_ref {
                ModelRef::Hub {
                    file: Some(file), ..
                } => match support::check_file_name(file) {
                    Ok(()) => Ok(model_ref),
                    Err(reason) => Err(unsupported(model_ref, reason)),
                },
                _ => Ok(model_ref),
            }
        }
        Err(error) => Err(error.into()),
    }
}

async fn run(mut download: UnderWay, program: PathBuf) {
    let (pool, model) = (Arc::clone(&download.pool), download.model.clone());
    tracing::info!(%model, "download started");
    let last = match spawn(&pool, &model, &program) {
        Ok(child) => follow(child, &model, pool.downloads.end_order(), &download.tell).await,
        Err(error) => failed(
            DownloadErrorCode::DownloadFailed,
            format!("could not start {}: {error}", program.display()),
        ),
    };
    match &last {
        DownloadEvent::End(end) => {
            tracing::info!(%model, path = %end.path.display(), "download completed");
            pool.metrics.downloaded(if end.already_there {
                "present"
            } else {
                "completed"
            });
            pool.changed();
        }
        DownloadEvent::Error(failure) => {
            tracing::warn!(%model, reason = failure.message, "download failed");
            pool.metrics.downloaded(label(failure.code));
        }
        DownloadEvent::Progress(_) | DownloadEvent::Waiting(_) => {}
    }
    download.last = Some(last);
}

fn spawn(pool: &Pool, model: &ModelRef, program: &Path) -> std::io::Result<Child> {
    let lifecycle = &pool.lifecycle;
    let mut command = Command::new(program);
    command
        .args(["models", "download", "--progress", "json", "--"])
        .arg(model.to_string())
        // The daemon's settings decide where models are kept.
        .env("LLORCH_MODELS_DIR", lifecycle.store().dir())
        .env_remove("LLORCH_POOL_TOKEN")
        .env_remove("LLORCH_API_TOKEN")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A Ctrl-C at the daemon's terminal must reach only the daemon, which ends its downloads itself.
        .process_group(0);
    if let Some(root) = lifecycle.home().root() {
        command.env("LLORCH_HOME", root);
    }
    command.spawn()
}

/// Forwards the program's events until the program has ended. Returns its final event.
async fn follow(
    mut child: Child,
    model: &ModelRef,
    mut over: watch::Receiver<bool>,
    tell: &watch::Sender<Latest>,
) -> DownloadEvent {
    let remarks = child.stderr.take();
    let remarks = tokio::spawn(log(remarks, model.clone()));
    let mut last = None;
    let status = {
        let words = child.stdout.take();
        let told_to_end = async {
            // A dropped sender also asks for the end.
            let _ = over.wait_for(|over| *over).await;
        };
        tokio::select! {
            () = listen(words, tell, &mut last) => None,
            () = told_to_end => Some(end(&mut child).await),
        }
    };
    let status = match status {
        Some(status) => status,
        None => child.wait().await.ok(),
    };
    let remark = remarks.await.unwrap_or_default();
    last.unwrap_or_else(|| {
        if *over.borrow() {
            return failed(
                DownloadErrorCode::Interrupted,
                "the pool manager is stopping; the bytes received are kept".to_owned(),
            );
        }
        let how = status.map_or_else(String::new, |status| format!(" ({status})"));
        failed(
            DownloadErrorCode::DownloadFailed,
            format!("`{PROGRAM}` ended without a result{how}: {remark}"),
        )
    })
}

async fn listen(
    words: Option<impl AsyncRead + Unpin>,
    tell: &watch::Sender<Latest>,
    last: &mut Latest,
) {
    let Some(words) = words else { return };
    let mut lines = BufReader::new(words).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str::<DownloadEvent>(&line) {
            // Held back until the process is gone and the counters are right.
            Ok(event) if event.is_last() => *last = Some(event),
            Ok(event) => {
                tell.send_replace(Some(event));
            }
            Err(error) => tracing::debug!(line, %error, "ignoring a line that is not an event"),
        }
    }
}

/// Logs the program's standard error line by line. Returns its last line.
async fn log(remarks: Option<impl AsyncRead + Unpin>, model: ModelRef) -> String {
    let mut last = String::new();
    let Some(remarks) = remarks else { return last };
    let mut lines = BufReader::new(remarks).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::info!(%model, "{line}");
        last = line;
    }
    last
}

/// Ends the program's process group: with SIGTERM first, so that the program can end its own children, then with SIGKILL.
async fn end(child: &mut Child) -> Option<std::process::ExitStatus> {
    for signal in [Signal::TERM, Signal::KILL] {
        // The id can't be reused before the child has been waited for.
        let group = child.id().and_then(|id| i32::try_from(id).ok());
        let group = group.and_then(Pid::from_raw)?;
        // A process that is already gone needs no signal.
        let _ = kill_process_group(group, signal);
        if let Ok(status) = timeout(GRACE, child.wait()).await {
            return status.ok();
        }
    }
    None
}

fn failed(code: DownloadErrorCode, message: String) -> DownloadEvent {
    DownloadEvent::Error(DownloadFailure {
        code,
        message,
        hint: None,
        retriable: code.is_retriable(),
    })
}

/// Returns the metrics label of a failed download.
fn label(code: DownloadErrorCode) -> &'static str {
    match code {
        DownloadErrorCode::ModelNotFound => "model_not_found",
        DownloadErrorCode::NoSpace => "no_space",
        DownloadErrorCode::WrongFile => "wrong_file",
        DownloadErrorCode::ModelUnsupported => "model_unsupported",
        DownloadErrorCode::SourceRefused => "source_refused",
        DownloadErrorCode::SourceUnreachable => "source_unreachable",
        DownloadErrorCode::Interrupted => "interrupted",
        DownloadErrorCode::DownloadFailed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::config::PoolConfig;
    use pool_core::kit::client::ApiClient;
    use pool_core::kit::home::Home;
    use pool_core::kit::service::{Load, Places, Shutdown};
    use pool_core::lifecycle::Lifecycle;

    #[tokio::test] // [POOLD-024]
    async fn a_download_that_panics_is_over_for_who_follows_it_and_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.ensure().unwrap();
        let url = "http://127.0.0.1:1";
        let pool = Arc::new(Pool::new(
            Lifecycle::new(home, PoolConfig::default()).unwrap(),
            url.to_owned(),
            ApiClient::new(url, None).unwrap(),
            Load::new(Places::default()),
            Shutdown::manual(),
        ));
        let model: ModelRef = "smollm2-135m".parse().unwrap();
        let (_, begun) = follow_or_begin(&pool, &model);
        let (mut follower, second) = follow_or_begin(&pool, &model);
        assert!(second.is_none(), "a second download started");
        let begun = begun.unwrap();
        let panicked = tokio::spawn(async move {
            begun.tell.send_replace(None);
            panic!("a fault");
        });
        assert!(panicked.await.unwrap_err().is_panic());

        let last = |event: &Latest| event.as_ref().is_some_and(DownloadEvent::is_last);
        let heard = timeout(Duration::from_secs(30), follower.wait_for(last)).await;
        let heard = heard.expect("an event in time").expect("the final event");
        let Some(DownloadEvent::Error(failure)) = heard.clone() else {
            panic!("{heard:?}")
        };
        assert_eq!(failure.code, DownloadErrorCode::DownloadFailed);
        let (_, next) = follow_or_begin(&pool, &model);
        assert!(
            next.is_some(),
            "the next request follows a download that has ended"
        );
    }
}
