//! Exit codes of commands, and errors with causes and hints.

use std::fmt;
use std::future::Future;
use std::io;
use std::process::ExitCode;

use clap::{Command, Parser};

use super::{in_commands, note, paint, sanitize};
use crate::kit::client::ClientError;
use crate::kit::errors::causes;
use crate::kit::home::HomeError;
use crate::kit::secret::SecretError;
use crate::kit::settings::SettingsError;

/// The exit codes of every command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Done = 0,
    /// A failure that no other code describes.
    Failed = 1,
    /// Wrong usage, or a request out of range.
    Usage = 2,
    /// The requested object does not exist.
    NotFound = 3,
    /// The request was refused: queue full, conflict, no memory.
    Refused = 4,
    /// A daemon could not be reached, or rejected the token.
    Unreachable = 5,
    /// The job itself failed, was cancelled or expired.
    JobFailed = 6,
    /// The command's own wait timed out.
    WaitTimedOut = 124,
    /// Interrupted with Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A failed command, as the terminal shows it.
#[derive(Debug)]
pub struct CliError {
    /// The exit code of the process.
    pub exit: Exit,
    /// Description of the failure.
    pub message: String,
    /// The causes, nearest first.
    pub causes: Vec<String>,
    /// The remedy, if there is one.
    pub hint: Option<String>,
    /// True if nothing is printed, because the reader of standard output has gone, as in `... | head`.
    quiet: bool,
}

