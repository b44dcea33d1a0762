//! `llorch jobs replay`.

mod compare;

use std::time::Duration;

use clap::Args;
use orchestrator_core::JobStatus;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::tasks::{TaskSubmitRequest, TaskView};
use orchestrator_core::job::{Input, JobId, JobIdPrefix, Placement};
use pool_core::kit::client::ClientError;
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::{
    CliError, Exit, Format, human_duration, note, paint, parse_duration, print_json, say,
};
use pool_core::worker::Device;

use super::follow::{Ending, Quiet, Reader, Transcript, conclude, follow, wants_notices};
use super::situation::Situation;
use crate::http_client::{ConnectArgs, Item, Orchestrator, shown};
use compare::{Comparison, Text};

/// Label of a replay that names the original.
const LABEL: &str = "replay-of";

/// Run the request of a finished job again; with --verify, compare the tokens.
///
/// The replay is a new job, whose id goes to standard error. It has the model, prompt, settings and seed of the original, but
/// not its priority, session, timeout, labels and placement; its label `replay-of` names the original. Ctrl-C cancels the
/// replay.
///
/// With --verify, it exits with 0 if the replay has the same tokens and with 1 if not, and names the first `token` event
/// that differs (counted from 0) and the fields of the receipts that may explain the difference. If a job has no receipt,
/// the texts are compared.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Replay {
    /// Job id, or a unique prefix of it
    id: JobIdPrefix,
    /// Compare the tokens and the receipts of both jobs
    #[arg(long)]
    verify: bool,
    /// Run on this pool only [default: any]
    #[arg(long, value_name = "ID")]
    pool: Option<String>,
    /// Run on this device only: `cpu`, `cuda:N` or `metal:N` [default: any]
    #[arg(long)]
    device: Option<Device>,
    /// Cancel the replay after this time, and exit with 124: `90s`, `5m`, or seconds [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Output: the text as it is written, or the finished job as JSON; with --verify, the verdict as lines or as JSON
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

const EXAMPLES: &str = "\
Examples:
  llorch jobs replay 019abcde-f0 --verify
  llorch jobs replay 019abcde-f0 --verify --pool mac --format json
  llorch jobs replay 019abcde-f0 --device cuda:0 --timeout 5m";

impl Replay {
    /// Submits the replay, and compares or prints it.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let mut orchestrator = Orchestrator::connect(connect).await?;
        let id = orchestrator.resolve(&self.id).await?;
        let original = orchestrator.job(id).await.map_err(shown)?;
        self.check(&original)?;
        let interrupt = Interrupt::catch()?;
        match self.verify {
            true => self.compare(&mut orchestrator, &original, &interrupt).await,
            false => self.print(&mut orchestrator, &original, &interrupt).await,
        }
    }

    /// Compares the original with its replay.
    async fn compare(
        &self,
        orchestrator: &mut Orchestrator,
        original: &TaskView,
        interrupt: &Interrupt,
    ) -> Result<Exit, CliError> {
        // Read before the replay runs, because retention may drop the text in the meantime.
        let mut before = Pieces::silent();
        let feed = orchestrator.events(original.id, None);
        let whole = follow(feed, &mut before, interrupt).await.map_err(plain)?;
        let id = self.submit(orchestrator, original, interrupt).await?;
        let mut after = Pieces::new();
        let again = self.watch(orchestrator, id, &mut after, interrupt).await?;
        let comparison =
            Comparison::of(text(original.id, &whole, before)?, text(id, &again, after)?);
        match self.format {
            Format::Json => print_json(&comparison)?,
            Format::Table => say(comparison.render(paint::on_stdout()))?,
        }
        Ok(match comparison.same {
            true => Exit::Done,
            false => Exit::Failed,
        })
    }

    /// Fails if the job can't be replayed or, with `--verify`, can't be compared.
    fn check(&self, job: &TaskView) -> Result<(), CliError> {
        let (id, status) = (job.id, job.status);
        if !status.is_terminal() {
            let message = format!("{id} is {status}: only a finished job can be replayed");
            return Err(CliError::new(Exit::Refused, message)
                .hint(format!("wait for its end with `llorch jobs wait {id}`")));
        }
        if let Some(at) = job.dropped_at {
            let message = format!("the prompt of {id} was dropped at {at:.0}");
            return Err(CliError::new(Exit::NotFound, message)
                .hint("orchestratord keeps texts for `store.retention_s` after a job's end"));
        }
        if self.verify && status != JobStatus::Completed {
            let message = format!("{id} is {status}: it has no complete text to compare with");
            return Err(CliError::new(Exit::Refused, message)
                .hint("leave out --verify to run the request again without a comparison"));
        }
        Ok(())
    }

    /// Returns the request of a job with the placement from the options.
    fn request(&self, job: &TaskView) -> TaskSubmitRequest {
        let spec = &job.request;
        let (prompt, messages) = match &spec.input {
            Input::Prompt(prompt) => (Some(prompt.clone()), None),
            Input::Messages(messages) => (None, Some(messages.clone())),
        };
        let (pool, device) = (self.pool.clone(), self.device);
        let placed = pool.is_some() || device.is_some();
        TaskSubmitRequest {
            model: spec.model.to_string(),
            prompt,
            messages,
            raw: spec.raw,
            allow_special: spec.allow_special,
            system: spec.system.clone(),
            max_tokens: Some(spec.max_tokens),
            temperature: Some(spec.sampling.temperature),
            top_p: Some(spec.sampling.top_p),
            top_k: Some(spec.sampling.top_k),
            min_p: Some(spec.sampling.min_p),
            repetition_penalty: Some(spec.sampling.repetition_penalty),
            stop: spec.stop.clone(),
            seed: Some(spec.seed),
            priority: None,
            session_id: None,
            timeout_ms: None,
            max_attempts: None,
            placement: placed.then_some(Placement { pool, device }),
            labels: [(LABEL.to_owned(), job.id.to_string())].into(),
        }
    }

    /// Submits the replay and prints its id.
    async fn submit(
        &self,
        orchestrator: &mut Orchestrator,
        original: &TaskView,
        interrupt: &Interrupt,
    ) -> Result<JobId, CliError> {
        let request = self.request(original);
        let key = uuid::Uuid::now_v7().to_string();
        let on_retry = |error: &ClientError| {
            note(format!("{error}; submitting again with the same key"));
        };
        let accepted = tokio::select! {
            accepted = orchestrator.submit(&request, &key, on_retry) => accepted,
            () = interrupt.wait() => {
                let hint = format!("the replay may be stored; its label `{LABEL}` names {}", original.id);
                return Err(CliError::new(Exit::Interrupted, "interrupted before the orchestrator answered").hint(hint));
            }
        };
        let id = accepted.map_err(|error| refused(original, error))?.job_id;
        note(format!("{id} replays {}", original.id));
        Ok(id)
    }

    /// Prints the replay as `jobs submit` prints a job.
    async fn print(
        &self,
        orchestrator: &mut Orchestrator,
        original: &TaskView,
        interrupt: &Interrupt,
    ) -> Result<Exit, CliError> {
        let id = self.submit(orchestrator, original, interrupt).await?;
        let notices = wants_notices(false) && self.format == Format::Table;
        let ending = match self.format {
            Format::Table => {
                let mut transcript = Transcript::new(notices);
                self.watch(orchestrator, id, &mut transcript, interrupt)
                    .await?
            }
            Format::Json => {
                let ending = self
                    .watch(orchestrator, id, &mut Quiet::new(), interrupt)
                    .await?;
                print_json(&orchestrator.job(id).await.map_err(shown)?)?;
                ending
            }
        };
        conclude(id, &ending, notices)
    }

    /// Follows the replay to its end. Cancels it on Ctrl-C, or when its time is up.
    async fn watch(
        &self,
        orchestrator: &Orchestrator,
        id: JobId,
        reader: &mut impl Reader,
        interrupt: &Interrupt,
    ) -> Result<Ending, CliError> {
        let error = tokio::select! {
            followed = follow(orchestrator.events(id, None), reader, interrupt) => match followed {
                Err(error) if error.exit == Exit::Interrupted => plain(error),
                followed => return followed,
            },
            limit = passed(self.timeout) => {
                reader.situation().into_iter().for_each(Situation::over);
                let message = format!("{id} had not finished after {}", human_duration(limit));
                CliError::new(Exit::WaitTimedOut, message)
            }
        };
        Err(error.hint(match orchestrator.cancel(id).await {
            Ok(answer) => format!("{id} is {}", answer.status),
            Err(error) => {
                format!(
                    "{id} could not be cancelled ({error}); cancel it with: llorch jobs cancel {id}"
                )
            }
        }))
    }
}

