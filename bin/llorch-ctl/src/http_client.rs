//! Client of `orchestratord`'s API: finds the orchestrator's address and makes typed calls.

mod feed;
mod list;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use orchestrator_core::api::events::EventId;
use orchestrator_core::api::models::ModelList;
use orchestrator_core::api::pools::{PoolList, PoolView};
use orchestrator_core::api::scheduler::SchedulerView;
use orchestrator_core::api::tasks::{
    CancelResponse, TaskAccepted, TaskExplanation, TaskList, TaskSubmitRequest, TaskSummary,
    TaskView,
};
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::job::{JobId, JobIdPrefix};
use pool_core::ORCHESTRATOR_API_VERSION;
use pool_core::kit::client::{ApiClient, ClientError, EventStream, Method, RelayedAnswer};
use pool_core::kit::home::Home;
use pool_core::kit::run_files;
use pool_core::kit::secret::Secret;
use pool_core::kit::terminal::{CliError, Exit, daemon_commands};
use pool_core::kit::wire::ErrorEnvelope;
use pool_core::kit::wire::VersionInfo;

pub use feed::{Feed, Item};
pub use list::{JobFilter, JobPages};

/// Default address of `orchestratord`.
const STANDARD_URL: &str = "http://127.0.0.1:8080";
/// Pauses before the retries of a failed call, in milliseconds.
const PAUSES_MS: [u64; 6] = [100, 250, 500, 1000, 2000, 4000];
/// Most jobs listed for an ambiguous id prefix.
const SHOWN_CANDIDATES: usize = 5;

/// Address of the orchestrator, and the token for it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub struct ConnectArgs {
    /// Address of the orchestrator: a URL, `HOST:PORT`, `:PORT` or `PORT` [default: the orchestrator running on this
    /// machine, else http://127.0.0.1:8080]
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "LLORCH_ORCHESTRATOR_URL"
    )]
    pub url: Option<String>,
    /// File (mode 0600) with the API token [default: LLORCH_API_TOKEN, else, without --url, the file that orchestratord.toml
    /// names]
    #[arg(long, global = true, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

impl ConnectArgs {
    /// Returns the options with the address `url`.
    pub fn at(mut self, url: &str) -> Self {
        self.url = Some(url.to_owned());
        self
    }

    /// Returns the requested address. An empty variable counts as unset.
    fn explicit_url(&self) -> Option<&str> {
        self.url.as_deref().filter(|url| !url.is_empty())
    }

    /// Returns the token to send. Reads the local daemon's settings only if no address is given, because the local daemon's
    /// token must not reach any other server.
    fn token(&self, home: &Home) -> Result<Option<Secret>, CliError> {
        if let Some(file) = &self.token_file {
            return Ok(Secret::load(None, Some(file))?);
        }
        let variable = std::env::var("LLORCH_API_TOKEN").ok();
        if variable
            .as_ref()
            .is_some_and(|value| !value.trim().is_empty())
            || self.explicit_url().is_some()
        {
            return Ok(Secret::load(variable, None)?);
        }
        let config = OrchestratorConfig::load(home, None).map_err(|error| {
            let hint = error.hint();
            let shown = CliError::caused(
                Exit::Usage,
                "could not look up the token file in the settings",
                &error,
            );
            shown.hint(
                hint.unwrap_or_else(|| "check them with `llorch orchestrator config check`".into()),
            )
        })?;
        Ok(Secret::load(None, config.token_file.as_deref())?)
    }
}

/// A client of one orchestrator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Orchestrator {
    client: ApiClient,
    token: Option<Secret>,
    /// State folder of the local daemon, which may listen on another port after a restart. `None` if an address was given.
    local: Option<PathBuf>,
}

impl Orchestrator {
    /// Finds the orchestrator and checks that it speaks our version of the API.
    pub async fn connect(args: &ConnectArgs) -> Result<Self, CliError> {
        let orchestrator = Self::find(args)?;
        orchestrator.version().await.map_err(shown)?;
        Ok(orchestrator)
    }

    /// Finds the orchestrator without calling it.
    pub fn find(args: &ConnectArgs) -> Result<Self, CliError> {
        let home = Home::from_env()?;
        let token = args.token(&home)?;
        let Some(url) = args.explicit_url() else {
            let state = home.orchestratord_state();
            daemon_commands::check_readable(&state, "orchestratord")?;
            let url = run_files::local_url(&state).unwrap_or_else(|| STANDARD_URL.to_owned());
            return Ok(Self {
                client: ApiClient::new(&url, token.clone())?,
                token,
                local: Some(state),
            });
        };
        Self::at(url, token).map_err(CliError::from)
    }

