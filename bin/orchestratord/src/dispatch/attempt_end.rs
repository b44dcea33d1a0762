//! The end of an attempt, and what a worker's errors mean for its job.

use orchestrator_core::api::events::End;
use orchestrator_core::job::{JobError, JobErrorCode};
use pool_core::api::worker::{CacheShortage, WorkerError, WorkerErrorCode};
use pool_core::kit::client::ClientError;

use crate::metrics::Metrics;

/// The end of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum AttemptEnd {
    /// The text is complete.
    Finished(End),
    /// The job fails with this error.
    Failed(JobError),
    /// Another attempt may follow.
    Lost(String),
    /// The worker does not have the execution of an attempt from before a restart; the attempt does not count.
    NotFound(String),
    /// The worker had no room; the attempt does not count.
    Refused(String),
    /// The worker's context is too small, the model's is not; the attempt does not count.
    Cramped {
        /// Smallest context that runs the job, in tokens.
        needed: u32,
        /// The worker's error message.
        reason: String,
    },
    /// The worker's cache has no room for the job now; the attempt does not count.
    NoRoom {
        /// Sizes of the request and of the free cache.
        shortage: CacheShortage,
        /// The worker's error message.
        reason: String,
    },
    /// The record does not allow the job to continue.
    Broken,
    /// The job ended, or belongs to another attempt.
    Over,
    /// The daemon stops; the execution continues.
    Stopping,
}

impl AttemptEnd {
    /// Counts the end of the attempt. An attempt that continues on its worker while the daemon stops has not ended.
    pub(super) fn count(&self, metrics: &Metrics) {
        if let Some(label) = self.label() {
            metrics.attempts_ended.with_label_values(&[label]).inc();
        }
    }

    /// Returns the name in the metrics; `None` if the attempt continues.
    fn label(&self) -> Option<&'static str> {
        Some(match self {
            Self::Finished(_) => "completed",
            Self::Failed(_) => "failed",
            Self::Lost(_) => "lost",
            Self::NotFound(_) => "not_found",
            Self::Refused(_) | Self::Cramped { .. } | Self::NoRoom { .. } => "refused",
            Self::Broken => "broken",
            Self::Over => "over",
            Self::Stopping => return None,
        })
    }
}

fn of_code(code: WorkerErrorCode, message: &str, retriable: bool) -> AttemptEnd {
    use WorkerErrorCode as W;
    let failed = |code| {
        AttemptEnd::Failed(JobError {
            code,
            message: message.to_owned(),
            retriable: false,
        })
    };
    let lost = || AttemptEnd::Lost(format!("{}: {message}", code.as_str()));
    match code {
        W::InvalidRequest => failed(JobErrorCode::InvalidRequest),
        W::ContextOverflow => failed(JobErrorCode::ContextOverflow),
        W::TemplateFailed => failed(JobErrorCode::TemplateFailed),
        W::InferenceFailed if !retriable => failed(JobErrorCode::InferenceFailed),
        W::Busy | W::CacheFull | W::Loading => {
            AttemptEnd::Refused(format!("{}: {message}", code.as_str()))
        }
        W::InferenceFailed
        | W::Cancelled
        | W::Replaced
        | W::ShuttingDown
        | W::StaleFence
        | W::NotFound => lost(),
    }
}

/// Returns the end that an `error` event means.
pub(super) fn of_error(error: &WorkerError) -> AttemptEnd {
    if let Some(shortage) = error.shortage
        && error.code == WorkerErrorCode::CacheFull
    {
        return AttemptEnd::NoRoom {
            shortage,
            reason: format!("{}: {}", error.code.as_str(), error.message),
        };
    }
    if let Some(overflow) = error.overflow
        && error.code == WorkerErrorCode::ContextOverflow
        && overflow.needed_tokens <= overflow.model_context
    {
        return AttemptEnd::Cramped {
            needed: overflow.needed_tokens,
            reason: format!("{}: {}", error.code.as_str(), error.message),
        };
    }
    of_code(error.code, &error.message, error.retriable)
}

/// Returns the end that a refused `/execute` means; `None` if the worker may have received the request all the same.
pub(super) fn of_refusal(error: &ClientError) -> Option<AttemptEnd> {
    let ClientError::Api { status, error } = error else {
        return None;
    };
    let code = serde_json::from_value(serde_json::Value::from(error.code.clone()));
    Some(match (code, status) {
        // A worker that is about to stop was a bad choice and no loss.
        (Ok(WorkerErrorCode::ShuttingDown), _) => {
            AttemptEnd::Refused(format!("SHUTTING_DOWN: {}", error.message))
        }
        (Ok(code), _) => of_code(code, &error.message, error.retriable),
        (Err(_), 400 | 413 | 415 | 422) => {
            of_code(WorkerErrorCode::InvalidRequest, &error.message, false)
        }
        (Err(_), 503) => AttemptEnd::Refused(error.message.clone()),
        (Err(_), _) => AttemptEnd::Lost(format!("{}: {}", error.code, error.message)),
    })
}

#[cfg(test)]
mod tests {
    use pool_core::api::worker::ContextOverflow;

    use super::*;

    // [ORCHD-034] P6: the whole table.
    #[test]
    fn an_error_of_the_request_is_never_retried_and_a_full_worker_never_counted() {
        use WorkerErrorCode as W;
        let label = |code, retriable| of_code(code, "m", retriable).label().unwrap();
        for code in [W::InvalidRequest, W::ContextOverflow, W::TemplateFailed] {
            assert_eq!(label(code, true), "failed", "{code:?}");
        }
        assert_eq!(
            (
                label(W::InferenceFailed, false),
                label(W::InferenceFailed, true)
            ),
            ("failed", "lost")
        );
        for code in [W::Busy, W::CacheFull, W::Loading] {
            assert_eq!(label(code, true), "refused", "{code:?}");
        }
        for code in [
            W::Cancelled,
            W::Replaced,
            W::ShuttingDown,
            W::StaleFence,
            W::NotFound,
        ] {
            assert_eq!(label(code, true), "lost", "{code:?}");
        }
    }

    // [ORCHD-190]
    #[test]
    fn a_context_that_another_worker_may_have_fails_no_job() {
        let of = |needed_tokens, model_context| {
            of_error(&WorkerError {
                code: WorkerErrorCode::ContextOverflow,
                message: "m".into(),
                retriable: false,
                overflow: Some(ContextOverflow {
                    prompt_tokens: needed_tokens - 1,
                    needed_tokens,
                    context_length: 512,
                    model_context,
                }),
                shortage: None,
            })
        };
        let cramped = AttemptEnd::Cramped {
            needed: 732,
            reason: "CONTEXT_OVERFLOW: m".into(),
        };
        assert_eq!(of(732, 732), cramped);
        assert_eq!(of(733, 732).label(), Some("failed"));
    }
}
