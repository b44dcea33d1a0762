//! `llorch dev demo`: runs a real job through all the daemons.

mod programs;
mod stage;
mod verdict;

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::JobId;
use orchestrator_core::pool::PoolLiveness;
use pool_core::ModelRef;
use pool_core::catalog::Catalog;
use pool_core::kit::client::ClientError;
use pool_core::kit::home::Home;
use pool_core::kit::settings::names_in_environment;
use pool_core::kit::sse::SseEvent as _;
use pool_core::kit::terminal::doctor::host::quoted;
use pool_core::kit::terminal::human_duration;
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::progress::{Progress, spinner};
use pool_core::kit::terminal::{CliError, Exit, note};
use pool_core::worker::WorkerStatus;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use self::stage::{Actor, Stage};
use self::verdict::Facts;
use crate::commands::jobs::{Reader, Transcript};
use crate::http_client::{Item, Orchestrator, shown};

/// A question that the default model answers correctly and briefly, the same way every time.
const PROMPT: &str = "What is 2+2?";
/// Default limit on the tokens of the answer.
const MAX_TOKENS: u32 = 128;
/// Time after which the job expires, in milliseconds. Every machine that can run the default model is faster.
const JOB_TIMEOUT_MS: u64 = 10 * 60 * 1000;
/// Longest time for the pool to register.
const ONLINE_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval between checks of the daemons while the job runs.
const WATCH_EVERY: Duration = Duration::from_millis(200);
/// Longest time for a job to end after it was cancelled because its pool had failed.
const AFTERMATH: Duration = Duration::from_secs(10);

/// Run a real job through all the daemons, on this machine, and print its answer.
///
/// In a checkout, the command first builds every program. It downloads the model if it is missing, starts the pool manager and
/// the orchestrator on free ports in a folder of their own, submits the prompt through the HTTP API, prints the answer on
/// standard output, checks that a model's tokens came through all the daemons, and stops what it started.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Demo {
    /// Prompt to submit
    #[arg(long, value_name = "TEXT", default_value = PROMPT, allow_hyphen_values = true)]
    prompt: String,
    /// Model: an id of the catalogue [default: the catalogue's default]
    #[arg(long)]
    model: Option<ModelRef>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = MAX_TOKENS)]
    max_tokens: u32,
    /// Leave everything running, and print how to use it
    #[arg(long)]
    keep: bool,
}

const EXAMPLES: &str = "\
Examples:
  llorch dev demo
  llorch dev demo --prompt 'Write a haiku about rain.' --keep";

impl Demo {
    /// Runs the demo: builds, downloads, starts, submits, checks and stops.
    pub async fn run(self) -> Result<Exit, CliError> {
        let interrupt = Interrupt::catch()?;
        let user = Home::from_env()?;
        let model = match self.model {
            Some(model) => model,
            None => {
                let catalog = Catalog::load(&user).map_err(|error| {
                    CliError::caused(Exit::Failed, "could not read the catalogue", &error)
                        .hint(error.hint())
                })?;
                catalog.default_entry().model_ref()
            }
        };
        let request = TaskSubmitRequest {
            model: model.to_string(),
            prompt: Some(self.prompt),
            max_tokens: Some(self.max_tokens),
            temperature: Some(0.0),
            timeout_ms: Some(JOB_TIMEOUT_MS),
            // A lost worker means that the demo has failed, so there is no second attempt.
            max_attempts: Some(1),
            ..TaskSubmitRequest::default()
        };
        request
            .clone()
            .validate()
            .map_err(|error| CliError::new(Exit::Usage, error.to_string()).hint(error.hint))?;

        programs::build(&interrupt).await?;
        programs::fetch_model(&request.model, &interrupt).await?;
        let stage = Stage::set(&user)?;
        let outcome = perform(&stage, &request, &interrupt).await;
        if let Ok(summary) = &outcome {
            note(summary);
        }
        let outcome = outcome.map(|_| Exit::Done);
        if self.keep {
            how_to_go_on(&stage);
            return outcome;
        }
        conclude(&stage, outcome).await
    }
}

/// Stops everything, and removes the demo's folder unless its logs are needed.
async fn conclude(stage: &Stage, outcome: Result<Exit, CliError>) -> Result<Exit, CliError> {
    let needed = outcome
        .as_ref()
        .is_err_and(|error| error.exit != Exit::Interrupted);
    let mut problems = stage.strike(outcome.is_err()).await;
    if !needed && problems.is_empty() {
        problems.extend(stage.clear());
    }
    let logs = format!("the logs are in {}", stage.logs_dir().display());
    match outcome {
        Ok(_) if !problems.is_empty() => {
            let error = CliError::new(
                Exit::Failed,
                "the job is done, but not everything could be stopped",
            )
            .hint(logs);
            Err(problems.into_iter().fold(error, CliError::cause))
        }
        Err(error) => {
            let error = problems.into_iter().fold(error, CliError::cause);
            Err(if needed { error.hint(logs) } else { error })
        }
        outcome => outcome,
    }
}

