//! Readers that follow a job: its text goes to standard output as it is written, remarks go to standard error.

use std::io::{self, IsTerminal};
use std::time::Instant;

use orchestrator_core::api::events::{End, EventId, TaskEvent};
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::{JobError, JobId};
use pool_core::api::worker::StopReason;
use pool_core::kit::client::ClientError;
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::sanitize::TerminalFilter;
use pool_core::kit::terminal::{CliError, Exit, note, paint, say, write};
use serde::Serialize;

use super::situation::Situation;
use super::{job_failed, speed};
use crate::http_client::{Feed, Item, shown};

/// The end of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// The job completed, and its text is whole.
    Completed(End),
    /// The job failed, expired or was cancelled.
    Failed(JobError),
}

/// A consumer of a feed's items.
pub trait Reader {
    /// Takes the next item.
    fn take(&mut self, item: &Item) -> Result<(), CliError>;

    /// Returns the situation whose remarks this reader prints, if any.
    fn situation(&mut self) -> Option<&mut Situation> {
        None
    }
}

/// Follows a job to its end. Ctrl-C ends the command, not the job.
pub async fn follow(
    mut feed: Feed,
    reader: &mut impl Reader,
    interrupt: &Interrupt,
) -> Result<Ending, CliError> {
    let id = feed.job();
    loop {
        let item = {
            // Pinned across remarks: a pending connection attempt must not restart for a remark.
            let mut next = std::pin::pin!(feed.next());
            loop {
                let due = reader.situation().and_then(|situation| situation.due());
                tokio::select! {
                    item = &mut next => break item,
                    () = interrupt.wait() => {
                        reader.situation().into_iter().for_each(Situation::over);
                        return Err(goes_on(id));
                    }
                    () = at(due) => {
                        let situation = reader.situation().into_iter();
                        situation.for_each(|situation| situation.tick(Instant::now()));
                    }
                }
            }
        };
        let Some(item) = item.map_err(|error| lost_sight(id, error))? else {
            // A reader that starts after the last event receives no event, so the job's record decides.
            let view = feed.view().await.map_err(|error| lost_sight(id, error))?;
            return ending_of(view);
        };
        reader.take(&item)?;
        match item {
            Item::Event(_, TaskEvent::End(end)) => return Ok(Ending::Completed(end)),
            Item::Event(_, TaskEvent::Error(error)) => return Ok(Ending::Failed(error)),
            _ => {}
        }
    }
}

/// Waits until `due`; forever without it.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// Returns the end of a finished job.
fn ending_of(view: TaskView) -> Result<Ending, CliError> {
    let worker_id = view.attempts.last().map(|last| last.worker_id.clone());
    match (view.usage, view.error) {
        (Some(usage), _) => Ok(Ending::Completed(End {
            tokens_in: usage.tokens_in,
            tokens_out: usage.tokens_out,
            stop_reason: usage.stop_reason,
            seed: view.request.seed,
            ttft_ms: usage.ttft_ms,
            decode_time_ms: usage.decode_time_ms,
            worker_id: worker_id.unwrap_or_default(),
            receipt: view.receipt.map(Box::new),
        })),
        (None, Some(error)) => Ok(Ending::Failed(error)),
        (None, None) => Err(CliError::new(
            Exit::Failed,
            format!("the events of {} ended without an `end` event", view.id),
        )),
    }
}

/// Returns the error of a command that was interrupted while its job runs on.
pub fn goes_on(id: JobId) -> CliError {
    if io::stdout().is_terminal() {
        // Ends the line of the unfinished text.
        note("");
    }
    CliError::new(Exit::Interrupted, "interrupted")
        .hint(format!("job {id} continues; follow it with: llorch jobs events {id}, or cancel it with: llorch jobs cancel {id}"))
}

/// Returns the error of a command whose feed failed. If the orchestrator is gone, the hint says how to follow the job later.
fn lost_sight(id: JobId, error: ClientError) -> CliError {
    let lost = matches!(
        error,
        ClientError::Unreachable { .. } | ClientError::Broken { .. } | ClientError::Timeout { .. }
    );
    let error = shown(error);
    if !lost {
        return error;
    }
    let hint = error
        .hint
        .clone()
        .map_or(String::new(), |hint| format!("{hint}; "));
    error.hint(format!(
        "{hint}{id} is stored and continues when the orchestrator is back: llorch jobs events {id}"
    ))
}

/// A reader that prints the text of a job, and keeps it.
#[derive(Debug)]
pub struct Transcript {
    filter: TerminalFilter,
    text: String,
    next_index: u32,
    notices: bool,
    situation: Option<Situation>,
    /// True if standard output and standard error are one terminal, file or pipe.
    shared: bool,
    /// True if the text printed last does not end with a newline.
    mid_line: bool,
}

