//! `llorch jobs events`.

use clap::{Args, ValueEnum};
use orchestrator_core::api::events::EventId;
use orchestrator_core::job::JobIdPrefix;
use pool_core::terminal::interrupt::Interrupt;
use pool_core::terminal::{CliError, Exit};

use super::follow::{JsonLines, Transcript, conclude, follow, wants_notices};
use crate::http_client::{ConnectArgs, Orchestrator};

/// Follow a job's events to its end, from the start or after one of them.
///
/// It exits as `jobs submit` does: 0 when the job completed, 6 when it did not. Several readers may follow one job.
#[derive(Debug, Args)]
pub struct Events {
    /// Id of the job, or its beginning
    id: JobIdPrefix,
    /// Go on after this event, as the stream's ids name it
    #[arg(long, value_name = "ATTEMPT.SEQ")]
    after: Option<EventId>,
    /// What to print: the text as it is written, or every event as JSON
    #[arg(long, value_enum, default_value_t)]
    format: EventFormat,
    /// Tell on standard error what happens, also where that is no terminal
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum EventFormat {
    /// The text, as it is written
    #[default]
    Text,
    /// `{"id", "event", "data"}`, one a line; momentary events have no id
    Jsonl,
}

impl Events {
    /// Follows.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let orchestrator = Orchestrator::connect(connect).await?;
        let interrupt = Interrupt::catch()?;
        let notices = wants_notices(self.verbose);
        let id = orchestrator.resolve(&self.id).await?;
        let feed = orchestrator.events(id, self.after);
        match self.format {
            EventFormat::Text => {
                let ending = follow(feed, &mut Transcript::new(notices), &interrupt).await?;
                conclude(id, &ending, notices)
            }
            EventFormat::Jsonl => {
                let ending = follow(feed, &mut JsonLines, &interrupt).await?;
                conclude(id, &ending, false)
            }
        }
    }
}
