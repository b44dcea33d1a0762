//! `llorch orchestrator scheduler`: shows the policy in force, and tries out others.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use orchestrator_core::api::scheduler::{
    CheckAnswer, LastScriptError, Replay, Report, SchedulerView, ScriptError, ScriptView,
    SimulateAnswer,
};
use orchestrator_core::check;
use orchestrator_core::scheduler::{Action, BuiltIn};
use orchestrator_core::script::{MAX_SOURCE, Script};
use orchestrator_core::simulate::{self, SimulateError};
use orchestrator_core::trace::{EndReason, Line, Trace, TraceEnd};
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::paint::Cell;
use pool_core::kit::terminal::sanitize::clean;
use pool_core::kit::terminal::{
    CliError, Exit, Format, human_bytes, human_duration, human_ms, note, parse_duration,
    print_json, print_table, progress, say,
};

use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Size limit of a trace: 1 GiB.
const MOST_TRACE_BYTES: u64 = 1 << 30;

/// `llorch orchestrator scheduler`.
#[derive(Debug, Args)]
pub struct Scheduler {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the policy in force: the script's version, statistics and latest error
    Show {
        /// Human-readable lines, or the object of `GET /v2/scheduler`
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Compile a script and show its decisions on a sample; needs no orchestrator
    Check(Check),
    /// Record the scheduler's snapshots and decisions in a file of JSON Lines, until Ctrl-C
    Record(RecordArgs),
    /// Simulate other policies on a recorded trace and compare them; needs no orchestrator
    Simulate(Simulate),
}

#[derive(Debug, Args)]
struct Check {
    /// File with the script
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Human-readable lines, or a JSON object with `ok`, `error`, `actions` and `waits`
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Args)]
struct RecordArgs {
    /// File to write the trace to; `-` is standard output
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Stop recording after this time: `90s`, `10m` [default: never]
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
    span: Option<Duration>,
    /// Overwrite an existing file
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct Simulate {
    /// Trace written by `record`
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Script to simulate; repeatable
    #[arg(long, value_name = "FILE")]
    script: Vec<PathBuf>,
    /// Built-in policy to simulate; repeatable [default: the recorded policy if there is a script, else all]
    #[arg(long, value_name = "NAME", value_parser = policies())]
    policy: Vec<BuiltIn>,
    /// Columns, or a JSON object with `replay` and `reports`
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

fn policies() -> impl TypedValueParser<Value = BuiltIn> {
    PossibleValuesParser::new(BuiltIn::ALL.map(BuiltIn::as_str))
        .try_map(|name| name.parse::<BuiltIn>())
}

impl Scheduler {
    /// Runs the command.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self.command {
            Command::Show { format } => show(&self.connect, format).await,
            Command::Check(check) => check.run(),
            Command::Record(record) => record.run(&self.connect).await,
            Command::Simulate(simulate) => simulate.run(),
        }
    }
}

async fn show(connect: &ConnectArgs, format: Format) -> Result<Exit, CliError> {
    let view = Orchestrator::connect(connect)
        .await?
        .scheduler()
        .await
        .map_err(shown)?;
    match format {
        Format::Json => print_json(&view)?,
        Format::Table => describe(&view)?,
    }
    Ok(Exit::Done)
}

fn describe(view: &SchedulerView) -> Result<(), CliError> {
    let Some(script) = &view.script else {
        say(format!("policy: {}", view.policy))?;
        note("set `scheduler.script` in orchestratord.toml to use a script of your own");
        return Ok(());
    };
    match &script.sha256 {
        Some(sha256) => {
            say(format!(
                "policy: script {} ({})",
                clean(&script.path),
                short(sha256)
            ))?;
            let loaded = script.loaded_at.map(|at| at.to_string());
            say(format!(
                "loaded: {}, at most {} a pass, else {}",
                loaded.unwrap_or_default(),
                human_ms(script.limit_ms),
                view.policy
            ))?;
        }
        None => say(format!(
            "policy: {} (script {} is refused)",
            view.policy,
            clean(&script.path)
        ))?,
    }
    say(format!("passes: {}", passes(script)))?;
    if let Some(error) = &script.last_error {
        say(format!("last error: {}", told(error)))?;
    }
    if let Some(refused) = &script.refused {
        say(format!("refused version: {}", told(refused)))?;
        note(refused.error.hint());
    }
    if view.recordings > 0 {
        say(format!("recordings: {}", view.recordings))?;
    }
    Ok(())
}

