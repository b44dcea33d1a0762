//! The contract of [`JobStore`], as tests that every implementation passes. An implementation names its [`Place`] in
//! [`contract`]; its own tests are for what the contract can't see, such as files and plans of queries.

pub mod lists;
pub mod model;
pub mod ownership;
pub mod pools;
pub mod receipts;
pub mod resume;
pub mod writes;

use orchestrator_core::api::events::{Queued, TaskEvent, Token};
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::{AttemptOutcome, JobError, JobErrorCode, JobEvent, JobSpec};

use super::*;

/// A place for data. A store that is opened there has what earlier ones left, and takes over from one that is still open.
pub trait Place {
    /// Returns an empty place.
    fn new() -> Self;
    /// Opens the store.
    async fn open(&self) -> Store;
}

/// Defines the contract's tests for the stores of a [`Place`].
macro_rules! contract {
    ($place:ty) => {
        $crate::state::tests::contract! { $place:
            lists::lists_are_those_of_a_full_look,
            ownership::a_run_that_another_has_followed_writes_nothing,
            ownership::a_run_with_nothing_to_write_notices_that_another_has_followed,
            pools::registrations_outlive_a_crash,
            receipts::a_receipt_is_written_with_the_end_or_not_at_all,
            receipts::a_receipt_outlives_the_texts_and_goes_with_its_job,
            resume::an_attempt_continues_from_what_is_logged,
            writes::a_stale_fence_changes_nothing,
            writes::commands_of_one_commit_fail_alone,
            writes::the_log_takes_every_event_once_and_no_gap,
        }

        #[test]
        fn the_database_follows_the_model() {
            $crate::state::tests::model::the_database_follows_the_model::<$place>();
        }
    };
    ($place:ty: $($module:ident::$test:ident,)+) => {
        $(#[tokio::test]
        async fn $test() {
            use $crate::state::tests::{Place, $module};
            $module::$test(<$place>::new()).await;
        })+
    };
}
pub(super) use contract;

pub fn entry(attempt: u32, seq: u64, event: TaskEvent) -> Arc<LogEntry> {
    Arc::new(LogEntry {
        id: EventId { attempt, seq },
        event,
        token_ids: vec![1, 2],
        origin: None,
    })
}

pub fn token(attempt: u32, seq: u64) -> Arc<LogEntry> {
    entry(
        attempt,
        seq,
        TaskEvent::Token(Token {
            t: format!("{seq},"),
            i: 0,
        }),
    )
}

pub fn events(events: impl IntoIterator<Item = Arc<LogEntry>>) -> Progress {
    Progress {
        started_at: None,
        events: events.into_iter().collect(),
    }
}

/// Digest of `spec("p")`, with a drawn seed, as the last build before version 2 of the form stored it.
pub const EARLIER_DIGEST: &str = "e747196e6a2e1f7b879b1faf1ce6cdc22864c1c8cfe9ba0b3b310b305d72f76a";

pub fn spec(prompt: &str) -> JobSpec {
    let request = TaskSubmitRequest {
        model: "m".into(),
        prompt: Some(prompt.into()),
        ..Default::default()
    };
    request.validate().unwrap()
}

pub async fn submitted(store: &dyn JobStore) -> JobId {
    let job = Job::new(JobId::random(), spec("hi"), crate::clock::now());
    let id = job.id;
    let queued = Queued {
        job_id: id,
        model: job.spec.model.clone(),
        queue_position: 0,
    };
    store
        .submit(job, None, entry(0, 1, TaskEvent::Queued(queued)))
        .await
        .unwrap();
    id
}

/// Returns a key with the fingerprint of `spec(prompt)`.
pub fn key(key: impl ToString, prompt: &str) -> IdempotencyKey {
    IdempotencyKey {
        caller: "c".into(),
        key: key.to_string(),
        fingerprint: Fingerprint::of(&spec(prompt), false).unwrap(),
    }
}

pub fn ending(event: JobEvent, fence: Option<u64>, last: Arc<LogEntry>) -> Ending {
    Ending {
        event,
        fence,
        at: crate::clock::now(),
        progress: events([last]),
        usage: None,
        receipt: None,
        error: None,
        outcome: AttemptOutcome::Failed,
    }
}

pub fn error_event() -> TaskEvent {
    TaskEvent::Error(JobError {
        code: JobErrorCode::Cancelled,
        message: String::new(),
        retriable: false,
    })
}
