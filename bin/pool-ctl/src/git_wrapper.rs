//! The real `git`, restricted.
//!
//! The content of a repository comes from others: names, addresses, attributes and, if another user made the checkout, its
//! settings and hooks. Therefore git is started with argument lists only; hooks, monitors, pagers, editors and prompts are off;
//! git may use only the protocols that the call names; and settings of the repository that would run a program are refused
//! before any command reads them ([`trust`]).

mod parse;
pub mod repo;
pub mod trust;

use std::cell::Cell;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pool_core::kit::programs::find_on_path;
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::progress::Progress;
use pool_core::kit::terminal::{CliError, Exit, sanitize};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::tool;
use trust::Transport;

/// Maximum size of git's standard output in bytes: the index of a checkout with half a million files.
const ANSWER_BYTES: usize = 64 << 20;
/// Longest silence of a remote before the call is given up.
const SILENCE: Duration = Duration::from_secs(300);
/// Longest wait for the output of a git that has ended: an ssh that stays in the background holds the pipe open.
const GRACE: Duration = Duration::from_secs(1);
/// Number of last lines of standard error that are kept, and the maximum bytes of each.
const TAIL_LINES: usize = 40;
const LINE_BYTES: usize = 2048;

/// Settings that override all others. Each keeps git from running a program or from surprising the caller.
const SETTINGS: [&str; 13] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.pager=cat",
    "core.editor=true",
    "core.askPass=",
    "credential.interactive=false",
    "safe.bareRepository=explicit",
    // This program moves submodules itself, one at a time, after a check of each one's settings.
    "submodule.recurse=false",
    "log.showSignature=false",
    "color.ui=false",
    // Maintenance by git would continue in the background after the command has ended.
    "gc.auto=0",
    "maintenance.auto=false",
    // With `http.lowSpeedTime`: a transfer that stalls for a minute is given up.
    "http.lowSpeedLimit=1",
];

/// The caller's own `GIT_*` variables that reach git: the places of the user's settings, and the ways to reach a host. Others,
/// such as `GIT_DIR`, would point git at another repository.
const KEPT_VARIABLES: [&str; 13] = [
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
    "GIT_CONFIG_NOSYSTEM",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    "GIT_SSH",
    "GIT_SSH_COMMAND",
    "GIT_SSH_VARIANT",
    "GIT_SSL_CAINFO",
    "GIT_SSL_CAPATH",
    "GIT_SSL_CERT",
    "GIT_SSL_KEY",
    "GIT_HTTP_PROXY_AUTHMETHOD",
];

/// The ssh command that never prompts, and that notices a peer that is gone.
const SSH: &str =
    "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4";

/// Returns the value of `GIT_SSH_COMMAND`: the program that the user named in `GIT_SSH`, or else [`SSH`]. `GIT_SSH_COMMAND`
/// overrides `core.sshCommand`, so a repository's own command never runs; `GIT_SSH` would not override it.
fn ssh(of_user: Option<String>) -> String {
    match of_user {
        Some(program) if !program.is_empty() => parse::quoted(&program),
        _ => SSH.to_owned(),
    }
}

/// Failure of a git command.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// Failed start of git.
    #[error("could not start `{}`", program.display())]
    Start {
        /// Path of the program.
        program: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// Command that ended with a failure.
    #[error("git {action} failed: {reason}")]
    Failed {
        /// Name of the git command, such as `fetch`.
        action: String,
        /// Exit status of git.
        status: ExitStatus,
        /// Kind of failure, as recognized from git's messages.
        why: Why,
        /// Main message of git.
        reason: String,
        /// Other messages of git.
        more: Vec<String>,
    },
    /// Output above the limit.
    #[error("the output of git {action} exceeds {} MiB", ANSWER_BYTES >> 20)]
    TooLong {
        /// Name of the git command.
        action: String,
    },
    /// Remote that stopped sending.
    #[error(
        "git {action}: the remote sent nothing for {}",
        pool_core::kit::units::human_seconds(i64::try_from(*seconds).unwrap_or(i64::MAX))
    )]
    Silent {
        /// Name of the git command.
        action: String,
        /// Length of the silence in seconds.
        seconds: u64,
    },
    /// Interruption of this process, which ended git as well.
    #[error("interrupted")]
    Interrupted,
    /// Folder outside any checkout.
    #[error("{} is not in a git checkout", path.display())]
    NotACheckout {
        /// Path of the folder.
        path: PathBuf,
    },
    /// Repository whose own settings put its files elsewhere.
    #[error("the repository at {} says that its files are in {}", path.display(), root.display())]
    Elsewhere {
        /// Path at which the files should be.
        path: PathBuf,
        /// Root of the files according to the repository.
        root: PathBuf,
    },
    /// Repository whose own settings name programs or outside files, or accept any server as its remote.
    #[error("the settings of the repository {} would run programs, write files here, or trust any server: {}", path.display(), keys.join(", "))]
    ReachesOut {
        /// Root of the checkout.
        path: PathBuf,
        /// Names of the settings.
        keys: Vec<String>,
    },
    /// Remote or submodule with an address, name or path that may not be used.
    #[error("{what} {reason}")]
    Untrusted {
        /// Subject of the message, such as a remote and its name.
        what: String,
        /// Rest of the message, such as `has no address`.
        reason: String,
    },
    /// Output that can't be parsed.
    #[error("unexpected output of git {action}: {answer:?}")]
    Strange {
        /// Name of the git command.
        action: String,
        /// Beginning of the output.
        answer: String,
    },
}