fn how_to_go_on(stage: &Stage) {
    let folder = std::env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.to_path_buf()));
    note("everything was left running; to use it:");
    if let Some(folder) = folder {
        note(format!("  export PATH={}:\"$PATH\"", quoted(&folder)));
    }
    note(format!("  unset {}", foreign_variables().join(" ")));
    note(format!(
        "  export LLORCH_HOME={} LLORCH_MODELS_DIR={}",
        quoted(stage.root()),
        quoted(stage.models_dir())
    ));
    note("  llorch jobs list");
    note("  llorch pool list");
    note("and to stop it:");
    note("  llorch orchestrator stop; llorch-pool daemon stop --workers");
}

/// Returns the variables that would direct commands away from the demo, or give its daemons unknown settings.
fn foreign_variables() -> Vec<String> {
    let mut names: BTreeSet<String> = ["LLORCH_ORCHESTRATOR_URL", "LLORCH_POOL_URL"]
        .map(str::to_owned)
        .into();
    let own = ["LLORCH_HOME", "LLORCH_MODELS_DIR", "LLORCH_LOG"];
    let set = names_in_environment().filter(|name| !own.contains(&name.as_str()));
    names.extend(set.filter(|name| name.starts_with("LLORCH_")));
    names.into_iter().collect()
}

/// Starts both daemons, runs the job, and checks the outcome. Returns the summary.
async fn perform(
    stage: &Stage,
    request: &TaskSubmitRequest,
    interrupt: &Interrupt,
) -> Result<String, CliError> {
    let progress = spinner("starting orchestratord");
    // A start can't be interrupted, because its process would be unknown and could not be stopped.
    let orchestrator = stage.start_orchestrator().await?;
    progress.message("starting pool-managerd");
    let pool = stage.start_pool(orchestrator.url()).await?;
    tokio::select! {
        facts = play(stage, &orchestrator, &pool, request, progress) => {
            let facts = facts?;
            let problems = verdict::problems(&facts);
            match (&facts.job, problems.split_first()) {
                (Ok(job), None) => Ok(verdict::summary(job)),
                (_, first) => {
                    verdict::held(&facts).iter().for_each(note);
                    let (first, rest) = first.map_or(("the job is not shown", &[][..]), |(first, rest)| (first, rest));
                    let error = CliError::new(Exit::Failed, format!("the demo failed: {first}"));
                    Err(rest.iter().fold(error, |error, problem| error.cause(problem)))
                }
            }
        }
        () = interrupt.wait() => Err(interrupted("the demo was aborted")),
    }
}

/// Submits the job, prints its text, and collects the facts about it afterwards.
async fn play(
    stage: &Stage,
    orchestrator: &Actor,
    pool: &Actor,
    request: &TaskSubmitRequest,
    progress: Progress,
) -> Result<Facts, CliError> {
    let mut client = Orchestrator::at(orchestrator.url(), None)?;
    progress.message("waiting for the pool to register");
    until_online(&client, pool).await?;
    let key = uuid::Uuid::now_v7().to_string();
    let task = client
        .submit(request, &key, |error| progress.println(error.to_string()))
        .await
        .map_err(shown)?;
    progress.message("waiting for a worker");
    let mut watched = watch(&client, task.job_id, orchestrator, pool, progress).await?;

    // The last check, after the text is complete: it finds a pool that died while the worker's stream continued.
    for actor in [orchestrator, pool] {
        if !watched
            .troubles
            .iter()
            .any(|trouble| trouble.starts_with(actor.name()))
        {
            watched.troubles.extend(actor.trouble().await);
        }
    }
    let worker_alive = watched
        .started
        .as_ref()
        .is_some_and(|started| stage.worker_is_alive(&started.worker_id));
    Ok(Facts {
        id: task.job_id,
        printed: watched.transcript.text().to_owned(),
        started: watched.started,
        troubles: watched.troubles,
        job: client
            .job(task.job_id)
            .await
            .map_err(|error| error.to_string()),
        pool: stage.pool_status(pool).await,
        worker_alive,
    })
}

async fn until_online(client: &Orchestrator, pool: &Actor) -> Result<(), CliError> {
    let deadline = Instant::now() + ONLINE_TIMEOUT;
    loop {
        let pools = client.pools().await.map_err(shown)?;
        if pools
            .iter()
            .any(|pool| pool.liveness == PoolLiveness::Online)
        {
            return Ok(());
        }
        if let Some(trouble) = pool.trouble().await {
            return Err(CliError::new(
                Exit::Failed,
                format!("the demo failed: {trouble}"),
            ));
        }
        if Instant::now() >= deadline {
            let message = format!(
                "the demo failed: the pool did not register within {}",
                human_duration(ONLINE_TIMEOUT)
            );
            return Err(CliError::new(Exit::Failed, message));
        }
        sleep(Duration::from_millis(25)).await;
    }
}

