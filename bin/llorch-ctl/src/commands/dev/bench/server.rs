//! The kinds of servers that can be measured, and the requests for each.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use futures_util::StreamExt;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::models::ModelList;
use orchestrator_core::api::tasks::TaskSubmitRequest;
use pool_core::api::worker::{
    CancelRequest, CancelResponse, ExecuteRequest, Sampling, WorkerEvent, WorkerHealth,
};
use pool_core::kit::client::{ApiClient, ClientError, EventStream, Method, ServerEvent};
use pool_core::kit::secret::Secret;
use pool_core::kit::sse::SseEvent as _;
use pool_core::kit::terminal::{CliError, Exit};
use pool_core::kit::wire::VersionInfo;
use pool_core::worker_args::SECRET_VAR;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::figures::Answer;
use crate::http_client::{ConnectArgs, Item, Orchestrator, shown};

/// Longest silence of a server, which may read a long prompt before its first answer.
const PATIENCE: Duration = Duration::from_secs(600);
/// Time limit for a server to say what it is.
const PROBE: Duration = Duration::from_secs(10);
/// Sampling temperature. If only the likeliest token is drawn, small models repeat themselves.
const TEMPERATURE: f32 = 0.7;

/// Fence of every execution on a worker: each has one attempt.
const FENCE: u64 = 1;

/// Kinds of servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// orchestratord: tasks and their events
    Orchestrator,
    /// llorch-candled: executions; its secret is in LLORCH_WORKER_SECRET
    Worker,
    /// `POST /v1/completions` with a stream
    Openai,
}

/// A request to make.
#[derive(Debug, Clone)]
pub struct Task {
    /// Number of the task, unique within the run.
    pub number: u64,
    /// Prompt, without a template.
    pub prompt: String,
    /// Most tokens of the answer.
    pub output_tokens: u32,
}

/// A server to measure.
#[derive(Debug)]
pub struct Server {
    api: Api,
    orchestrator: Orchestrator,
    client: ApiClient,
    model: Option<String>,
    /// Unique id of the run, which distinguishes its executions from others.
    run: String,
    /// Jobs of the run that have not ended.
    running: Running,
}

/// Ids of jobs or executions that have not ended.
#[derive(Debug, Default)]
struct Running(Mutex<BTreeSet<String>>);

impl Running {
    fn ids(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the answer of a job. A read that is dropped half-way leaves the job among the running ones.
    async fn during<T>(&self, id: String, read: impl Future<Output = T>) -> T {
        self.ids().insert(id.clone());
        let answer = read.await;
        self.ids().remove(&id);
        answer
    }
}

impl Server {
    /// Connects to a server. Detects its kind and its model unless they are given.
    pub async fn connect(
        connect: &ConnectArgs,
        api: Option<Api>,
        model: Option<String>,
    ) -> Result<Self, CliError> {
        let orchestrator = Orchestrator::find(connect)?;
        let client = ApiClient::new(orchestrator.url(), orchestrator.token().cloned())?
            .with_answer_timeout(PATIENCE)
            .with_idle_timeout(PATIENCE);
        let probe = client.clone().with_answer_timeout(PROBE);
        let api = match api {
            Some(api) => api,
            None => detect(&probe).await?,
        };
        // The secret goes to a worker only: any other server must not learn it.
        let client = match api {
            Api::Worker => {
                let secret = std::env::var(SECRET_VAR).ok().filter(|s| !s.is_empty());
                let secret = secret.ok_or_else(|| {
                    CliError::new(
                        Exit::Usage,
                        "a worker answers only callers that have its secret",
                    )
                    .hint(format!("set {SECRET_VAR} to it"))
                })?;
                client.at(orchestrator.url(), Some(Secret::new(secret)))
            }
            Api::Orchestrator | Api::Openai => client,
        };
        if api == Api::Orchestrator {
            orchestrator.version().await.map_err(shown)?;
        }
        let model = match (api, model) {
            (Api::Worker, model) => model,
            (_, Some(model)) => Some(model),
            (Api::Orchestrator, None) => {
                let list: ModelList = orchestrator.models().await.map_err(shown)?;
                let there = list.models.into_iter();
                let there = there.filter(|model| model.runnable && !model.pools.is_empty());
                Some(only_one(there.map(|model| model.model_ref.to_string()))?)
            }
            (Api::Openai, None) => {
                let list: OpenaiModels = probe.get("/v1/models").await?;
                Some(only_one(list.data.into_iter().map(|model| model.id))?)
            }
        };
        Ok(Self {
            api,
            orchestrator,
            client,
            model,
            run: uuid::Uuid::now_v7().to_string(),
            running: Running::default(),
        })
    }