impl CliError {
    /// Returns an error without causes or a hint.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            causes: Vec::new(),
            hint: None,
            quiet: false,
        }
    }

    /// Returns an error with `cause`, followed by the cause's own causes.
    pub fn caused(
        exit: Exit,
        message: impl Into<String>,
        cause: &(dyn std::error::Error + 'static),
    ) -> Self {
        Self {
            causes: std::iter::once(cause.to_string())
                .chain(causes(cause))
                .collect(),
            ..Self::new(exit, message)
        }
    }

    /// Sets the hint, replacing an earlier one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Appends a cause.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Returns the error of a failed write to standard output. A reader that has gone is not a failure of the command.
    pub(super) fn output(error: &io::Error) -> Self {
        let gone = error.kind() == io::ErrorKind::BrokenPipe;
        let exit = if gone { Exit::Done } else { Exit::Failed };
        Self {
            quiet: gone,
            ..Self::caused(exit, "could not write to standard output", error)
        }
    }

    /// Converts an error, keeping its text and causes.
    pub fn of(exit: Exit, error: &(dyn std::error::Error + 'static), hint: Option<String>) -> Self {
        Self {
            causes: causes(error).collect(),
            hint,
            ..Self::new(exit, error.to_string())
        }
    }

    fn print(&self) {
        if self.quiet {
            return;
        }
        // Messages may contain text from a daemon or a model, which must not control the terminal.
        let show = |label: &str, text: &str| {
            note(format!("{label}: {}", sanitize::clean(&in_commands(text))));
        };
        show(&paint::on_stderr(paint::Style::Bad, "error"), &self.message);
        for cause in &self.causes {
            show("caused by", cause);
        }
        if let Some(hint) = &self.hint {
            show(&paint::on_stderr(paint::Style::Good, "hint"), hint);
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let hint = error.hint();
        match &error {
            ClientError::Api {
                status,
                error: body,
            } => {
                let exit = match status {
                    400 | 413 | 415 => Exit::Usage,
                    401 | 403 => Exit::Unreachable,
                    404 | 410 => Exit::NotFound,
                    502 | 504 => Exit::Unreachable,
                    409 | 422 | 429 | 503 => Exit::Refused,
                    _ => Exit::Failed,
                };
                let cause = format!(
                    "{} (HTTP {status}, correlation id {})",
                    body.code, body.correlation_id
                );
                Self::of(exit, &error, hint).cause(cause)
            }
            ClientError::Unreachable { source, .. } => {
                // The causes in between are only layers of the HTTP client.
                let mut error = Self::of(Exit::Unreachable, &error, hint);
                let root = causes(source).last();
                error.causes = vec![root.unwrap_or_else(|| source.to_string())];
                error
            }
            ClientError::BadUrl { .. } => Self::of(Exit::Usage, &error, hint),
            ClientError::NotOurs { .. }
            | ClientError::Broken { .. }
            | ClientError::Timeout { .. } => Self::of(Exit::Unreachable, &error, hint),
            ClientError::VersionMismatch { .. } => Self::of(Exit::Failed, &error, hint),
        }
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(error) => error,
            Err(error) => match error.downcast::<ClientError>() {
                Ok(error) => error.into(),
                Err(error) => Self::of(Exit::Failed, error.as_ref(), None),
            },
        }
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> Self {
        Self::of(Exit::Failed, &error, None)
    }
}

impl From<SettingsError> for CliError {
    fn from(error: SettingsError) -> Self {
        Self::of(Exit::Usage, &error, error.hint())
    }
}

impl From<HomeError> for CliError {
    fn from(error: HomeError) -> Self {
        Self::of(Exit::Failed, &error, error.hint().map(str::to_owned))
    }
}

impl From<SecretError> for CliError {
    fn from(error: SecretError) -> Self {
        Self::of(Exit::Usage, &error, error.hint().map(str::to_owned))
    }
}

/// Parses this process's arguments as `T`. Exits with 2 after invalid arguments (printing the error) or a missing
/// subcommand (printing the help), and with 0 after `--help` or `--version`.
pub fn parse<T: Parser>() -> T {
    let matched = help_without_subcommand(T::command()).try_get_matches();
    matched
        .and_then(|matches| T::from_arg_matches(&matches))
        .unwrap_or_else(|error| error.exit())
}

fn help_without_subcommand(command: Command) -> Command {
    if command.has_subcommands() {
        command
            .subcommand_required(true)
            .arg_required_else_help(true)
            .mut_subcommands(help_without_subcommand)
    } else {
        command
    }
}

/// Runs a command on its own async runtime, prints its error, and returns its exit code.
pub fn run_cli<F, R>(command: F) -> ExitCode
where
    F: FnOnce() -> R,
    R: Future<Output = Result<Exit, CliError>>,
{
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = CliError::caused(Exit::Failed, "could not start the async runtime", &error);
            error.print();
            return error.exit.into();
        }
    };
    let exit = runtime.block_on(command()).unwrap_or_else(|error| {
        error.print();
        error.exit
    });
    // A thread that still waits for standard input must not keep the process alive.
    runtime.shutdown_background();
    exit.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::wire::ErrorBody;
    use clap::Subcommand;

    fn api(status: u16) -> CliError {
        ClientError::Api {
            status,
            error: Box::new(ErrorBody {
                code: "A_CODE".into(),
                message: "it went wrong".into(),
                hint: Some("try this".into()),
                details: None,
                correlation_id: "abc".into(),
                retriable: false,
                retry_after_ms: None,
            }),
        }
        .into()
    }

    #[test] // [POOLCORE-090]
    fn a_daemons_answer_decides_the_exit_code() {
        let codes: Vec<_> = [
            400, 401, 403, 404, 409, 410, 413, 422, 429, 500, 502, 503, 504,
        ]
        .map(|status| api(status).exit as u8)
        .into();
        assert_eq!(codes, [2, 5, 5, 3, 4, 3, 2, 4, 4, 1, 5, 4, 5]);
        let error = api(429);
        assert_eq!(error.message, "it went wrong");
        assert_eq!(error.hint.as_deref(), Some("try this"));
        assert_eq!(error.causes, ["A_CODE (HTTP 429, correlation id abc)"]);
    }

    #[test] // [POOLCORE-090]
    fn an_error_keeps_its_exit_code_and_causes_through_anyhow() {
        use anyhow::Context;
        let error: CliError = anyhow::Error::new(api(404)).context("while looking").into();
        assert_eq!(error.exit, Exit::NotFound);
        let error: CliError = anyhow::anyhow!("the root")
            .context("the middle")
            .context("the top")
            .into();
        assert_eq!(
            (error.exit, error.message.as_str()),
            (Exit::Failed, "the top")
        );
        assert_eq!(error.causes, ["the middle", "the root"]);
        let error: CliError = Err::<(), _>(io::Error::other("disk"))
            .context("saving")
            .unwrap_err()
            .into();
        assert_eq!(error.causes, ["disk"]);
    }

    #[test] // [POOLCORE-091]
    fn a_reader_that_left_ends_a_command_quietly() {
        let gone = CliError::output(&io::ErrorKind::BrokenPipe.into());
        assert!(gone.quiet && gone.exit == Exit::Done);
        let full = CliError::output(&io::ErrorKind::StorageFull.into());
        assert!(!full.quiet && full.exit == Exit::Failed);
    }

    #[derive(Debug, Parser)]
    struct Args {
        #[command(subcommand)]
        command: Outer,
    }

    #[derive(Debug, Subcommand)]
    enum Outer {
        Jobs {
            #[command(subcommand)]
            command: Option<Inner>,
        },
    }

    #[derive(Debug, Subcommand)]
    enum Inner {
        List,
    }

    #[test] // [POOLCORE-092]
    fn a_missing_subcommand_shows_the_help_and_exits_with_2() {
        use clap::CommandFactory;
        for args in [&["llorch"][..], &["llorch", "jobs"]] {
            let error = help_without_subcommand(Args::command())
                .try_get_matches_from(args)
                .unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
            assert!(error.to_string().contains("Usage:"), "{error}");
        }
        assert!(
            help_without_subcommand(Args::command())
                .try_get_matches_from(["llorch", "jobs", "list"])
                .is_ok()
        );
    }
}