/// An observation while the job runs.
enum Happening {
    /// An event of the job, or a break in its stream.
    Item(Item),
    /// The stream has failed for good.
    Broken(ClientError),
    /// A worker is loading its model. The text is the message for the progress line.
    Loading(String),
    /// A daemon has failed.
    Trouble {
        /// Description of the failure.
        what: String,
        /// True if the job's stream may continue without the daemon.
        bearable: bool,
    },
}

/// The observations of a job until its end.
struct Watched {
    transcript: Transcript,
    started: Option<orchestrator_core::api::events::Started>,
    troubles: Vec<String>,
}

/// Prints the job's text while separate tasks watch the daemons and the loading of the model, so that a slow check delays no
/// token.
async fn watch(
    client: &Orchestrator,
    id: JobId,
    orchestrator: &Actor,
    pool: &Actor,
    progress: Progress,
) -> Result<Watched, CliError> {
    let (tell, mut happenings) = mpsc::channel(64);
    let mut watchers = JoinSet::new();
    watchers.spawn(watch_job(client.clone(), id, tell.clone()));
    watchers.spawn(watch_loading(client.clone(), tell.clone()));
    watchers.spawn(watch_daemon(orchestrator.clone(), false, tell.clone()));
    watchers.spawn(watch_daemon(pool.clone(), true, tell));

    let mut progress = Some(progress);
    let mut seen = Watched {
        transcript: Transcript::without_remarks(),
        started: None,
        troubles: Vec::new(),
    };
    let mut deadline = None;
    loop {
        let next = happenings.recv();
        let happening = match deadline {
            None => next.await,
            Some(deadline) => match timeout_at(deadline, next).await {
                Ok(happening) => happening,
                Err(_) => {
                    seen.troubles.push(format!(
                        "the job did not end within {} after that",
                        human_duration(AFTERMATH)
                    ));
                    return Ok(seen);
                }
            },
        };
        match happening {
            Some(Happening::Loading(message)) => {
                if let Some(progress) = &progress {
                    progress.message(message);
                }
            }
            Some(Happening::Trouble { what, bearable }) => {
                let goes_on = bearable && seen.started.is_some();
                seen.troubles.push(what);
                // The worker's stream continues without its pool, but the demo has failed. The job is cancelled, and its last
                // event awaited, so that the printed text can be compared with the API's.
                if !goes_on || client.cancel(id).await.is_err() {
                    return Ok(seen);
                }
                deadline = Some(Instant::now() + AFTERMATH);
            }
            Some(Happening::Broken(error)) => {
                seen.troubles.push(format!(
                    "the stream of events ended before the job did: {error}"
                ));
                return Ok(seen);
            }
            Some(Happening::Item(item)) => {
                match &item {
                    Item::Event(_, TaskEvent::Started(started)) => {
                        seen.started = Some(started.clone());
                        if let Some(progress) = &progress {
                            progress.message(format!("{} reads the prompt", started.worker_id));
                        }
                    }
                    Item::Event(
                        _,
                        TaskEvent::Token(_) | TaskEvent::End(_) | TaskEvent::Error(_),
                    ) => progress = None,
                    _ => {}
                }
                let last = matches!(&item, Item::Event(_, event) if event.is_last());
                // A job without text has no line to end.
                if !last || !seen.transcript.text().is_empty() {
                    seen.transcript.take(&item)?;
                }
                if last {
                    return Ok(seen);
                }
            }
            None => return Ok(seen),
        }
    }
}

async fn watch_job(client: Orchestrator, id: JobId, tell: mpsc::Sender<Happening>) {
    // A lost orchestrator means that the demo has failed, so there is no point in waiting for its return.
    let mut feed = client.events(id, None).with_patience(Duration::ZERO);
    loop {
        let happening = match feed.next().await {
            Ok(Some(item)) => Happening::Item(item),
            Ok(None) => return,
            Err(error) => Happening::Broken(error),
        };
        let over = matches!(happening, Happening::Broken(_));
        if tell.send(happening).await.is_err() || over {
            return;
        }
    }
}

async fn watch_loading(client: Orchestrator, tell: mpsc::Sender<Happening>) {
    loop {
        let pools = client.pools().await.unwrap_or_default();
        let mut workers = pools
            .iter()
            .filter_map(|pool| pool.status.as_ref())
            .flat_map(|status| &status.workers);
        if let Some(worker) = workers.find(|worker| worker.status == WorkerStatus::Starting) {
            let message = format!(
                "{} loads {}: {} %",
                worker.id, worker.model_ref, worker.load_percent
            );
            if tell.send(Happening::Loading(message)).await.is_err() {
                return;
            }
        }
        sleep(WATCH_EVERY).await;
    }
}

async fn watch_daemon(daemon: Actor, bearable: bool, tell: mpsc::Sender<Happening>) {
    loop {
        if let Some(what) = daemon.trouble().await {
            let _ = tell.send(Happening::Trouble { what, bearable }).await;
            return;
        }
        sleep(WATCH_EVERY).await;
    }
}
