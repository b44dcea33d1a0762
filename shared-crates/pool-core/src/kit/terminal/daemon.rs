//! Starting, stopping and watching a daemon on this machine.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt as _, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{CliError, Exit};
use crate::kit::client::ApiClient;
use crate::kit::process::{ProcessIdentity, Signal, SignalOutcome};
use crate::kit::programs;
use crate::kit::run_files::{self, PidRecord};
use crate::kit::units::human_duration;

/// Interval at which a start checks whether the daemon is up.
const POLL: Duration = Duration::from_millis(25);
/// Time limit for one call of `/health`.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// Log lines shown after a failed start.
const FAILURE_LINES: usize = 20;
/// Most bytes read from the end of a log to find its last lines.
const TAIL_BYTES: u64 = 1 << 20;
/// Time limit for a process to end after SIGKILL. The kernel may have to write its memory out first.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A daemon to start.
#[derive(Debug, Clone)]
pub struct DaemonSpec {
    /// Path of the binary.
    pub program: PathBuf,
    /// The daemon's name, for messages.
    pub name: &'static str,
    /// Folder in which the daemon writes `pid.json` and `addr`.
    pub state_dir: PathBuf,
    /// File to which the daemon's output is appended.
    pub log_file: PathBuf,
    /// The daemon's arguments. Secrets belong in `env`.
    pub args: Vec<OsString>,
    /// Environment variables, in addition to those of this process.
    pub env: Vec<(OsString, OsString)>,
    /// Time limit until `/health` answers.
    pub start_timeout: Duration,
}

/// A daemon that is running, as its state folder describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningDaemon {
    /// Identity of the daemon's process.
    pub process: ProcessIdentity,
    /// Version that the daemon wrote into `pid.json`.
    pub version: String,
    /// URL at which the daemon answers on this machine.
    pub url: String,
    /// True if [`start`] found the daemon running, or another process started it in the meantime.
    pub already_running: bool,
}

/// Outcome of a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// The daemon was not running.
    NotRunning,
    /// The daemon ended after SIGTERM.
    Orderly {
        /// The former process id.
        pid: u32,
    },
    /// The daemon did not end in time and was killed.
    Killed {
        /// The former process id.
        pid: u32,
    },
}

/// Starts a daemon and returns when its `/health` answers.
///
/// The daemon gets a session of its own, so that neither Ctrl-C nor a closed terminal reaches it. A daemon that is
/// already running is not started again. A daemon that fails to come up is ended, and the error shows the last lines of
/// its log.
pub async fn start(spec: &DaemonSpec) -> Result<RunningDaemon, CliError> {
    if let Some(running) = running_already(spec).await? {
        return Ok(running);
    }
    launch(spec, true).await
}

/// Like [`start`], but ignores a running, frozen daemon of the same state folder. The new daemon decides by its arguments
/// whether to take over the folder or to refuse.
pub async fn start_beside(spec: &DaemonSpec) -> Result<RunningDaemon, CliError> {
    launch(spec, false).await
}