impl Transcript {
    /// Returns a transcript on standard output, with remarks on standard error: explanations of a wait, and with
    /// `notices` every event.
    pub fn new(notices: bool) -> Self {
        Self {
            situation: Some(Situation::new(notices)),
            notices,
            ..Self::without_remarks()
        }
    }

    /// Returns a transcript without remarks, for callers that show events themselves.
    pub fn without_remarks() -> Self {
        Self {
            filter: TerminalFilter::for_stdout(),
            text: String::new(),
            next_index: 0,
            notices: false,
            situation: None,
            shared: outputs_are_one(),
            mid_line: false,
        }
    }

    /// Returns the printed text, except for text that a later attempt has made void.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Prints a remark on its own line.
    fn remark(&mut self, text: impl AsRef<str>) {
        if self.shared && self.mid_line {
            // The newline goes to standard error, so that the text itself is unchanged.
            note("");
        }
        self.mid_line = false;
        match &self.situation {
            Some(situation) => situation.remark(text.as_ref()),
            None => remark(text),
        }
    }

    fn notice(&mut self, text: impl AsRef<str>) {
        if self.notices {
            self.remark(text);
        }
    }

    fn print(&mut self, text: &str) -> Result<(), CliError> {
        let shown = self.filter.push(text);
        if !shown.is_empty() {
            self.mid_line = !shown.ends_with('\n');
        }
        write(shown)
    }

    fn event(&mut self, event: &TaskEvent) -> Result<(), CliError> {
        let now = Instant::now();
        match event {
            TaskEvent::Token(token) => {
                // Each index is printed once, even if it arrives twice.
                if token.i >= self.next_index {
                    self.next_index = token.i.saturating_add(1);
                    self.text.push_str(&token.t);
                    self.explain(event, now);
                    self.print(&token.t)?;
                }
                return Ok(());
            }
            TaskEvent::Waiting(_) => {
                if self.situation.is_some() && self.shared && self.mid_line {
                    note("");
                    self.mid_line = false;
                }
            }
            TaskEvent::Queued(queued) => self.notice(format!("{} is stored", queued.job_id)),
            TaskEvent::Started(started) => {
                self.notice(format!(
                    "attempt {} runs on {} of {}",
                    started.attempt, started.worker_id, started.pool_id
                ));
            }
            TaskEvent::Attempt(attempt) if attempt.continues => {
                let (number, worker) = (attempt.attempt, &attempt.worker_id);
                self.notice(format!(
                    "attempt {number} continues the text on {worker}: {}",
                    attempt.reason
                ));
            }
            TaskEvent::Attempt(attempt) => {
                let (number, worker) = (attempt.attempt, &attempt.worker_id);
                if self.text.is_empty() {
                    self.notice(format!(
                        "attempt {number} runs on {worker}: {}",
                        attempt.reason
                    ));
                } else {
                    // Printed text can't be taken back, so the reader is informed even without `notices`.
                    self.print("\n")?;
                    self.remark(format!(
                        "the text above is void ({}); attempt {number} on {worker} starts over",
                        attempt.reason
                    ));
                }
                self.text.clear();
                self.next_index = 0;
            }
            TaskEvent::End(_) | TaskEvent::Error(_) => {
                self.explain(event, now);
                return self.print("\n");
            }
            TaskEvent::Metrics(_) | TaskEvent::Lagged(_) | TaskEvent::Shutdown(_) => {}
        }
        self.explain(event, now);
        Ok(())
    }

    fn explain(&mut self, event: &TaskEvent, now: Instant) {
        if let Some(situation) = &mut self.situation {
            situation.take(event, now);
        }
    }
}

impl Reader for Transcript {
    fn take(&mut self, item: &Item) -> Result<(), CliError> {
        match item {
            Item::Event(_, event) => self.event(event)?,
            // Printed even without `notices`: it explains why no text comes.
            Item::Lost(why) => self.remark(lost(why)),
            Item::Back => self.remark("the orchestrator is back; the text continues"),
        }
        Ok(())
    }

    fn situation(&mut self) -> Option<&mut Situation> {
        self.situation.as_mut()
    }
}

/// Returns the remark about a lost connection.
fn lost(why: &str) -> String {
    format!("{why}; waiting for the orchestrator")
}

/// Returns whether standard output and standard error are one terminal, or one file or pipe.
fn outputs_are_one() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let place = |path: &str| std::fs::metadata(path).map(|found| (found.dev(), found.ino()));
    let both_terminals = io::stdout().is_terminal() && io::stderr().is_terminal();
    let (out, err) = (place("/dev/stdout"), place("/dev/stderr"));
    both_terminals || out.ok().zip(err.ok()).is_some_and(|(out, err)| out == err)
}

/// A reader that prints each event as one line of JSON.
#[derive(Debug)]
pub struct JsonLines;

#[derive(Serialize)]
struct Line<'a> {
    id: Option<String>,
    #[serde(flatten)]
    event: &'a TaskEvent,
}

