//! Ends jobs: commits the end, then notifies readers, the running attempt and the scheduler.

use std::sync::Arc;

use orchestrator_core::api::events::{End, TaskEvent};
use orchestrator_core::job::{AttemptOutcome, JobError, JobErrorCode, JobEvent};
use orchestrator_core::{JobId, JobStatus};
use pool_core::kit::crash::crash_point;

use super::JobService;
use crate::clock;
use crate::live::{LiveJob, Order};
use crate::state::{Ending, LogEntry, Progress, StoreError};

/// The end of a job.
#[derive(Debug, Clone)]
pub enum JobEnd {
    /// The text is complete.
    Completed(End),
    /// The job did not complete.
    Error(JobError),
}

impl JobEnd {
    /// Returns the end of a cancelled job.
    pub fn cancelled() -> Self {
        Self::error(JobErrorCode::Cancelled, "the job was cancelled", false)
    }

    /// Returns the end of a job whose time ran out.
    pub fn timeout() -> Self {
        Self::error(
            JobErrorCode::Timeout,
            "the job's `timeout_ms` ran out",
            true,
        )
    }

    /// Returns the end of a job that the daemon can't continue. The cause goes to the log: it may name what clients must not
    /// see.
    pub fn internal() -> Self {
        let message = "the orchestrator could not continue the job; its log says why";
        Self::error(JobErrorCode::Internal, message, true)
    }

    /// Returns whether this is [`JobEnd::internal`].
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::Error(error) if error.code == JobErrorCode::Internal)
    }

    /// Returns the end of a failed job.
    pub fn error(code: JobErrorCode, message: impl Into<String>, retriable: bool) -> Self {
        Self::Error(JobError {
            code,
            message: message.into(),
            retriable,
        })
    }

    /// Returns the job's last event.
    fn last_event(&self) -> TaskEvent {
        match self {
            Self::Completed(end) => TaskEvent::End(end.clone()),
            Self::Error(error) => TaskEvent::Error(error.clone()),
        }
    }

    /// Returns the record of the end, with `events` as its part of the log, on behalf of the attempt with `fence` or of none.
    fn into_record(self, fence: Option<u64>, events: Vec<Arc<LogEntry>>) -> Ending {
        let (event, outcome) = match &self {
            Self::Completed(_) => (JobEvent::Finished, AttemptOutcome::Completed),
            Self::Error(error) => match error.code {
                JobErrorCode::Cancelled => (JobEvent::Cancel, AttemptOutcome::Cancelled),
                JobErrorCode::Timeout => (JobEvent::DeadlinePassed, AttemptOutcome::Expired),
                JobErrorCode::WorkerLost => (JobEvent::Errored, AttemptOutcome::WorkerLost),
                _ => (JobEvent::Errored, AttemptOutcome::Failed),
            },
        };
        let (usage, receipt, error) = match self {
            Self::Completed(end) => (Some(end.usage()), end.receipt, None),
            Self::Error(error) => (None, None, Some(error)),
        };
        Ending {
            event,
            fence,
            at: clock::now(),
            progress: Progress {
                started_at: None,
                events,
            },
            usage,
            receipt,
            error,
            outcome,
        }
    }
}

/// The job was dropped by [`JobService::drop_unrecordable`].
#[derive(Debug, thiserror::Error)]
#[error("{0} was dropped: its record allows neither an attempt nor an end")]
pub struct UnrecordableJob(pub JobId);

impl JobService {
    /// Ends a job on behalf of the attempt with `fence`, or of none: commits the end, then notifies readers and the running
    /// attempt. Returns the job's final state, which may come from an earlier end.
    pub async fn end(
        &self,
        live: &LiveJob,
        fence: Option<u64>,
        end: JobEnd,
    ) -> Result<JobStatus, StoreError> {
        let log = match live.log.lock().await {
            Ok(log) => log,
            Err(status) => return Ok(status),
        };
        let written = log.finish(end.last_event(), |events| async move {
            crash_point("end.uncommitted");
            let record = end.into_record(fence, events);
            let status = self.store.end(live.id, record).await?;
            crash_point("end.committed");
            Ok(status)
        });
        let status = written.await?;
        self.settle(live, status);
        tracing::info!(job = %live.id, %status, "job over");
        Ok(status)
    }

    /// Cancels a job and returns its final state; `None` if there is no such job.
    pub async fn cancel(&self, id: JobId) -> Result<Option<JobStatus>, StoreError> {
        match self.live.get(id) {
            Some(live) => {
                let ended = self.end(&live, None, JobEnd::cancelled());
                ended.await.map(Some)
            }
            None => self.store.status(id).await,
        }
    }

    /// Drops a job whose failure cannot be recorded. Its record stays as it is, and the next start reads it again: so the streams
    /// of its readers end without an event, which a later start might have to take back.
    pub async fn drop_unrecordable(&self, live: &LiveJob) {
        if let Ok(log) = live.log.lock().await {
            log.abandon(JobStatus::Failed);
            self.settle(live, JobStatus::Failed);
        }
    }

    /// Stops the running attempt and wakes the scheduler after an end. The caller holds the job's log.
    fn settle(&self, live: &LiveJob, status: JobStatus) {
        if let Some(attempt) = self.live.attempt(live.id) {
            attempt.order(Order::Stop);
        }
        self.live.finished(live.id, status);
        let finished = &self.metrics.finished;
        finished.with_label_values(&[status.as_str()]).inc();
        self.changed.notify_one();
    }
}