/// Kinds of failure, recognized by git's own messages, which are requested in English.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// Lock file, by path, that another git holds or that a killed git left.
    Locked(String),
    /// Checkout of another user.
    Foreign,
    /// Credentials that the remote requires but that can't be asked for here, or that the remote refuses.
    Credentials,
    /// Remote that can't be reached, or that dropped the connection.
    Unreachable,
    /// Branch or commit that the remote does not have.
    Missing,
    /// Protocol that is not allowed.
    Protocol,
    /// Any other failure.
    Other,
}

impl GitError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotACheckout { .. } => Exit::NotFound,
            Self::Elsewhere { .. } | Self::ReachesOut { .. } | Self::Untrusted { .. } => {
                Exit::Refused
            }
            Self::Silent { .. } => Exit::Unreachable,
            Self::Interrupted => Exit::Interrupted,
            Self::Failed { why, .. } => match why {
                Why::Locked(_) | Why::Foreign | Why::Protocol => Exit::Refused,
                Why::Credentials | Why::Unreachable => Exit::Unreachable,
                Why::Missing => Exit::NotFound,
                Why::Other => Exit::Failed,
            },
            Self::Start { .. } | Self::TooLong { .. } | Self::Strange { .. } => Exit::Failed,
        }
    }

    /// Returns what to try next; `None` if there is nothing to try.
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotACheckout { .. } => {
                "change to the checkout, name it with `--repo PATH`, or set `repo_path` in pool-managerd.toml".into()
            }
            Self::ReachesOut { .. } => {
                "list them with `git config --local --list`; move those you want to keep to your own \
                 settings (`git config --global`)".into()
            }
            Self::Elsewhere { .. } => "check `core.worktree` in the repository's settings".into(),
            Self::Failed { why, .. } => match why {
                Why::Locked(path) => format!(
                    "wait for the other git to finish; if none is running (`pgrep -a git`), one was killed: rm {}",
                    parse::quoted(path)
                ),
                Why::Foreign => {
                    "run this as the user who owns the checkout, or trust it with `git config --global --add safe.directory PATH`".into()
                }
                Why::Credentials => {
                    "no password prompt is shown here: use an ssh key (ssh-agent) or a credential helper \
                     (`git config --global credential.helper`), and accept the host's key with ssh once".into()
                }
                Why::Unreachable => "check the network and the address: `git remote -v`".into(),
                Why::Missing => "check the branch's name, here and on the remote: `git branch -vv`".into(),
                Why::Protocol => {
                    "use https, ssh or the protocol of the checkout's own remote".into()
                }
                Why::Other => return None,
            },
            Self::Silent { .. } => "check the network, and try again".into(),
            _ => return None,
        })
    }

    /// Returns the error for the user. `state` describes the state that an interruption leaves behind.
    pub fn told(&self, state: &str) -> CliError {
        if let Self::Interrupted = self {
            return interrupted(state);
        }
        let mut error = CliError::of(self.exit(), self, self.hint());
        if let Self::Failed { more, .. } = self {
            error.causes.extend(more.iter().cloned());
        }
        error
    }
}

impl From<GitError> for CliError {
    fn from(error: GitError) -> Self {
        error.told("nothing was changed")
    }
}

