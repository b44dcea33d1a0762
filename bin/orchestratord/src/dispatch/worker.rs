//! The connection to the worker that runs an attempt.

use std::time::Duration;

use futures_util::StreamExt as _;
use orchestrator_core::JobId;
use orchestrator_core::job::Input;
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::worker::{CancelRequest, CancelResponse, ExecuteRequest, WorkerEvent};
use pool_core::client::{ApiClient, ClientError, EventStream, Method};
use pool_core::secret::Secret;

use crate::state::Lease;

/// How long a worker may take to answer; generating is no part of it.
const ANSWER: Duration = Duration::from_secs(10);
/// The pauses before a broken stream is opened again: for a connection that was cut, not for a worker that is away.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(250)];

/// What the worker is asked to do.
pub(super) fn request(job: JobId, lease: &Lease) -> ExecuteRequest {
    let spec = &lease.spec;
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
        system: spec.system.clone(),
        sampling: spec.sampling,
        seed: spec.seed,
        max_tokens: spec.max_tokens,
        stop: spec.stop.clone(),
        resume: None,
    }
}

fn client(endpoint: &WorkerEndpoint) -> Result<ApiClient, ClientError> {
    Ok(
        ApiClient::new(&endpoint.url, Some(Secret::new(endpoint.secret.clone())))?
            .with_answer_timeout(ANSWER),
    )
}

/// The stream of one execution, which can be opened again where it broke.
pub(super) struct Connection {
    client: ApiClient,
    job: JobId,
    stream: Option<EventStream>,
    last_id: Option<String>,
}

impl Connection {
    pub(super) fn new(endpoint: &WorkerEndpoint, job: JobId) -> Result<Self, ClientError> {
        let client = client(endpoint)?.with_correlation_id(job.to_string());
        Ok(Self {
            client,
            job,
            stream: None,
            last_id: None,
        })
    }

    /// Starts the execution.
    pub(super) async fn execute(&mut self, request: &ExecuteRequest) -> Result<(), ClientError> {
        let call = self.client.request(Method::POST, "/execute").json(request);
        self.stream = Some(self.client.events(call).await?);
        Ok(())
    }

    /// Opens the stream again after the last event that came.
    pub(super) async fn reattach(&mut self) -> Result<(), ClientError> {
        self.stream = None;
        let path = format!("/executions/{}/events", self.job);
        let mut last = None;
        for pause in PAUSES {
            tokio::time::sleep(pause).await;
            let mut call = self.client.request(Method::GET, &path);
            if let Some(id) = &self.last_id {
                call = call.header("last-event-id", id);
            }
            match self.client.events(call).await {
                Ok(stream) => {
                    self.stream = Some(stream);
                    return Ok(());
                }
                // It knows nothing of the execution, or does not want us: asking again changes nothing.
                Err(error @ ClientError::Api { .. }) => return Err(error),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| self.broken("it was not opened")))
    }

    /// The next event. An error means that the stream has to be opened again. Safe to drop half-way.
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
            None => Err(self.broken("it ended without a last event")),
        }
    }

    fn broken(&self, detail: &str) -> ClientError {
        ClientError::Broken {
            url: self.client.base_url().to_owned(),
            detail: detail.to_owned(),
        }
    }
}

/// Ends the execution where it still runs; an execution with a higher fence is not touched.
pub(super) async fn cancel(endpoint: &WorkerEndpoint, job: JobId, fence: u64) {
    let Ok(client) = client(endpoint) else { return };
    let request = CancelRequest {
        job_id: job.to_string(),
        fence,
    };
    if let Err(error) = client.post::<_, CancelResponse>("/cancel", &request).await {
        tracing::debug!(%job, %error, "the worker did not hear that the execution is to end");
    }
}

/// Lets the worker drop the buffer of a job that is over. Where it does not hear it drops the buffer by itself, later.
pub(super) async fn forget(endpoint: &WorkerEndpoint, job: JobId) {
    let Ok(client) = client(endpoint) else { return };
    if let Err(error) = client
        .delete::<serde_json::Value>(&format!("/executions/{job}"))
        .await
    {
        tracing::debug!(%job, %error, "the worker did not hear that the buffer may go");
    }
}
