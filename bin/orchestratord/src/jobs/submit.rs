//! Accepts tasks: checks the model, stores the job, and queues it.

use std::sync::Arc;

use orchestrator_core::api::events::{EventId, Queued, TaskEvent};
use orchestrator_core::job::{Job, JobSpec};
use orchestrator_core::queue::QueuedJob;
use orchestrator_core::{JobId, JobStatus};
use pool_core::ModelRef;
use pool_core::catalog::{Catalog, CatalogEntry};
use pool_core::kit::crash::crash_point;

use super::JobService;
use crate::clock;
use crate::fleet::Fleet;
use crate::live::{JobLog, LiveJob};
use crate::queue::AdmissionRefused;
use crate::state::{IdempotencyKey, LogEntry, StoreError, Submitted};

/// A task that was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Neither a catalogue entry nor a file of a pool.
    #[error("there is no model `{model}`")]
    UnknownModel {
        /// Requested reference.
        model: ModelRef,
        /// Suggested references, as an imperative sentence.
        hint: String,
    },
    /// Several files of the hub match.
    #[error("`{model}` is ambiguous: it matches {}", meant.iter().map(|meant| format!("`{meant}`")).collect::<Vec<_>>().join(", "))]
    Ambiguous {
        /// Requested reference, which leaves revision or file open.
        model: ModelRef,
        /// Matching models, at least two.
        meant: Vec<ModelRef>,
    },
    /// A pool is downloading the model's file.
    #[error("pool `{pool}` is downloading `{model}`")]
    Downloading {
        /// Requested reference.
        model: ModelRef,
        /// Pool with the download.
        pool: String,
    },
    /// No worker can run the model.
    #[error("`{model}` can't run: {reason}")]
    UnsupportedModel {
        /// Requested reference.
        model: ModelRef,
        /// Reason, as part of a sentence.
        reason: String,
    },
    /// No pool has reported the model, and a registered pool has not reported yet.
    #[error("model `{model}` is not known yet: pool `{pool}` has registered, but not reported")]
    Unheard {
        /// Requested reference.
        model: ModelRef,
        /// Pool that has not reported yet.
        pool: String,
    },
    /// More tokens than the model's context holds.
    #[error("`max_tokens` is {max_tokens}; `{model}` has a context of {context_length} tokens")]
    TooManyTokens {
        /// Requested model, by its name in the catalogue.
        model: ModelRef,
        /// Requested number of tokens.
        max_tokens: u32,
        /// Number of tokens of the model's context.
        context_length: u32,
    },
    /// A queue without a free place.
    #[error(transparent)]
    Queue(#[from] AdmissionRefused),
    /// The daemon is stopping.
    #[error("orchestratord is stopping")]
    Stopping,
    /// Failed storage of the job.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A task that is stored.
#[derive(Debug)]
pub struct Accepted {
    /// Id of the job, which an earlier request with the same key may have made.
    pub id: JobId,
    /// State of the job.
    pub status: JobStatus,
    /// Number of jobs ahead in the queue; `None` if the job does not wait.
    pub position: Option<u64>,
}

/// Returns why no worker can run a model. Pools with the file have read its header, and their build may support more
/// than this one, so they decide; if no pool has the file, the catalogue does.
pub fn unsupported(
    fleet: &Fleet,
    model: &ModelRef,
    entry: Option<&CatalogEntry>,
) -> Option<String> {
    fleet
        .support(model)
        .unwrap_or_else(|| Some(entry?.unsupported()?.to_string()))
}

/// Returns the model by the name that pools give it, if a task may ask for it and for `max_tokens` tokens.
fn known_model(
    fleet: &Fleet,
    catalog: &Catalog,
    model: &ModelRef,
    max_tokens: u32,
) -> Result<ModelRef, SubmitError> {
    let entry = catalog.find(model);
    let supported = |model: ModelRef| match unsupported(fleet, &model, entry) {
        Some(reason) => Err(SubmitError::UnsupportedModel { model, reason }),
        None => Ok(model),
    };
    if let Some(entry) = entry {
        let model = supported(entry.model_ref())?;
        return match entry.context_length {
            Some(context_length) if max_tokens > context_length => {
                Err(SubmitError::TooManyTokens {
                    model,
                    max_tokens,
                    context_length,
                })
            }
            _ => Ok(model),
        };
    }
    let mut meant = fleet.meant_by(model);
    if meant.len() > 1 {
        let model = model.clone();
        return Err(SubmitError::Ambiguous { model, meant });
    }
    if let Some(meant) = meant.pop() {
        return supported(meant);
    }
    if let Some(pool) = fleet.downloads(model) {
        let model = model.clone();
        return Err(SubmitError::Downloading { model, pool });
    }
    if let Some(pool) = fleet.awaited(clock::now()) {
        let model = model.clone();
        return Err(SubmitError::Unheard { model, pool });
    }
    let hint = match model {
        ModelRef::Alias(id) => match catalog.nearest_ids(id).join("` or `") {
            near if near.is_empty() => {
                "`GET /v2/models` lists the models that tasks may name".to_owned()
            }
            near => format!("did you mean `{near}`? `GET /v2/models` lists all"),
        },
        ModelRef::Hub { .. } => "use the id of a catalogue entry, see `GET /v2/models`: no entry has this file".to_owned(),
        ModelRef::File(_) => {
            "use a model file below `models.allow_paths` of a registered pool: no pool offers this one".to_owned()
        }
    };
    Err(SubmitError::UnknownModel {
        model: model.clone(),
        hint,
    })
}

/// A job that [`JobService::store_job`] did not store.
enum NotStored {
    /// The idempotency key names an earlier job, in this state.
    Known(JobId, JobStatus),
    /// Failed write to the database.
    Failed(StoreError),
}

impl JobService {
    /// Stores a job and queues it, unless `key` names a stored one. `correlation` is the correlation id of the request.
    pub async fn submit(
        &self,
        fleet: &Fleet,
        catalog: &Catalog,
        mut spec: JobSpec,
        key: Option<IdempotencyKey>,
        correlation: &str,
    ) -> Result<Accepted, SubmitError> {
        if self.shutdown.is_requested() {
            return Err(SubmitError::Stopping);
        }
        // Asked first: a repeated request is answered even if the queue is full or the model has gone.
        if let Some(key) = &key
            && let Some((id, status)) = self.store.known_key(key).await?
        {
            return Ok(self.known(id, status));
        }
        spec.model = known_model(fleet, catalog, &spec.model, spec.max_tokens)?;
        let now = clock::now();
        let job = Job::new(JobId::at(now), spec, now);
        let queued = QueuedJob::new(&job, None);
        let (promise, position) = self.live.promise(&queued, || fleet.is_unknown(now), now)?;

        let id = job.id;
        let log = JobLog::new(EventId { attempt: 0, seq: 0 }, false);
        let live = LiveJob::new(id, now, job.deadline(), log).submitted_by(correlation);
        let live = Arc::new(live);
        let event = Queued {
            job_id: id,
            model: job.spec.model.clone(),
            queue_position: position,
        };
        let log = live.log.lock().await;
        let log = log.expect("a job that nothing else knows has not ended");
        // Live before the commit makes it visible in lists and to requests with the same key: those wait for the log.
        self.live.insert(Arc::clone(&live));
        let stored = log.commit(Some((TaskEvent::Queued(event), None)), |events| {
            self.store_job(job, key, events)
        });
        match stored.await {
            Ok(()) => {}
            Err(NotStored::Known(known_id, status)) => {
                self.live.forget(id);
                return Ok(self.known(known_id, status));
            }
            Err(NotStored::Failed(error)) => {
                self.live.forget(id);
                return Err(error.into());
            }
        }
        self.metrics
            .enqueued
            .with_label_values(&[queued.priority.as_str()])
            .inc();
        self.live.put(queued);
        drop(log);
        drop(promise);
        tracing::info!(job = %id, correlation_id = correlation, "job accepted");
        self.changed.notify_one();
        Ok(Accepted {
            id,
            status: JobStatus::Queued,
            position: Some(position),
        })
    }

    async fn store_job(
        &self,
        job: Job,
        key: Option<IdempotencyKey>,
        mut events: Vec<Arc<LogEntry>>,
    ) -> Result<(), NotStored> {
        let first = events.pop().expect("the log begins with this event");
        match self.store.submit(job, key, first).await {
            Ok(Submitted::New) => {
                crash_point("submit.committed");
                Ok(())
            }
            Ok(Submitted::Known(id, status)) => Err(NotStored::Known(id, status)),
            Err(error) => Err(NotStored::Failed(error)),
        }
    }

    fn known(&self, id: JobId, status: JobStatus) -> Accepted {
        Accepted {
            id,
            status,
            position: self.live.position(id, clock::now()),
        }
    }
}