/// The program git, and the interrupt that ends it early.
#[derive(Debug, Clone)]
pub struct Git {
    program: PathBuf,
    interrupt: Interrupt,
}

/// Access that a call needs.
enum Mode<'a> {
    /// Read-only access, without locks or network.
    Read,
    /// Changes to the checkout, without network.
    Change,
    /// Contact with a remote, by these protocols only.
    Remote(&'a [Transport], &'a Progress),
}

impl Git {
    /// Finds git on the PATH.
    pub fn find() -> Result<Self, CliError> {
        let program = find_on_path("git").ok_or_else(|| {
            CliError::new(Exit::Failed, "`git` is not installed")
                .hint("install it, for example with `apt install git`")
        })?;
        Ok(Self {
            program,
            interrupt: Interrupt::catch()?,
        })
    }

    /// Runs a command that changes nothing, and returns its output.
    pub async fn read(&self, dir: &Path, args: &[&str]) -> Result<Vec<u8>, GitError> {
        self.run(dir, args.iter().map(Into::into).collect(), Mode::Read)
            .await
    }

    /// Runs a command that changes the checkout.
    pub async fn change(&self, dir: &Path, args: &[&str]) -> Result<(), GitError> {
        let args = args.iter().map(Into::into).collect();
        self.run(dir, args, Mode::Change).await.map(drop)
    }

    /// Runs a command that contacts a remote, by `transports` only.
    pub async fn remote(
        &self,
        dir: &Path,
        args: &[&str],
        transports: &[Transport],
        progress: &Progress,
    ) -> Result<(), GitError> {
        let args = args.iter().map(Into::into).collect();
        self.run(dir, args, Mode::Remote(transports, progress))
            .await
            .map(drop)
    }

    fn command(&self, dir: &Path, args: &[OsString], mode: &Mode<'_>) -> Command {
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("GIT_") && !KEPT_VARIABLES.contains(&&*text) {
                command.env_remove(&name);
            }
        }
        if std::env::var_os("GIT_SSH_COMMAND").is_none() {
            command.env("GIT_SSH_COMMAND", ssh(std::env::var("GIT_SSH").ok()));
        }
        let protocols = match mode {
            Mode::Read | Mode::Change => String::new(),
            Mode::Remote(transports, _) => trust::protocols(transports),
        };
        command
            .env("GIT_ALLOW_PROTOCOL", protocols)
            .env("GIT_PROTOCOL_FROM_USER", "0")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "")
            .env("SSH_ASKPASS_REQUIRE", "never")
            .env("GIT_EDITOR", "true")
            .env("GIT_PAGER", "cat")
            // A file named `:(glob)*` is taken as a file.
            .env("GIT_LITERAL_PATHSPECS", "1")
            .env("LC_ALL", "C");
        if let Mode::Read = mode {
            command
                .env("GIT_OPTIONAL_LOCKS", "0")
                .env("GIT_NO_LAZY_FETCH", "1");
        }
        for setting in SETTINGS.into_iter().chain(["http.lowSpeedTime=60"]) {
            command.args(["-c", setting]);
        }
        command.args(args).current_dir(dir);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // In a group of its own: Ctrl-C at the terminal reaches only this process, which ends git and all its children.
            .process_group(0)
            .kill_on_drop(true);
        command
    }

    async fn run(
        &self,
        dir: &Path,
        args: Vec<OsString>,
        mode: Mode<'_>,
    ) -> Result<Vec<u8>, GitError> {
        let action = action_of(&args);
        let start = |source| GitError::Start {
            program: self.program.clone(),
            source,
        };
        let mut child = self.command(dir, &args, &mode).spawn().map_err(start)?;
        let progress = match mode {
            Mode::Remote(_, progress) => Some(progress),
            Mode::Read | Mode::Change => None,
        };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let heard = Cell::new(Instant::now());
        let (mut answer, mut words) = (Vec::new(), Words::default());
        let ended = {
            let mut reading = std::pin::pin!(async {
                let answered = read_answer(stdout, &mut answer, &heard);
                tokio::join!(answered, words.read(stderr, progress, &heard)).0
            });
            let mut whole = None;
            let mut ticks = interval(Duration::from_secs(1));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let status = loop {
                tokio::select! {
                    biased;
                    () = self.interrupt.wait() => break Err(GitError::Interrupted),
                    read = &mut reading, if whole.is_none() => {
                        whole = Some(read);
                        if !read {
                            break Err(GitError::TooLong { action: action.clone() });
                        }
                    }
                    status = child.wait() => break status.map_err(start),
                    // Only calls to a remote have a limit: local work may be silent for long.
                    _ = ticks.tick(), if progress.is_some() => {
                        if heard.get().elapsed() > SILENCE {
                            let seconds = SILENCE.as_secs();
                            break Err(GitError::Silent { action: action.clone(), seconds });
                        }
                    }
                }
            };
            if status.is_ok() && whole.is_none() {
                whole = timeout(GRACE, &mut reading).await.ok();
            }
            match (status, whole) {
                (Ok(_), Some(false)) => Err(GitError::TooLong {
                    action: action.clone(),
                }),
                (status, _) => status,
            }
        };
        let status = match ended {
            Ok(status) => status,
            Err(error) => {
                // On SIGTERM, git removes its locks and partial files.
                tool::end(&mut child).await;
                return Err(error);
            }
        };
        if status.success() {
            return Ok(answer);
        }
        let (reason, more) = words.reason();
        Err(GitError::Failed {
            why: why(&words.lines),
            action,
            status,
            reason,
            more,
        })
    }
}

