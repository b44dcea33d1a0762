//! The connection to the worker that runs an attempt.

use std::time::Duration;

use futures_util::StreamExt as _;
use orchestrator_core::JobId;
use orchestrator_core::config::PrefixSharing;
use orchestrator_core::job::Input;
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::worker::{
    CancelRequest, CancelResponse, ExecuteRequest, NEWEST_EVENT, Resume, WorkerEvent,
};
use pool_core::kit::client::{ApiClient, ClientError, EventStream, Method};
use pool_core::kit::secret::Secret;
use pool_core::kit::sse::SseEvent as _;

use crate::live::LiveJob;
use crate::state::{Lease, ResumePoint};

/// Time limit for a worker's answer, not for its generation.
const ANSWER: Duration = Duration::from_secs(10);

/// Returns the request for an execution. It continues after the tokens of `resume_point`, if readers were shown any.
pub(super) fn request(
    job: JobId,
    lease: &Lease,
    resume_point: ResumePoint,
    sharing: PrefixSharing,
) -> ExecuteRequest {
    let spec = &lease.spec;
    let cache_scope = match (sharing, &spec.session_id) {
        (PrefixSharing::All, _) => None,
        (PrefixSharing::Session, Some(session)) => Some(format!("session {session}")),
        (PrefixSharing::Session, None) => Some(format!("job {job}")),
    };
    let (prompt, messages) = match &spec.input {
        Input::Prompt(prompt) => (Some(prompt.clone()), None),
        Input::Messages(messages) => (None, Some(messages.clone())),
    };
    ExecuteRequest {
        job_id: job.to_string(),
        attempt: lease.attempt,
        fence: lease.fence,
        prompt,
        messages,
        raw: spec.raw,
        allow_special: spec.allow_special,
        system: spec.system.clone(),
        sampling: spec.sampling.for_worker(),
        seed: spec.seed,
        max_tokens: spec.max_tokens,
        stop: spec.stop.clone(),
        // The worker decides whether it can continue, because it knows its file and its build. It can't use tokens of an
        // unknown origin.
        resume: resume_point.origin.map(|origin| Resume {
            token_ids: resume_point.token_ids,
            next_index: Some(resume_point.next_index),
            origin: Some(origin),
            seen_more: resume_point.seen_more,
        }),
        cache_scope,
        refuse_if_full: false,
    }
}

fn client(endpoint: &WorkerEndpoint) -> Result<ApiClient, ClientError> {
    Ok(
        ApiClient::new(&endpoint.url, Some(Secret::new(endpoint.secret.clone())))?
            .with_answer_timeout(ANSWER),
    )
}

/// The stream of one execution, which can be opened again after it broke.
pub(super) struct Connection {
    client: ApiClient,
    job: JobId,
    stream: Option<EventStream>,
    last_id: Option<String>,
    /// Newest event of the execution when the stream was first opened.
    newest: Option<u64>,
}

impl Connection {
    pub(super) fn new(endpoint: &WorkerEndpoint, job: &LiveJob) -> Result<Self, ClientError> {
        let client = client(endpoint)?.with_correlation_id(job.correlation());
        Ok(Self {
            client,
            job: job.id,
            stream: None,
            last_id: None,
            newest: None,
        })
    }

    /// Changes to the worker's current address.
    pub(super) fn move_to(&mut self, endpoint: &WorkerEndpoint) -> Result<(), ClientError> {
        self.client = client(endpoint)?.with_correlation_id(self.job.to_string());
        Ok(())
    }

    /// Starts the execution.
    pub(super) async fn execute(&mut self, request: ExecuteRequest) -> Result<(), ClientError> {
        let call = self.client.request(Method::POST, "/execute").json(&request);
        drop(request);
        self.stream = Some(self.client.events(call).await?);
        Ok(())
    }

    /// Opens the stream after the last received event.
    pub(super) async fn attach(&mut self) -> Result<(), ClientError> {
        self.stream = None;
        let path = format!("/executions/{}/events", self.job);
        let mut call = self.client.request(Method::GET, &path);
        if let Some(id) = &self.last_id {
            call = call.header("last-event-id", id);
        }
        let stream = self.client.events(call).await?;
        if self.newest.is_none() {
            self.newest = stream.header(NEWEST_EVENT).and_then(|id| id.parse().ok());
        }
        self.stream = Some(stream);
        Ok(())
    }

    /// Returns whether every event has come that the execution had when the stream was first opened.
    pub(super) fn has_caught_up(&self) -> bool {
        let last = self
            .last_id
            .as_deref()
            .map_or(Some(0), |id| id.parse().ok());
        self.newest
            .zip(last)
            .is_some_and(|(newest, last)| last >= newest)
    }

    /// Returns the next event. After an error, the stream has to be opened again. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<WorkerEvent, ClientError> {
        let Some(stream) = &mut self.stream else {
            return Err(self.broken("it is not open"));
        };
        match stream.next().await {
            Some(Ok(event)) => {
                let parsed = WorkerEvent::parse(&event.event, &event.data)
                    .map_err(|error| self.broken(&error.to_string()))?;
                if event.id.is_some() {
                    self.last_id = event.id;
                }
                Ok(parsed)
            }
            Some(Err(error)) => Err(error),
            None => Err(self.broken("it ended without a final event")),
        }
    }

    fn broken(&self, detail: &str) -> ClientError {
        ClientError::Broken {
            url: self.client.base_url().to_owned(),
            detail: detail.to_owned(),
        }
    }
}

/// Cancels the execution if it still runs. An execution with a higher fence is not touched.
pub(super) async fn cancel(endpoint: &WorkerEndpoint, job: JobId, fence: u64) {
    let Ok(client) = client(endpoint) else { return };
    let request = CancelRequest {
        job_id: job.to_string(),
        fence,
    };
    if let Err(error) = client.post::<_, CancelResponse>("/cancel", &request).await {
        tracing::debug!(%job, %error, "could not cancel the execution on the worker");
    }
}

/// Lets the worker drop the buffer of a job that is over. A worker that misses the call drops the buffer by itself later.
pub(super) async fn forget(endpoint: &WorkerEndpoint, job: JobId) {
    let Ok(client) = client(endpoint) else { return };
    if let Err(error) = client
        .delete::<serde_json::Value>(&format!("/executions/{job}"))
        .await
    {
        tracing::debug!(%job, %error, "could not delete the buffer on the worker");
    }
}