fn passes(script: &ScriptView) -> String {
    let kinds: Vec<String> = script
        .errors
        .iter()
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    let errors = match kinds.is_empty() {
        true => "no error".to_owned(),
        false => format!("errors: {}", kinds.join(", ")),
    };
    format!(
        "{} by the script, {} of them left to the built-in policy; {errors}",
        script.runs, script.fallbacks
    )
}

fn told(error: &LastScriptError) -> String {
    format!(
        "{} ({}, {})",
        clean(&error.error.to_string()),
        error.error.kind,
        error.at
    )
}

fn short(sha256: &str) -> &str {
    sha256.get(..12).unwrap_or(sha256)
}

/// Reads a script, at most one byte past [`MAX_SOURCE`]: enough for the compiler to find that it is too long.
fn read_script(path: &Path) -> Result<Vec<u8>, CliError> {
    use std::io::Read as _;
    let mut source = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_SOURCE as u64 + 1).read_to_end(&mut source))
        .map_err(|error| unreadable(path, &error))?;
    Ok(source)
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    let exit = match error.kind() {
        std::io::ErrorKind::NotFound => Exit::NotFound,
        _ => Exit::Failed,
    };
    CliError::caused(exit, format!("could not read `{}`", path.display()), error)
}

fn refused(path: &Path, error: &ScriptError) -> CliError {
    let place = match (error.line, error.column) {
        (Some(line), Some(column)) => format!(":{line}:{column}"),
        (Some(line), None) => format!(":{line}"),
        _ => String::new(),
    };
    let message = format!("{}{place}: {}", path.display(), error.message);
    CliError::new(Exit::Failed, message).hint(error.hint())
}

impl Check {
    fn run(self) -> Result<Exit, CliError> {
        let answer = check::check(&read_script(&self.file)?);
        if self.format == Format::Json {
            print_json(&answer)?;
            return Ok(if answer.ok { Exit::Done } else { Exit::Failed });
        }
        for line in &answer.printed {
            note(format!("print: {}", clean(line)));
        }
        if let Some(error) = &answer.error {
            return Err(refused(&self.file, error));
        }
        say(format!(
            "{} compiles ({}); on the sample it decides:",
            self.file.display(),
            short(&answer.sha256)
        ))?;
        for line in decisions(&answer) {
            say(format!("  {line}"))?;
        }
        Ok(Exit::Done)
    }
}

fn decisions(answer: &CheckAnswer) -> Vec<String> {
    let actions = answer.actions.iter().map(|action| match action {
        Action::Dispatch { job, pool, worker } => format!("dispatch {job} to {worker} on {pool}"),
        Action::StartWorker {
            pool,
            model,
            device,
            context_length,
        } => {
            let context = context_length
                .map(|tokens| format!(" and a context of {tokens} tokens"))
                .unwrap_or_default();
            format!("start a worker with {model}{context} on {device} of {pool}")
        }
        Action::EvictWorker {
            pool,
            worker,
            needed_by,
        } => format!("evict {worker} on {pool} for {needed_by}"),
        Action::UnloadWorker { pool, worker } => format!("unload {worker} on {pool}"),
        Action::Download { pool, model } => format!("download {model} to {pool}"),
        Action::Reject { job, message, .. } => format!("end {job}: {message}"),
    });
    let waits = answer
        .waits
        .iter()
        .map(|wait| format!("{} waits: {}", wait.job, clean(&wait.message)));
    actions.chain(waits).collect()
}