/// Starts the daemon and waits until it answers. With `any_will_do`, accepts a daemon that another process started in the
/// meantime.
async fn launch(spec: &DaemonSpec, any_will_do: bool) -> Result<RunningDaemon, CliError> {
    let could_not = |what: &str, error: &io::Error| {
        CliError::caused(Exit::Failed, format!("could not {what}"), error)
    };
    let log = open_log(&spec.log_file)
        .map_err(|error| could_not(&format!("open the log {}", spec.log_file.display()), &error))?;
    // Earlier starts have left lines in the log; only later lines explain this one.
    let log_start = log.metadata()?.len();
    let mut child = spawn(spec, log)
        .map_err(|error| could_not(&format!("start {}", spec.program.display()), &error))?;

    let deadline = Instant::now() + spec.start_timeout;
    loop {
        if let Some(exit) = child.try_wait()? {
            // Another start may have won the race for the state folder, which is just as good for the user.
            if let Some(running) = status(&spec.state_dir).filter(|_| any_will_do) {
                return Ok(RunningDaemon {
                    already_running: true,
                    ..running
                });
            }
            let message = format!("{} exited during startup ({exit})", spec.name);
            return Err(with_log(
                CliError::new(Exit::Failed, message),
                &spec.log_file,
                log_start,
            ));
        }
        // The record of another process, for example of a killed daemon, says nothing about this start.
        if let Some(running) =
            status(&spec.state_dir).filter(|running| running.process.pid == child.id())
            && answers(&running.url).await
        {
            return Ok(running);
        }
        if Instant::now() >= deadline {
            end(&mut child);
            let message = format!(
                "{} did not answer within {}",
                spec.name,
                human_duration(spec.start_timeout)
            );
            return Err(with_log(
                CliError::new(Exit::Failed, message),
                &spec.log_file,
                log_start,
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Returns the daemon of the state folder, or `None` if no daemon is running. Waits a moment for a killed daemon to end.
/// Fails if the daemon is running but does not answer, because a second one could not start.
async fn running_already(spec: &DaemonSpec) -> Result<Option<RunningDaemon>, CliError> {
    let Some(running) = status(&spec.state_dir) else {
        return Ok(None);
    };
    if answers(&running.url).await {
        return Ok(Some(RunningDaemon {
            already_running: true,
            ..running
        }));
    }
    let pid = running.process.pid;
    if gone(&running.process, HEALTH_TIMEOUT).await? {
        return Ok(None);
    }
    let message = format!(
        "{} is running (pid {pid}) but does not answer at {}",
        spec.name, running.url
    );
    Err(CliError::new(Exit::Unreachable, message)
        .hint("look for the reason in its log; stop it, then start it again"))
}

/// Sends SIGTERM to the daemon of a state folder, waits for at most `timeout`, and then kills it.
pub async fn stop(state_dir: &Path, name: &str, timeout: Duration) -> Result<Stopped, CliError> {
    let Some(process) = PidRecord::read(state_dir).map(|record| record.process) else {
        return Ok(Stopped::NotRunning);
    };
    let pid = process.pid;
    let failed = |error: io::Error| {
        CliError::caused(
            Exit::Failed,
            format!("could not stop {name} (pid {pid})"),
            &error,
        )
    };
    if process.signal(Signal::TERM).map_err(failed)? == SignalOutcome::Gone {
        return Ok(Stopped::NotRunning);
    }
    if gone(&process, timeout).await.map_err(failed)? {
        return Ok(Stopped::Orderly { pid });
    }
    process.signal(Signal::KILL).map_err(failed)?;
    if gone(&process, KILL_TIMEOUT).await.map_err(failed)? {
        return Ok(Stopped::Killed { pid });
    }
    Err(CliError::new(
        Exit::Failed,
        format!("{name} (pid {pid}) is still running after SIGKILL"),
    )
    .hint(
        "it is stuck waiting for a device or a network disk: wait for that, or restart the machine",
    ))
}

/// Returns the daemon of a state folder, if one is running and has published its address.
pub fn status(state_dir: &Path) -> Option<RunningDaemon> {
    let record = PidRecord::read(state_dir)?;
    let url = run_files::local_url(state_dir)?;
    Some(RunningDaemon {
        process: record.process,
        version: record.version,
        url,
        already_running: false,
    })
}

/// Returns the path of one of our binaries: in the folder of this program, otherwise on the `PATH`.
pub fn find_sibling(name: &str) -> Result<PathBuf, CliError> {
    programs::find_beside_or_on_path(name).ok_or_else(|| {
        let package = match name {
            "llorch" => "llorch-ctl",
            "llorch-pool" => "pool-ctl",
            other => other,
        };
        CliError::new(
            Exit::Failed,
            format!("could not find `{name}` next to this program or on the PATH"),
        )
        .hint(format!("in a checkout: cargo build --release -p {package}"))
    })
}

/// Returns the last `lines` lines of a log; an incomplete last line counts. If a new log file has fewer lines, the rest
/// comes from the previous file.
pub fn tail(path: &Path, lines: usize) -> io::Result<String> {
    let newest = tail_from(path, lines, 0)?;
    let missing = lines.saturating_sub(newest.lines().count());
    let earlier = match missing {
        0 => String::new(),
        missing => tail_from(&numbered(path, 1), missing, 0).unwrap_or_default(),
    };
    Ok(earlier + &newest)
}

/// Returns the path of the `number`-th previous log file.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{number}"));
    name.into()
}

/// Returns whether another file has replaced `file` at `path`.
fn is_replaced(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    // A renamed file without a successor is still being written to.
    let there = path.metadata();
    Ok(there.is_ok_and(|there| (there.dev(), there.ino()) != (ours.dev(), ours.ino())))
}

/// Prints the last `lines` lines of a log, then follows it, even when a new file replaces it.
///
/// Returns after the last line once `is_over` returns true, and fails when `print` does. Otherwise runs until the future
/// is dropped.
pub async fn follow(
    path: &Path,
    lines: usize,
    is_over: impl Fn() -> bool,
    mut print: impl FnMut(&str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut file = File::open(path)?;
    let mut seen = file.metadata()?.len();
    print(&tail(path, lines)?)?;
    let mut pending = Vec::new();
    loop {
        // Asked before reading, so that everything written by then is printed.
        let over = is_over();
        // Checked before reading, so that the old file's last lines are printed too.
        let replaced = is_replaced(&file, path)?;
        let length = file.metadata()?.len();
        if length < seen {
            // The log was truncated, so all of its content is new.
            seen = 0;
        }
        file.seek(SeekFrom::Start(seen))?;
        seen += (&mut file).take(TAIL_BYTES).read_to_end(&mut pending)? as u64;
        // Print complete lines only, so that no multi-byte character is split.
        if let Some(end) = pending.iter().rposition(|byte| *byte == b'\n') {
            let complete: Vec<u8> = pending.drain(..=end).collect();
            print(&String::from_utf8_lossy(&complete))?;
        } else if replaced {
            if !pending.is_empty() {
                print(&(String::from_utf8_lossy(&pending) + "\n"))?;
                pending.clear();
            }
            (file, seen) = (File::open(path)?, 0);
        } else if over {
            return match pending.is_empty() {
                true => Ok(()),
                false => print(&(String::from_utf8_lossy(&pending) + "\n")),
            };
        } else {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

fn spawn(spec: &DaemonSpec, log: File) -> io::Result<Child> {
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        // The daemon manages the file: it starts a new one at a size limit and reopens it on SIGHUP.
        .arg("--log-file")
        .arg(&spec.log_file)
        .envs(absolute_folders()?)
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: only async-signal-safe calls are allowed between fork and exec. `setsid` is a bare system call, and
    // converting its error number to an `io::Error` does not allocate.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into));
    }
    command.spawn()
}

async fn answers(url: &str) -> bool {
    match ApiClient::new(url, None) {
        Ok(client) => client
            .with_answer_timeout(HEALTH_TIMEOUT)
            .get_text("/health")
            .await
            .is_ok(),
        Err(_) => false,
    }
}

/// Ends a daemon that did not come up: with SIGTERM, and with SIGKILL if that takes more than two seconds.
fn end(child: &mut Child) {
    if let Ok(Some(process)) = ProcessIdentity::of(child.id()) {
        let _ = process.signal(Signal::TERM);
        let _ = process.wait_gone(Duration::from_secs(2));
    }
    let _ = child.kill();
    let _ = child.wait();
}

async fn gone(process: &ProcessIdentity, timeout: Duration) -> io::Result<bool> {
    let process = process.clone();
    tokio::task::spawn_blocking(move || process.wait_gone(timeout))
        .await
        .map_err(io::Error::other)?
}

fn with_log(error: CliError, log: &Path, start: u64) -> CliError {
    let hint = format!("see the full log at {}", log.display());
    // If a new log file was started in the meantime, it has no lines of earlier starts.
    let begun_again = log.metadata().is_ok_and(|log| log.len() < start);
    let start = if begun_again { 0 } else { start };
    match tail_from(log, FAILURE_LINES, start) {
        Ok(lines) if lines.trim().is_empty() => error.cause("it wrote nothing to its log"),
        Ok(lines) => error
            .cause(format!("its log ends with:\n{}", lines.trim_end()))
            .hint(hint),
        Err(_) => error,
    }
}

fn tail_from(path: &Path, lines: usize, start: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(
        start.max(length.saturating_sub(TAIL_BYTES)).min(length),
    ))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let kept: Vec<&str> = text.split_inclusive('\n').collect();
    Ok(kept[kept.len().saturating_sub(lines)..].concat())
}

/// Returns the variables that name folders, made absolute: a relative path would name another folder in a process with
/// another working directory, such as a worker.
fn absolute_folders() -> io::Result<Vec<(&'static str, PathBuf)>> {
    ["LLORCH_HOME", "LLORCH_MODELS_DIR"]
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| Ok((name, std::path::absolute(value)?)))
        .collect()
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    /// Returns a daemon that is a shell script, with state and log below `dir`.
    fn script(dir: &Path, body: &str) -> DaemonSpec {
        DaemonSpec {
            program: "/bin/sh".into(),
            name: "testd",
            state_dir: dir.join("state"),
            log_file: dir.join("logs/testd.log"),
            args: vec!["-c".into(), body.into()],
            env: vec![("STATE".into(), dir.join("state").into())],
            start_timeout: Duration::from_secs(20),
        }
    }

    #[tokio::test] // [POOLCORE-120]
    async fn a_daemon_that_fails_to_start_shows_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let spec = script(dir.path(), "seq 1 30; echo 'the port is taken' >&2; exit 7");
        fs::create_dir(dir.path().join("logs")).unwrap();
        fs::write(&spec.log_file, "a line of an earlier start\n").unwrap();

        let error = start(&spec).await.unwrap_err();
        assert_eq!(
            error.message,
            "testd exited during startup (exit status: 7)"
        );
        let shown: Vec<_> = error.causes[0].lines().collect();
        assert_eq!(shown.len(), 1 + FAILURE_LINES);
        assert_eq!((shown[1], shown[20]), ("12", "the port is taken"));
        assert!(error.hint.unwrap().contains("testd.log"));

        let silent = start(&script(dir.path(), "exit 1")).await.unwrap_err();
        assert_eq!(silent.causes, ["it wrote nothing to its log"]);
        let missing = DaemonSpec {
            program: "/no/such/daemon".into(),
            ..spec
        };
        assert_eq!(
            start(&missing).await.unwrap_err().message,
            "could not start /no/such/daemon"
        );
    }

    #[tokio::test] // [POOLCORE-121]
    async fn a_daemon_that_does_not_answer_in_time_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let mut spec = script(
            dir.path(),
            "echo $$ > $STATE/pid; echo waiting; exec sleep 60",
        );
        spec.start_timeout = Duration::from_millis(500);
        let error = start(&spec).await.unwrap_err();
        assert!(
            error.message.starts_with("testd did not answer within"),
            "{}",
            error.message
        );
        assert_eq!(error.causes, ["its log ends with:\nwaiting"]);
        let pid = fs::read_to_string(dir.path().join("state/pid")).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[tokio::test] // [POOLCORE-122]
    async fn stop_asks_first_and_kills_what_does_not_listen() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        fs::create_dir(&state).unwrap();
        assert_eq!(
            stop(&state, "testd", Duration::ZERO).await.unwrap(),
            Stopped::NotRunning
        );

        for (body, stubborn) in [
            ("exec sleep 60", false),
            ("trap '' TERM; echo $$ > $STATE/pid; exec sleep 60", true),
        ] {
            let mut child = spawn(
                &script(dir.path(), body),
                open_log(&dir.path().join("log")).unwrap(),
            )
            .unwrap();
            let pid = child.id();
            while stubborn && fs::read_to_string(state.join("pid")).is_err() {
                tokio::time::sleep(POLL).await;
            }
            let record = PidRecord {
                process: ProcessIdentity::of(pid).unwrap().unwrap(),
                version: "1".into(),
            };
            fs::write(
                state.join(run_files::PID),
                serde_json::to_vec(&record).unwrap(),
            )
            .unwrap();
            fs::write(state.join(run_files::ADDR), "http://127.0.0.1:1\n").unwrap();
            assert_eq!(status(&state).unwrap().url, "http://127.0.0.1:1");
            // The daemon leads its own session, so a signal to our terminal's process group does not reach it.
            let session = rustix::process::getsid(rustix::process::Pid::from_raw(
                i32::try_from(pid).unwrap(),
            ))
            .unwrap();
            assert_eq!(session.as_raw_nonzero().get().unsigned_abs(), pid);

            let outcome = stop(
                &state,
                "testd",
                Duration::from_millis(if stubborn { 200 } else { 10_000 }),
            )
            .await
            .unwrap();
            assert_eq!(
                outcome,
                if stubborn {
                    Stopped::Killed { pid }
                } else {
                    Stopped::Orderly { pid }
                }
            );
            assert_eq!(status(&state), None);
            child.wait().unwrap();
        }
        // A record of a process that has ended stops nothing.
        assert_eq!(
            stop(&state, "testd", Duration::ZERO).await.unwrap(),
            Stopped::NotRunning
        );
    }

    #[test]
    fn a_sibling_that_is_missing_comes_with_the_command_that_builds_it() {
        let error = find_sibling("llorch-candled-none").unwrap_err();
        assert_eq!(
            error.hint.unwrap(),
            "in a checkout: cargo build --release -p llorch-candled-none"
        );
    }

    #[tokio::test] // [POOLCORE-123]
    async fn a_log_is_shown_from_its_end_and_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "one\ntwo\nthree\n").unwrap();
        assert_eq!(tail(&path, 2).unwrap(), "two\nthree\n");
        assert_eq!(tail(&path, 9).unwrap(), "one\ntwo\nthree\n");

        let mut shown = String::new();
        let mut appended = false;
        let result = follow(
            &path,
            1,
            || false,
            |text| {
                shown.push_str(text);
                if !appended {
                    appended = true;
                    OpenOptions::new()
                        .append(true)
                        .open(&path)?
                        .write_all("vier é\nhalf".as_bytes())?;
                    return Ok(());
                }
                Err(CliError::new(Exit::Interrupted, "enough"))
            },
        );
        assert_eq!(result.await.unwrap_err().exit, Exit::Interrupted);
        assert_eq!(shown, "three\nvier é\n");
    }

    #[tokio::test] // [POOLCORE-123] [POOLCORE-075]
    async fn a_log_is_followed_when_it_is_renamed_and_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "one\n").unwrap();
        let mut shown = String::new();
        let mut turned = false;
        let result = follow(
            &path,
            9,
            || false,
            |text| {
                shown.push_str(text);
                if !std::mem::replace(&mut turned, true) {
                    OpenOptions::new()
                        .append(true)
                        .open(&path)?
                        .write_all(b"two\n")?;
                    fs::rename(&path, numbered(&path, 1))?;
                    fs::write(&path, "three\n")?;
                }
                match text.ends_with("three\n") {
                    true => Err(CliError::new(Exit::Interrupted, "enough")),
                    false => Ok(()),
                }
            },
        );
        assert_eq!(result.await.unwrap_err().exit, Exit::Interrupted);
        assert_eq!(shown, "one\ntwo\nthree\n");
        assert_eq!(tail(&path, 2).unwrap(), "two\nthree\n");
        assert_eq!(tail(&path, 1).unwrap(), "three\n");
    }
}