    /// Returns a client of the local orchestrator, which is known to listen at `url`.
    pub fn find_local(args: &ConnectArgs, url: &str) -> Result<Self, CliError> {
        Ok(Self::at(url, args.token(&Home::from_env()?)?)?)
    }

    /// Returns a client of the orchestrator at `url`.
    pub fn at(url: &str, token: Option<Secret>) -> Result<Self, ClientError> {
        Ok(Self {
            client: ApiClient::new(url, token.clone())?,
            token,
            local: None,
        })
    }

    /// Returns the base URL.
    pub fn url(&self) -> &str {
        self.client.base_url()
    }

    /// Returns the orchestrator's version. Fails if its API version is not ours.
    pub async fn version(&self) -> Result<VersionInfo, ClientError> {
        self.client.check_version(ORCHESTRATOR_API_VERSION).await
    }

    /// Switches to the new address of a local daemon that was restarted on another port.
    fn relocate(&mut self) {
        let found = self.local.as_deref().and_then(run_files::local_url);
        if let Some(url) = found.filter(|url| url != self.url())
            && let Ok(client) = ApiClient::new(&url, self.token.clone())
        {
            self.client = client;
        }
    }

    /// Submits a task. The key makes a retry safe after the connection broke before the answer: the orchestrator then returns
    /// the job that it has already stored.
    pub async fn submit(
        &mut self,
        request: &TaskSubmitRequest,
        key: &str,
        on_retry: impl Fn(&ClientError),
    ) -> Result<TaskAccepted, ClientError> {
        self.again(on_retry, async |client| {
            let post = client
                .request(Method::POST, "/v2/tasks")
                .header("Idempotency-Key", key)
                .json(request);
            client.fetch(post).await
        })
        .await
    }

    /// Makes an idempotent call, and retries it for about as long as a restart takes.
    async fn again<T>(
        &mut self,
        on_retry: impl Fn(&ClientError),
        call: impl AsyncFn(&ApiClient) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let mut pauses = PAUSES_MS.into_iter();
        loop {
            let error = match call(&self.client).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let pause = pauses.next().filter(|_| is_passing(&error));
            let Some(pause) = pause else {
                return Err(error);
            };
            on_retry(&error);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            self.relocate();
        }
    }

    /// Returns a job. Retries while the orchestrator restarts.
    pub async fn job_surely(&mut self, id: JobId) -> Result<TaskView, ClientError> {
        let path = format!("/v2/tasks/{id}");
        self.again(|_| {}, async |client| client.get(&path).await)
            .await
    }

    /// Returns a job. Does not retry.
    pub async fn job(&self, id: JobId) -> Result<TaskView, ClientError> {
        self.client.get(&format!("/v2/tasks/{id}")).await
    }

    /// Returns the reason why a job waits, or why its attempts ran where they did.
    pub async fn explain(&self, id: JobId) -> Result<TaskExplanation, ClientError> {
        self.client.get(&format!("/v2/tasks/{id}/explain")).await
    }