impl RecordArgs {
    async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        self.look()?;
        let orchestrator = Orchestrator::connect(connect).await?;
        let interrupt = Interrupt::catch()?;
        let mut trace = orchestrator.trace().await.map_err(shown)?;
        let mut out = self.open()?;
        let begun = Instant::now();
        note("recording; press Ctrl-C to stop");
        let progress = progress::spinner("recording");
        let mut tail = Tail::default();
        let failed = |error: std::io::Error| {
            CliError::caused(
                Exit::Failed,
                format!("could not write `{}`", self.file.display()),
                &error,
            )
        };
        let over = async {
            match self.span {
                Some(span) => tokio::time::sleep(span).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(over);
        let meant = loop {
            let piece = tokio::select! {
                piece = trace.chunk() => piece.map_err(shown)?,
                () = interrupt.wait() => break true,
                () = &mut over => break true,
            };
            let Some(piece) = piece else { break false };
            out.write_all(&tail.push(&piece)).map_err(failed)?;
            progress.message(format!("recording: {} passes", tail.passes));
        };
        if meant {
            out.write_all(&tail.finish()?).map_err(failed)?;
        }
        out.flush().map_err(failed)?;
        let took = human_duration(begun.elapsed());
        progress.finish(format!(
            "{} passes in {took}, {}",
            tail.passes,
            human_bytes(tail.bytes)
        ));
        match tail.end {
            Some(EndReason::Lagged) => Err(CliError::new(
                Exit::Failed,
                "the recording was cut off: this client was too slow",
            )
            .hint("write to a faster disk; the part recorded so far is usable")),
            Some(EndReason::Shutdown) => {
                note("the orchestrator stopped, which ended the recording");
                Ok(Exit::Done)
            }
            Some(EndReason::Done) => Ok(Exit::Done),
            None => Err(CliError::new(
                Exit::Failed,
                "the orchestrator disappeared during the recording",
            )
            .hint("see `llorch orchestrator logs`; the part recorded so far is usable")),
        }
    }

    fn exists(&self) -> CliError {
        let message = format!("`{}` exists", self.file.display());
        CliError::new(Exit::Refused, message).hint("overwrite it with --force")
    }

    /// Fails if the file exists and must not be overwritten. Called before the first request.
    fn look(&self) -> Result<(), CliError> {
        let standard_output = self.file.as_os_str() == "-";
        if !self.force && !standard_output && self.file.exists() {
            return Err(self.exists());
        }
        Ok(())
    }

    fn open(&self) -> Result<Box<dyn std::io::Write>, CliError> {
        if self.file.as_os_str() == "-" {
            return Ok(Box::new(std::io::stdout()));
        }
        let mut options = std::fs::OpenOptions::new();
        options.write(true);
        match self.force {
            true => options.create(true).truncate(true),
            false => options.create_new(true),
        };
        let file = options.open(&self.file).map_err(|error| {
            let message = format!("could not create `{}`", self.file.display());
            match error.kind() {
                std::io::ErrorKind::AlreadyExists => self.exists(),
                _ => CliError::caused(Exit::Failed, message, &error),
            }
        })?;
        Ok(Box::new(std::io::BufWriter::new(file)))
    }
}

/// Filter of a recorded stream: lets only whole passes through, counts them, and finds the last line. Drops the empty lines
/// that keep the connection alive.
#[derive(Default)]
struct Tail {
    /// Beginning of a line whose end has not arrived.
    line: Vec<u8>,
    /// The `saw` line of a pass, held back until the decisions arrive.
    open: Vec<u8>,
    passes: u64,
    bytes: u64,
    end: Option<EndReason>,
}

impl Tail {
    fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut whole = Vec::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if !part.ends_with(b"\n") {
                break;
            }
            let line = std::mem::take(&mut self.line);
            if line.starts_with(b"{\"end\"")
                && let Ok(Line::End(end)) = serde_json::from_slice(&line)
            {
                self.end = Some(end.reason);
            }
            let decided = line.starts_with(b"{\"decided\"");
            self.passes += u64::from(decided);
            if line.starts_with(b"{\"saw\"") {
                self.open = line;
            } else if line != b"\n" {
                whole.append(&mut self.open);
                whole.extend(line);
            }
        }
        self.bytes += whole.len() as u64;
        whole
    }

    /// Returns the last line of a recording that is ended here; empty if the orchestrator has ended it.
    fn finish(&mut self) -> Result<Vec<u8>, CliError> {
        if self.end.is_some() {
            return Ok(Vec::new());
        }
        self.end = Some(EndReason::Done);
        let line = Line::End(TraceEnd {
            passes: self.passes,
            reason: EndReason::Done,
        });
        let text = serde_json::to_string(&line).map_err(|error| {
            CliError::caused(Exit::Failed, "could not finish the trace", &error)
        })?;
        Ok((text + "\n").into_bytes())
    }
}

