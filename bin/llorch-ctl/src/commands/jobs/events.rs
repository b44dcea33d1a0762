//! `llorch jobs events`.

use clap::{Args, ValueEnum};
use orchestrator_core::api::events::EventId;
use orchestrator_core::job::JobIdPrefix;
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::{CliError, Exit};

use super::follow::{JsonLines, Transcript, conclude, follow, wants_notices};
use crate::http_client::{ConnectArgs, Orchestrator};

/// Follow a job's events to its end, from the start or after a given event.
///
/// Exits as `jobs submit` does: with 0 if the job completed, and with 6 if it did not. Several readers may follow one job.
#[derive(Debug, Args)]
pub struct Events {
    /// Job id, or a unique prefix of it
    id: JobIdPrefix,
    /// Start after the event with this id
    #[arg(long, value_name = "ATTEMPT.SEQ")]
    after: Option<EventId>,
    /// Output: the text as it is written, or every event as JSON
    #[arg(long, value_enum, default_value_t)]
    format: EventFormat,
    /// Report what happens on standard error, even if it is not a terminal
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum EventFormat {
    /// The text as it is written
    #[default]
    Text,
    /// One object per line with `id`, `event` and `data`; the id of a momentary event is null
    Jsonl,
}

impl Events {
    /// Follows the job.
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
