//! The results of a batch: one JSON object per line, appended as jobs end.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::Usage;
use pool_core::kit::terminal::{CliError, Exit, human_duration, say};
use pool_core::kit::wire::ErrorBody;
use serde::{Deserialize, Serialize};

use super::tasks::Task;

/// Status of a task that the orchestrator refused.
const REFUSED: &str = "refused";

/// The result of one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchResult {
    /// Line in the file of tasks, from 1.
    line: usize,
    /// Idempotency key, which identifies the task across runs.
    key: String,
    /// Id of the job; null if the task was refused.
    id: Option<JobId>,
    /// The job's terminal state, or `refused`.
    status: String,
    /// Text of the job, perhaps incomplete; null if the task was refused.
    text: Option<String>,
    /// Figures of a completed job.
    usage: Option<Usage>,
    /// Error of a task that was refused or did not complete.
    error: Option<Fault>,
}

/// The reason why a task did not complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Fault {
    code: String,
    message: String,
}

impl BatchResult {
    /// Returns the result of a job that is over.
    pub fn of(task: &Task, job: TaskView) -> Self {
        Self {
            line: task.line,
            key: task.key.clone(),
            id: Some(job.id),
            status: job.status.to_string(),
            text: Some(job.text),
            usage: job.usage,
            error: job.error.map(|error| Fault {
                code: error.code.as_str().to_owned(),
                message: error.message,
            }),
        }
    }

    /// Returns the result of a task that the orchestrator refused.
    pub fn refused(task: &Task, error: &ErrorBody) -> Self {
        Self {
            line: task.line,
            key: task.key.clone(),
            id: None,
            status: REFUSED.to_owned(),
            text: None,
            usage: None,
            error: Some(Fault {
                code: error.code.clone(),
                message: error.message.clone(),
            }),
        }
    }
}

/// The destination of results, and the results of earlier runs.
#[derive(Debug)]
pub struct Results {
    /// Path and open file; `None` for standard output.
    file: Option<(PathBuf, File)>,
    before: HashMap<String, BatchResult>,
}

impl Results {
    /// Opens the file, if any, and reads the results of earlier runs. Removes what they did not finish: a half-written line,
    /// and refused tasks, which are submitted again.
    pub fn open(path: Option<PathBuf>) -> Result<Self, CliError> {
        let Some(path) = path else {
            return Ok(Self {
                file: None,
                before: HashMap::new(),
            });
        };
        let failed = |error: io::Error| {
            CliError::caused(
                Exit::Usage,
                format!("could not use {}", path.display()),
                &error,
            )
        };
        let mut file = alone(&path)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        let before = earlier(&text, &path)?;
        let kept: Vec<&BatchResult> = before.iter().filter(|record| record.id.is_some()).collect();
        if kept.len() != text.lines().count() || !text.is_empty() && !text.ends_with('\n') {
            let mut whole = String::new();
            for record in &kept {
                whole += &serde_json::to_string(record).map_err(io::Error::from)?;
                whole.push('\n');
            }
            file = replaced(&path, &whole).map_err(failed)?;
        }
        let before = kept
            .into_iter()
            .map(|record| (record.key.clone(), record.clone()))
            .collect();
        Ok(Self {
            file: Some((path, file)),
            before,
        })
    }

    /// Returns whether an earlier run has the result of a task.
    pub fn has(&self, key: &str) -> bool {
        self.before.contains_key(key)
    }

    /// Returns the result that an earlier run has of a task.
    pub fn of(&self, key: &str) -> Option<&BatchResult> {
        self.before.get(key)
    }

    /// Writes a result at once, so that it survives the end of this process.
    pub fn add(&mut self, record: &BatchResult) -> Result<(), CliError> {
        let line = serde_json::to_string(record).map_err(io::Error::from)?;
        match &mut self.file {
            None => say(line),
            Some((path, file)) => file
                .write_all(format!("{line}\n").as_bytes())
                .map_err(|error| {
                    CliError::caused(
                        Exit::Failed,
                        format!("could not write {}", path.display()),
                        &error,
                    )
                    .hint("repeat the command to continue with the remaining tasks")
                }),
        }
    }

    /// Returns the hint how to continue an interrupted run.
    pub fn how_to_go_on(&self) -> String {
        match &self.file {
            Some((path, _)) => format!(
                "results so far are in {}; repeat the command to continue with the rest, including jobs still running",
                path.display()
            ),
            None => "repeat the command to get the same jobs, so that no work is done twice; \
                with --output it continues where it stopped"
                .to_owned(),
        }
    }
}

/// Opens the file under an exclusive lock: two batches would overwrite each other's results.
fn alone(path: &Path) -> Result<File, CliError> {
    let what = || format!("could not use {}", path.display());
    let failed = |error: io::Error| CliError::caused(Exit::Usage, what(), &error);
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    loop {
        // Reading anything but a regular file may never end.
        if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            let what = format!("{} is not a regular file", path.display());
            return Err(CliError::new(Exit::Usage, what)
                .hint("leave out --output to write the results to standard output"));
        }
        let file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let what = format!("another batch writes to {}", path.display());
                return Err(CliError::new(Exit::Usage, what)
                    .hint("wait for it to end, or name another --output"));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let (ours, there) = (file.metadata(), fs::metadata(path));
        let (ours, there) = (ours.map_err(failed)?, there.map_err(failed)?);
        // Otherwise the process that held the lock has replaced the file.
        if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
            return Ok(file);
        }
    }
}