impl Simulate {
    fn run(self) -> Result<Exit, CliError> {
        let mut text = String::new();
        std::fs::File::open(&self.trace)
            .and_then(|file| file.take(MOST_TRACE_BYTES + 1).read_to_string(&mut text))
            .map_err(|error| unreadable(&self.trace, &error))?;
        if text.len() as u64 > MOST_TRACE_BYTES {
            let what = format!("`{}` is larger than 1 GiB", self.trace.display());
            return Err(CliError::new(Exit::Usage, what).hint("record for a shorter time"));
        }
        let trace = Trace::read(&text).map_err(|error| {
            let what = format!("could not play `{}`", self.trace.display());
            CliError::caused(Exit::Failed, what, &error).hint(error.hint())
        })?;
        drop(text);
        let script = |path: &PathBuf| {
            let script = Script::compile(&read_script(path)?);
            Ok((
                self.name(path),
                script.map_err(|error| refused(path, &error))?,
            ))
        };
        let scripts = self.script.iter().map(script);
        let scripts = scripts.collect::<Result<Vec<_>, CliError>>()?;
        if trace.end.is_none() {
            note("the trace has no end: its recording was cut off or is still running");
        }
        let progress = progress::spinner(format!("playing {} passes", trace.passes.len()));
        let answer = simulate::compare(&trace, &scripts, &self.policy, None);
        drop(progress);
        let answer = answer.map_err(|error| failed(&self.trace, &error))?;
        match self.format {
            Format::Json => print_json(&answer)?,
            Format::Table => table(&answer)?,
        }
        Ok(Exit::Done)
    }
}

impl Simulate {
    /// Returns the name of a script in the comparison: its file name, or its whole path if two scripts have the same file name.
    fn name(&self, path: &Path) -> String {
        let same = self
            .script
            .iter()
            .filter(|other| other.file_name() == path.file_name());
        let name = match path.file_name() {
            Some(name) if same.count() == 1 => name,
            _ => path.as_os_str(),
        };
        clean(&name.to_string_lossy()).to_string()
    }
}

fn failed(path: &Path, error: &SimulateError) -> CliError {
    CliError::caused(
        Exit::Failed,
        format!("could not play `{}`", path.display()),
        error,
    )
}

fn table(answer: &SimulateAnswer) -> Result<(), CliError> {
    let ms = |ms: u64| human_ms(ms);
    let row = |report: &Report| -> Vec<Cell> {
        [
            report.policy.clone(),
            report.jobs.to_string(),
            ms(report.wait_p50_ms),
            ms(report.wait_p95_ms),
            ms(report.wait_p99_ms),
            report.worker_starts.to_string(),
            report.evictions.to_string(),
            report.starved.to_string(),
            human_bytes(report.idle_memory_bytes),
            report.fallbacks.to_string(),
        ]
        .map(Cell::from)
        .into()
    };
    print_table(
        &[
            "POLICY",
            "JOBS",
            "P50 WAIT",
            "P95 WAIT",
            "P99 WAIT",
            "STARTS",
            "EVICTIONS",
            "STARVED",
            "IDLE MEMORY",
            "FALLBACKS",
        ],
        answer.reports.iter().map(row),
    )?;
    if let Some(replay) = &answer.replay {
        note(compared(replay));
    }
    Ok(())
}

/// Describes in a sentence how the recorded decisions compare.
fn compared(replay: &Replay) -> String {
    let Replay {
        passes,
        equal,
        skipped,
        first_difference,
    } = replay;
    let decided = passes - skipped;
    let mut text = format!("{equal} of {decided} recorded decisions are the same");
    if let Some(pass) = first_difference {
        text += &format!("; the first difference is in pass {pass}");
    }
    if *skipped > 0 {
        text += &format!(
            "; {skipped} were made by another policy or version of the script (name it with --script)"
        );
    }
    text
}