fn json_line(id: Option<EventId>, event: &TaskEvent) -> Result<String, CliError> {
    let line = Line {
        id: id.map(|id| id.to_string()),
        event,
    };
    serde_json::to_string(&line)
        .map_err(|error| CliError::caused(Exit::Failed, "could not write an event as JSON", &error))
}

impl Reader for JsonLines {
    fn take(&mut self, item: &Item) -> Result<(), CliError> {
        match item {
            Item::Event(id, event) => write(json_line(*id, event)? + "\n")?,
            Item::Lost(why) => remark(lost(why)),
            Item::Back => remark("the orchestrator is back; the events continue"),
        }
        Ok(())
    }
}

/// A reader that prints no text, and explains waits on standard error.
#[derive(Debug)]
pub struct Quiet(Situation);

impl Quiet {
    /// Returns the reader for a command with a single job.
    pub fn new() -> Self {
        Self(Situation::new(false))
    }

    /// Returns a reader for one of several jobs. Its remarks name the job.
    pub fn of(job: JobId) -> Self {
        Self(Situation::of(job))
    }
}

impl Reader for Quiet {
    fn take(&mut self, item: &Item) -> Result<(), CliError> {
        match item {
            // This reader prints no text, so the live line stays.
            Item::Event(_, TaskEvent::Token(_)) => {}
            Item::Event(_, event) => self.0.take(event, Instant::now()),
            Item::Lost(why) => self.0.remark(&lost(why)),
            Item::Back => self.0.remark("the orchestrator is back"),
        }
        Ok(())
    }

    fn situation(&mut self) -> Option<&mut Situation> {
        Some(&mut self.0)
    }
}

/// Ends a command that showed a job's text: prints a summary if `notices`, or returns the error that ended the job.
pub fn conclude(id: JobId, ending: &Ending, notices: bool) -> Result<Exit, CliError> {
    match ending {
        Ending::Completed(end) => {
            if notices {
                remark(summary(id, end));
            }
            Ok(Exit::Done)
        }
        Ending::Failed(error) => Err(job_failed(id, error)),
    }
}

fn summary(id: JobId, end: &End) -> String {
    let usage = end.usage();
    let tokens = if end.tokens_out == 1 {
        "token"
    } else {
        "tokens"
    };
    let cut = match end.stop_reason {
        StopReason::Eos | StopReason::StopSequence => "",
        StopReason::MaxTokens => ", cut off at --max-tokens",
        StopReason::ContextFull => ", cut off because the context is full",
    };
    format!(
        "{id}: {} {tokens} by {}, {}, seed {}{cut}",
        end.tokens_out,
        end.worker_id,
        speed(&usage),
        end.seed
    )
}

/// Returns whether to print notices: if standard error is a terminal, or if the user asks for them.
pub fn wants_notices(verbose: bool) -> bool {
    verbose || io::stderr().is_terminal()
}

/// Prints a remark on standard error, dimmed to distinguish it from the text.
fn remark(text: impl AsRef<str>) {
    let text = pool_core::kit::terminal::sanitize::clean(text.as_ref());
    note(paint::on_stderr(paint::Style::Dim, &text));
}

/// Prints a job's text and a newline. On a terminal, escape sequences are removed.
pub fn print_text(text: &str) -> Result<(), CliError> {
    say(pool_core::kit::terminal::sanitize::for_terminal(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use orchestrator_core::api::events::Token;

    #[test] // [LLORCH-024]
    fn a_line_has_id_event_and_data() {
        let token = TaskEvent::Token(Token {
            t: "a\n".into(),
            i: 0,
        });
        let id = Some(EventId { attempt: 1, seq: 3 });
        assert_eq!(
            json_line(id, &token).unwrap(),
            r#"{"id":"1.3","event":"token","data":{"t":"a\n","i":0}}"#
        );
        assert!(
            json_line(None, &token)
                .unwrap()
                .starts_with(r#"{"id":null,"event":"token""#)
        );
    }

    #[test] // [LLORCH-026]
    fn the_summary_is_one_line() {
        let id: JobId = "job-01900000-0000-7000-8000-000000000000".parse().unwrap();
        let end = End {
            tokens_in: 9,
            tokens_out: 11,
            stop_reason: StopReason::Eos,
            seed: 7,
            ttft_ms: 812,
            decode_time_ms: 500,
            worker_id: "worker-cpu-0".into(),
            receipt: None,
        };
        insta::assert_snapshot!(summary(id, &end), @"job-01900000-0000-7000-8000-000000000000: 11 tokens by worker-cpu-0, TTFT 812ms, 20.0 tokens/s, seed 7");
        let cut = End {
            stop_reason: StopReason::ContextFull,
            ..end
        };
        assert!(summary(id, &cut).ends_with("seed 7, cut off because the context is full"));
    }
}