/// Replaces the file at `path`, or the target of a symbolic link there, with one that has this text. The new file is locked
/// before it takes its place.
fn replaced(path: &Path, text: &str) -> io::Result<File> {
    let path = fs::canonicalize(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut temp = tempfile::Builder::new()
        .prefix(".batch-")
        .append(true)
        .tempfile_in(folder)?;
    temp.as_file().try_lock()?;
    temp.write_all(text.as_bytes())?;
    temp.as_file().sync_all()?;
    temp.persist(&path).map_err(|error| error.error)
}

/// Parses the file of earlier runs. The last line may be incomplete; any other line that is not a result means that the file
/// has another purpose, and must not be touched.
fn earlier(text: &str, path: &Path) -> Result<Vec<BatchResult>, CliError> {
    let mut records = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(_) if !line.ends_with('\n') => {}
            Err(error) => {
                return Err(CliError::caused(
                    Exit::Usage,
                    format!(
                        "line {} of {} is not a batch result",
                        index + 1,
                        path.display()
                    ),
                    &error,
                )
                .hint("name another --output; this file was not changed"));
            }
        }
    }
    Ok(records)
}

/// Counts of a run's results.
#[derive(Debug)]
pub struct Tally {
    completed: u64,
    unfinished: u64,
    refused: u64,
    tokens: u64,
    since: Instant,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            completed: 0,
            unfinished: 0,
            refused: 0,
            tokens: 0,
            since: Instant::now(),
        }
    }
}

impl Tally {
    /// Counts a result.
    pub fn count(&mut self, record: &BatchResult) {
        match record.status.as_str() {
            "completed" => self.completed += 1,
            REFUSED => self.refused += 1,
            _ => self.unfinished += 1,
        }
        self.tokens += record
            .usage
            .as_ref()
            .map_or(0, |usage| u64::from(usage.tokens_out));
    }

    /// Returns the number of tasks that are over.
    pub fn jobs(&self) -> u64 {
        self.completed + self.trouble()
    }

    /// Returns the number of tasks that did not complete.
    pub fn trouble(&self) -> u64 {
        self.unfinished + self.refused
    }

    /// Returns the exit code of the run. The worst outcome decides.
    pub fn exit(&self) -> Exit {
        if self.refused > 0 {
            Exit::Refused
        } else if self.unfinished > 0 {
            Exit::JobFailed
        } else {
            Exit::Done
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = self.since.elapsed();
        write!(f, "{} jobs: {} completed", self.jobs(), self.completed)?;
        for (count, what) in [
            (self.unfinished, "failed or ended otherwise"),
            (self.refused, "refused"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        let took = took.max(Duration::from_millis(1));
        write!(f, "; {} tokens in {}", self.tokens, human_duration(took))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(line: usize, refused: bool) -> BatchResult {
        let id = "job-01900000-0000-7000-8000-000000000001";
        BatchResult {
            line,
            key: format!("batch-{line}"),
            id: (!refused).then(|| id.parse().unwrap()),
            status: if refused { REFUSED } else { "completed" }.to_owned(),
            text: Some("t\n".into()),
            usage: None,
            error: None,
        }
    }

    #[test] // [LLORCH-072]
    fn what_an_earlier_run_finished_is_kept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let line = |record: &BatchResult| serde_json::to_string(record).unwrap() + "\n";
        let (first, third) = (line(&record(1, false)), line(&record(3, false)));
        // A refused task, and a line that a kill cut off.
        let text = format!("{first}{}{third}{}", line(&record(2, true)), &third[..30]);
        fs::write(&path, text).unwrap();
        let mut results = Results::open(Some(path.clone())).unwrap();
        assert!(results.has("batch-1") && results.has("batch-3") && !results.has("batch-2"));
        results.add(&record(2, false)).unwrap();
        let whole = format!("{first}{third}{}", line(&record(2, false)));
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }

    #[test] // [LLORCH-072]
    fn two_batches_do_not_write_to_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("out.jsonl"), folder.path().join("link"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        // The refused task makes the first batch replace the file.
        let line = serde_json::to_string(&record(2, true)).unwrap() + "\n";
        fs::write(&path, line).unwrap();
        let mut first = Results::open(Some(link.clone())).unwrap();
        for name in [&path, &link] {
            let error = Results::open(Some(name.clone())).unwrap_err();
            assert!(error.to_string().contains("another batch"), "{error}");
        }
        first.add(&record(1, false)).unwrap();
        drop(first);
        assert!(link.is_symlink());
        assert!(Results::open(Some(path)).unwrap().has("batch-1"));

        let error = Results::open(Some("/dev/full".into())).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }

    #[test] // [LLORCH-072]
    fn a_file_of_something_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thesis.txt");
        fs::write(&path, "Chapter 1\n").unwrap();
        let error = Results::open(Some(path.clone())).unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        assert_eq!(fs::read_to_string(&path).unwrap(), "Chapter 1\n");
    }

    #[test] // [LLORCH-073]
    fn the_worst_decides_the_exit_code() {
        let mut tally = Tally::default();
        tally.count(&record(1, false));
        assert_eq!(tally.exit(), Exit::Done);
        tally.count(&BatchResult {
            status: "expired".into(),
            ..record(2, false)
        });
        assert_eq!(tally.exit(), Exit::JobFailed);
        tally.count(&record(3, true));
        assert_eq!(tally.exit(), Exit::Refused);
        assert!(tally.to_string().starts_with(
            "3 jobs: 1 completed, 1 failed or ended otherwise, 1 refused; 0 tokens in "
        ));
    }
}