/// Returns the command's name, with the subcommand of `submodule`.
fn action_of(args: &[OsString]) -> String {
    let words = args.iter().map(|arg| arg.to_string_lossy());
    let named = words.take(2).filter(|word| !word.starts_with('-'));
    let take = if args.first().is_some_and(|first| first == "submodule") {
        2
    } else {
        1
    };
    named.take(take).collect::<Vec<_>>().join(" ")
}

/// Reads the output to its end. Returns `false` if it is too long.
async fn read_answer(
    stream: Option<impl AsyncRead + Unpin>,
    answer: &mut Vec<u8>,
    heard: &Cell<Instant>,
) -> bool {
    let Some(mut stream) = stream else {
        return true;
    };
    let mut piece = vec![0; 64 << 10];
    loop {
        match stream.read(&mut piece).await {
            Ok(0) | Err(_) => return true,
            Ok(count) => {
                heard.set(Instant::now());
                if answer.len() + count > ANSWER_BYTES {
                    return false;
                }
                answer.extend_from_slice(&piece[..count]);
            }
        }
    }
}

/// git's standard error: the last messages, without progress lines.
#[derive(Debug, Default)]
struct Words {
    lines: Vec<String>,
    line: Vec<u8>,
}

impl Words {
    async fn read(
        &mut self,
        stream: Option<impl AsyncRead + Unpin>,
        progress: Option<&Progress>,
        heard: &Cell<Instant>,
    ) {
        let Some(mut stream) = stream else { return };
        let mut piece = vec![0; 8 << 10];
        loop {
            match stream.read(&mut piece).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    heard.set(Instant::now());
                    self.push(&piece[..count], progress);
                }
            }
        }
        self.push(b"\n", progress);
    }

    fn push(&mut self, piece: &[u8], progress: Option<&Progress>) {
        for byte in piece {
            match byte {
                b'\n' | b'\r' => self.end_of_line(progress),
                _ if self.line.len() < LINE_BYTES => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn end_of_line(&mut self, progress: Option<&Progress>) {
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        let text = sanitize::clean(&text).trim().to_owned();
        if text.is_empty() {
            return;
        }
        if is_progress(&text) {
            if let Some(progress) = progress {
                progress.message(text);
            }
            return;
        }
        self.lines.push(text);
        if self.lines.len() > TAIL_LINES {
            self.lines.remove(0);
        }
    }

    /// Returns the line with the reason, and the other lines. The first complaint is the cause; later ones are its
    /// consequences.
    fn reason(&self) -> (String, Vec<String>) {
        let complaint = |line: &&String| line.starts_with("fatal: ") || line.starts_with("error: ");
        let Some(line) = self.lines.iter().find(complaint).or(self.lines.last()) else {
            return ("no reason given".to_owned(), Vec::new());
        };
        let bare = line.trim_start_matches("fatal: ");
        let more = self.lines.iter().filter(|other| *other != line);
        (
            bare.trim_start_matches("error: ").to_owned(),
            more.cloned().collect(),
        )
    }
}

/// Returns whether a line reports progress, such as `Receiving objects:  45% (450/1000), 12.00 MiB | 1.20 MiB/s`, with or
/// without `remote: ` in front.
fn is_progress(line: &str) -> bool {
    let bare = line.strip_prefix("remote: ").unwrap_or(line);
    let counts = ["Enumerating ", "Counting ", "Compressing ", "Receiving "];
    let counts = counts.into_iter().chain(["Resolving ", "Updating files"]);
    counts.into_iter().any(|word| bare.starts_with(word)) || bare.starts_with("Total ")
}

/// Returns the kind of failure that git's messages describe.
fn why(lines: &[String]) -> Why {
    let lock = lines.iter().find_map(|line| {
        let rest = line.split_once("Unable to create '")?.1;
        let (path, rest) = rest.split_once("': ")?;
        rest.contains("File exists").then(|| path.to_owned())
    });
    if let Some(path) = lock {
        return Why::Locked(path);
    }
    let says = |words: &[&str]| {
        lines
            .iter()
            .any(|line| words.iter().any(|word| line.contains(word)))
    };
    let kinds: [(Why, &[&str]); 5] = [
        (Why::Foreign, &["detected dubious ownership"]),
        (
            Why::Protocol,
            &["not allowed", "remote helper", "unknown scheme"],
        ),
        (
            Why::Missing,
            &[
                "couldn't find remote ref",
                "not our ref",
                "did not contain",
                "Unable to find current",
            ],
        ),
        (
            Why::Credentials,
            &[
                "Authentication failed",
                "could not read Username",
                "could not read Password",
                "terminal prompts disabled",
                "unable to get password",
                "Permission denied (",
                "Host key verification failed",
                "returned error: 401",
                "returned error: 403",
            ],
        ),
        (
            Why::Unreachable,
            &[
                "Could not read from remote",
                "unable to access",
                "unable to connect",
                "Could not resolve host",
                "Connection refused",
                "Connection reset",
                "Connection timed out",
                "early EOF",
                "unexpected disconnect",
                "remote end hung up",
                "remote error",
                "RPC failed",
                "does not appear to be a git repository",
                "invalid index-pack output",
                "expected flush",
                "protocol error",
                "bad line length",
                "not valid: is this a git repository",
                "does not exist",
            ],
        ),
    ];
    let found = kinds.into_iter().find(|(_, words)| says(words));
    found.map_or(Why::Other, |(why, _)| why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Words {
        let mut words = Words::default();
        words.push(text.as_bytes(), None);
        words.push(b"\n", None);
        words
    }

    #[test] // [POOLCTL-042]
    fn the_first_complaint_is_the_reason_and_progress_is_none() {
        let words = said(
            "remote: Counting objects:  50% (1/2)\rReceiving objects: 100% (2/2), done.\n\
             fatal: '/no/\x1b[31mwhere' does not appear to be a git repository\n\
             fatal: Could not read from remote repository.\n\nPlease make sure you have the correct access rights",
        );
        let (reason, more) = words.reason();
        assert_eq!(reason, "'/no/where' does not appear to be a git repository");
        assert_eq!(more.len(), 2, "{more:?}");
        assert_eq!(why(&words.lines), Why::Unreachable);
    }

    #[test] // [POOLCTL-042]
    fn kinds_of_failures_are_told_apart() {
        for (text, kind) in [
            (
                "fatal: Unable to create '/a b/.git/index.lock': File exists.",
                Why::Locked("/a b/.git/index.lock".into()),
            ),
            ("fatal: transport 'ext' not allowed", Why::Protocol),
            (
                "fatal: could not read Username for 'https://x': terminal prompts disabled",
                Why::Credentials,
            ),
            (
                "fatal: couldn't find remote ref refs/heads/gone",
                Why::Missing,
            ),
            (
                "fatal: detected dubious ownership in repository at '/x'",
                Why::Foreign,
            ),
            ("fatal: early EOF", Why::Unreachable),
            ("fatal: the sky fell", Why::Other),
        ] {
            assert_eq!(why(&said(text).lines), kind, "{text}");
        }
    }

    #[test] // [POOLCTL-042]
    fn endless_lines_stay_small() {
        let mut words = Words::default();
        for _ in 0..100 {
            words.push(&vec![b'x'; 10_000], None);
            words.push(b"\n", None);
        }
        assert_eq!(words.lines.len(), TAIL_LINES);
        assert!(words.lines.iter().all(|line| line.len() == LINE_BYTES));
    }
}