/// Returns the error of an interrupted reader without its hint, which says that the job continues.
fn plain(error: CliError) -> CliError {
    match error.exit {
        Exit::Interrupted => CliError::new(error.exit, error.message),
        _ => error,
    }
}

/// Waits for a time limit and returns it; waits forever without one.
async fn passed(limit: Option<Duration>) -> Duration {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
    limit.unwrap_or_default()
}

/// Returns the error of a replay that the orchestrator refuses.
fn refused(original: &TaskView, error: ClientError) -> CliError {
    let gone = matches!(&error, ClientError::Api { error, .. }
        if ["MODEL_NOT_FOUND", "MODEL_UNSUPPORTED"].contains(&error.code.as_str()));
    let mut shown = shown(error);
    if gone {
        let (id, message) = (original.id, &shown.message);
        shown.message = format!("the model of {id} can no longer be used: {message}");
    }
    shown
}

/// Returns the text of a completed job, or the error with which the job ended.
fn text(id: JobId, ending: &Ending, pieces: Pieces) -> Result<Text, CliError> {
    match ending {
        Ending::Completed(end) => Ok(Text {
            id,
            pieces: pieces.list,
            tokens: end.tokens_out,
            stop_reason: end.stop_reason,
            receipt: end.receipt.clone(),
        }),
        Ending::Failed(error) => Err(super::job_failed(id, error)),
    }
}

/// A reader that keeps the text of each `token` event, and prints none.
struct Pieces {
    list: Vec<String>,
    /// Explains waits; `None` for a job that is over.
    quiet: Option<Quiet>,
}

impl Pieces {
    fn new() -> Self {
        Self {
            list: Vec::new(),
            quiet: Some(Quiet::new()),
        }
    }

    fn silent() -> Self {
        Self {
            list: Vec::new(),
            quiet: None,
        }
    }
}

impl Reader for Pieces {
    fn take(&mut self, item: &Item) -> Result<(), CliError> {
        match item {
            Item::Event(_, TaskEvent::Attempt(attempt)) if !attempt.continues => self.list.clear(),
            // A piece that arrives again is not kept twice.
            Item::Event(_, TaskEvent::Token(token)) if token.i as usize >= self.list.len() => {
                self.list.push(token.t.clone());
            }
            _ => {}
        }
        self.quiet.as_mut().map_or(Ok(()), |quiet| quiet.take(item))
    }

    fn situation(&mut self) -> Option<&mut Situation> {
        self.quiet.as_mut().and_then(Quiet::situation)
    }
}