    /// Returns the base URL.
    pub fn url(&self) -> &str {
        self.client.base_url()
    }

    /// Returns the kind of the server.
    pub fn api(&self) -> Api {
        self.api
    }

    /// Returns the requested model; `None` if a worker is measured and no model was named.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Makes a request and reads the answer to its end.
    pub async fn answer(&self, task: Task) -> Result<Answer, CliError> {
        match self.api {
            Api::Orchestrator => Box::pin(self.task(task)).await,
            Api::Worker => Box::pin(self.execution(task)).await,
            Api::Openai => Box::pin(self.completion(task)).await,
        }
    }

    /// Cancels the jobs of the run that have not ended, and returns those that could not be cancelled. A server with an OpenAI-style
    /// API stops by itself once the connection closes.
    pub async fn cancel_running(&self) -> Vec<String> {
        let ids = self.running.ids().clone();
        let cancels = ids.into_iter().map(|id| async move {
            let cancelled = match self.api {
                Api::Orchestrator => match id.parse() {
                    Ok(job) => self.orchestrator.cancel(job).await.is_ok(),
                    Err(_) => false,
                },
                Api::Worker => {
                    let request = CancelRequest {
                        job_id: id.clone(),
                        fence: FENCE,
                    };
                    let probe = self.client.clone().with_answer_timeout(PROBE);
                    probe
                        .post::<_, CancelResponse>("/cancel", &request)
                        .await
                        .is_ok()
                }
                Api::Openai => true,
            };
            (!cancelled).then_some(id)
        });
        let left = futures_util::future::join_all(cancels).await;
        left.into_iter().flatten().collect()
    }

    async fn task(&self, task: Task) -> Result<Answer, CliError> {
        let request = TaskSubmitRequest {
            model: self.model.clone().unwrap_or_default(),
            prompt: Some(task.prompt),
            raw: true,
            max_tokens: Some(task.output_tokens),
            temperature: Some(TEMPERATURE.into()),
            seed: Some(task.number),
            max_attempts: Some(1),
            ..TaskSubmitRequest::default()
        };
        let mut clock = Clock::start();
        let key = format!("{}-{}", self.run, task.number);
        let mut orchestrator = self.orchestrator.clone();
        let accepted = orchestrator.submit(&request, &key, |_| {}).await;
        let job = accepted.map_err(shown)?.job_id;
        let read = async {
            let mut events = orchestrator.events(job, None);
            while let Some(item) = events.next().await.map_err(shown)? {
                match item {
                    Item::Event(_, TaskEvent::Token(_)) => clock.token(),
                    Item::Event(_, TaskEvent::End(end)) => {
                        return clock.stop(end.tokens_in, end.tokens_out);
                    }
                    Item::Event(_, TaskEvent::Error(error)) => {
                        return Err(CliError::new(Exit::JobFailed, error.message));
                    }
                    _ => {}
                }
            }
            Err(without_end())
        };
        self.running.during(job.to_string(), read).await
    }

    async fn execution(&self, task: Task) -> Result<Answer, CliError> {
        let job_id = format!("bench-{}-{}", self.run, task.number);
        let request = ExecuteRequest {
            job_id: job_id.clone(),
            attempt: 1,
            fence: FENCE,
            prompt: Some(task.prompt),
            messages: None,
            raw: true,
            allow_special: false,
            system: None,
            sampling: Sampling {
                temperature: TEMPERATURE,
                ..Sampling::default()
            },
            seed: task.number,
            max_tokens: task.output_tokens,
            stop: Vec::new(),
            resume: None,
            cache_scope: None,
            refuse_if_full: false,
        };
        let mut clock = Clock::start();
        let read = async {
            let mut stream = self.open("/execute", &request).await?;
            let mut ended = None;
            while let Some(event) = next(&mut stream).await? {
                match WorkerEvent::parse(&event.event, &event.data) {
                    Ok(WorkerEvent::Token(_)) => clock.token(),
                    Ok(WorkerEvent::End(end)) => {
                        ended = Some(clock.stop(end.tokens_in, end.tokens_out)?);
                    }
                    Ok(WorkerEvent::Error(error)) => {
                        return Err(CliError::new(Exit::JobFailed, error.message));
                    }
                    _ => {}
                }
            }
            // No client resumes this execution. If the deletion fails, the worker forgets the execution later.
            let path = format!("/executions/{job_id}");
            let _ = self.client.delete::<serde_json::Value>(&path).await;
            ended.ok_or_else(without_end)
        };
        self.running.during(job_id.clone(), read).await
    }