    /// Returns a page of jobs, newest first.
    async fn page(&self, query: &[(&'static str, String)]) -> Result<TaskList, ClientError> {
        let request = self.client.request(Method::GET, "/v2/tasks").query(query);
        self.client.fetch(request).await
    }

    /// Returns the matching jobs, page by page: unfinished jobs first, then finished ones, each newest first.
    pub fn jobs(&self, filter: &JobFilter, short_ids: bool) -> JobPages {
        JobPages::new(self.clone(), filter, short_ids)
    }

    /// Returns the number of matching jobs.
    pub async fn count(&self, filter: &JobFilter) -> Result<u64, ClientError> {
        let mut query = filter.query();
        query.push(("limit", "1".to_owned()));
        query.push(("count", "true".to_owned()));
        Ok(self.page(&query).await?.total.unwrap_or_default())
    }

    /// Returns the id of the only job whose id begins with `prefix`. A whole id is not looked up.
    pub async fn resolve(&self, prefix: &JobIdPrefix) -> Result<JobId, CliError> {
        if let Some(id) = prefix.whole() {
            return Ok(id);
        }
        let query = [
            ("id_prefix", prefix.to_string()),
            ("limit", (SHOWN_CANDIDATES + 1).to_string()),
            ("short_ids", "true".to_owned()),
        ];
        let found = self.page(&query).await.map_err(shown)?.jobs;
        match found.as_slice() {
            [] => Err(
                CliError::new(Exit::NotFound, format!("no job id begins with {prefix}"))
                    .hint("list the jobs with `llorch jobs list`"),
            ),
            [job] => Ok(job.id),
            jobs => Err(ambiguous(prefix, jobs)),
        }
    }

    /// Cancels a job. The answer has the resulting state: a job that was already over keeps its own.
    pub async fn cancel(&self, id: JobId) -> Result<CancelResponse, ClientError> {
        self.client
            .fetch(
                self.client
                    .request(Method::POST, &format!("/v2/tasks/{id}/cancel")),
            )
            .await
    }

    /// Returns the token that is sent with each request; `None` without one.
    pub fn token(&self) -> Option<&Secret> {
        self.token.as_ref()
    }

    /// Returns all models known to the orchestrator.
    pub async fn models(&self) -> Result<ModelList, ClientError> {
        self.client.get("/v2/models").await
    }

    /// Returns all registered pools.
    pub async fn pools(&self) -> Result<Vec<PoolView>, ClientError> {
        Ok(self.client.get::<PoolList>("/v2/pools").await?.pools)
    }

    /// Returns the policy in force.
    pub async fn scheduler(&self) -> Result<SchedulerView, ClientError> {
        self.client.get("/v2/scheduler").await
    }

    /// Opens the live trace of the scheduler's snapshots and decisions.
    pub async fn trace(&self) -> Result<RelayedAnswer, ClientError> {
        let request = self.client.request(Method::GET, "/v2/scheduler/trace");
        let mut answer = self.client.relay(request).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await? {
            body.extend_from_slice(&piece);
        }
        let status = answer.status().as_u16();
        Err(match serde_json::from_slice::<ErrorEnvelope>(&body) {
            Ok(envelope) => ClientError::Api {
                status,
                error: Box::new(envelope.error),
            },
            Err(error) => ClientError::NotOurs {
                url: self.url().to_owned(),
                status,
                detail: error.to_string(),
            },
        })
    }

    /// Returns the feed of a job's events, from the start or after a given event, across broken connections.
    pub fn events(&self, id: JobId, after: Option<EventId>) -> Feed {
        Feed::new(self.clone(), id, after)
    }

    async fn open_events(
        &self,
        id: JobId,
        after: Option<EventId>,
    ) -> Result<EventStream, ClientError> {
        let mut request = self
            .client
            .request(Method::GET, &format!("/v2/tasks/{id}/events"));
        if let Some(after) = after {
            request = request.header("Last-Event-ID", &after.to_string());
        }
        self.client.events(request).await
    }
}

/// Returns the error for a prefix that several job ids share.
fn ambiguous(prefix: &JobIdPrefix, jobs: &[TaskSummary]) -> CliError {
    let more = if jobs.len() > SHOWN_CANDIDATES {
        ", ..."
    } else {
        ""
    };
    let candidates: Vec<_> = jobs
        .iter()
        .take(SHOWN_CANDIDATES)
        .map(|job| {
            let id = job.short_id.clone().unwrap_or_else(|| job.id.to_string());
            format!("{id} ({})", job.status)
        })
        .collect();
    CliError::new(
        Exit::Usage,
        format!("more than one job id begins with {prefix}"),
    )
    .hint(format!(
        "give more of the id: {}{more}",
        candidates.join(", ")
    ))
}

/// Returns whether a retry of the call may succeed: the daemon is restarting, or the connection broke.
fn is_passing(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { .. }
        | ClientError::Broken { .. }
        | ClientError::Timeout { .. } => true,
        ClientError::Api { status, error } => *status == 503 && error.retriable,
        ClientError::NotOurs { .. }
        | ClientError::BadUrl { .. }
        | ClientError::VersionMismatch { .. } => false,
    }
}

/// Converts a failed call into the error that the terminal shows, with a hint how to fix it.
pub fn shown(error: ClientError) -> CliError {
    match &error {
        ClientError::Unreachable { url, .. } => {
            let hint = if url.starts_with("http://127.0.0.1:")
                || url.starts_with("http://localhost:")
            {
                "start it with `llorch orchestrator start`, or name another one with LLORCH_ORCHESTRATOR_URL"
            } else {
                "check the address (--url, LLORCH_ORCHESTRATOR_URL) and that orchestratord runs there"
            };
            CliError::from(error).hint(hint)
        }
        ClientError::Api { status: 401, .. } => CliError::from(error)
            .hint("put the API token into LLORCH_API_TOKEN, or name its file with --token-file"),
        ClientError::Api { error: body, .. } if body.code == "JOB_NOT_FOUND" => {
            CliError::from(error).hint("list the jobs with `llorch jobs list`")
        }
        _ => error.into(),
    }
}