    async fn completion(&self, task: Task) -> Result<Answer, CliError> {
        let request = json!({
            "model": self.model,
            "prompt": task.prompt,
            "max_tokens": task.output_tokens,
            "temperature": TEMPERATURE,
            "seed": task.number,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let mut clock = Clock::start();
        let mut stream = self.open("/v1/completions", &request).await?;
        let (mut pieces, mut usage) = (0, None);
        while let Some(event) = next(&mut stream).await? {
            if event.data == "[DONE]" {
                break;
            }
            let Ok(chunk) = event.json::<Chunk>() else {
                return Err(CliError::new(Exit::JobFailed, event.data));
            };
            if chunk.choices.iter().any(|choice| !choice.text.is_empty()) {
                clock.token();
                pieces += 1;
            }
            usage = chunk.usage.or(usage);
        }
        // Servers without usage figures are assumed to send one token per piece.
        let usage = usage.unwrap_or(Usage {
            prompt_tokens: 0,
            completion_tokens: pieces,
        });
        clock.stop(usage.prompt_tokens, usage.completion_tokens)
    }

    async fn open(&self, path: &str, body: &impl Serialize) -> Result<EventStream, ClientError> {
        let request = self.client.request(Method::POST, path).json(body);
        self.client.events(request).await
    }
}

/// Detects the kind of a server. A server without our version endpoint counts as one with an OpenAI-style API.
async fn detect(client: &ApiClient) -> Result<Api, CliError> {
    // A worker answers this request even without its secret.
    if client.get::<WorkerHealth>("/health").await.is_ok() {
        return Ok(Api::Worker);
    }
    match client.get::<VersionInfo>("/version").await {
        Ok(info) if info.name == "orchestratord" => Ok(Api::Orchestrator),
        Ok(info) => Err(CliError::new(
            Exit::Usage,
            format!("{} at {} does not run tasks", info.name, client.base_url()),
        )
        .hint("name an orchestrator, a worker, or a server with an OpenAI-style API with --url")),
        Err(ClientError::NotOurs { .. }) => Ok(Api::Openai),
        Err(error) => Err(shown(error)),
    }
}

fn only_one(mut models: impl Iterator<Item = String>) -> Result<String, CliError> {
    let some: Vec<String> = models.by_ref().take(6).collect();
    match some.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(CliError::new(Exit::NotFound, "the server has no model")
            .hint("download one with `llorch-pool models download MODEL`")),
        several => Err(CliError::new(Exit::Usage, "the server has several models")
            .hint(format!("name one with --model: {}", several.join(", ")))),
    }
}

async fn next(stream: &mut EventStream) -> Result<Option<ServerEvent>, CliError> {
    Ok(stream.next().await.transpose()?)
}

fn without_end() -> CliError {
    CliError::new(Exit::JobFailed, "the stream ended before the answer did")
}

/// Times of an answer, from the request on.
struct Clock {
    start: Instant,
    first: Option<Duration>,
    last: Duration,
}

impl Clock {
    fn start() -> Self {
        Self {
            start: Instant::now(),
            first: None,
            last: Duration::ZERO,
        }
    }

    fn token(&mut self) {
        self.last = self.start.elapsed();
        self.first.get_or_insert(self.last);
    }

    fn stop(&self, tokens_in: u32, tokens_out: u32) -> Result<Answer, CliError> {
        let first = self
            .first
            .ok_or_else(|| CliError::new(Exit::JobFailed, "the answer has no text"))?;
        Ok(Answer {
            first,
            last: self.last,
            tokens_in,
            tokens_out,
        })
    }
}

#[derive(Deserialize)]
struct OpenaiModels {
    data: Vec<OpenaiModel>,
}

#[derive(Deserialize)]
struct OpenaiModel {
    id: String,
}

/// A part of a streamed completion.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
}

#[derive(Clone, Copy, Deserialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
}
