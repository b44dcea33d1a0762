//! One job that is not over.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use orchestrator_core::api::events::EventId;
use orchestrator_core::scheduler::Why;
use orchestrator_core::{JobId, JobStatus};
use tokio::sync::watch;

use crate::streams::Hub;

/// A job that is not over, or ended a moment ago.
#[derive(Debug)]
pub struct LiveJob {
    /// Id.
    pub id: JobId,
    /// Its events.
    pub hub: Hub,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When it expires.
    pub deadline: Option<Timestamp>,
    /// The correlation id of the request that submitted it, as far as this run of the daemon knows.
    correlation: Option<String>,
    /// Held by whoever changes the job's state or adds to its log, over the commit: what readers see has one order, and
    /// nothing is relayed after an end that is being committed.
    pub gate: tokio::sync::Mutex<()>,
    ended: OnceLock<JobStatus>,
}

impl LiveJob {
    /// A job whose log ends at `last`.
    pub fn new(
        id: JobId,
        created_at: Timestamp,
        deadline: Option<Timestamp>,
        last: EventId,
    ) -> Self {
        Self {
            id,
            hub: Hub::new(last),
            created_at,
            deadline,
            correlation: None,
            gate: tokio::sync::Mutex::new(()),
            ended: OnceLock::new(),
        }
    }

    /// The same, submitted by this request.
    #[must_use]
    pub fn submitted_by(mut self, correlation: &str) -> Self {
        self.correlation = Some(correlation.to_owned());
        self
    }

    /// The correlation id under which other daemons hear of it: the client's, or after a restart the job's own id.
    pub fn correlation(&self) -> String {
        self.correlation
            .clone()
            .unwrap_or_else(|| self.id.to_string())
    }

    /// The state in which it ended. To be asked while the gate is held.
    pub fn ended(&self) -> Option<JobStatus> {
        self.ended.get().copied()
    }

    /// Notes the end.
    pub fn end(&self, status: JobStatus) {
        let _ = self.ended.set(status);
    }
}

/// What an attempt is told from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Go on.
    Go,
    /// The pool says that the worker is gone, and why.
    WorkerGone(String),
    /// The job is over.
    Stop,
}

/// An attempt that holds a slot of a worker.
#[derive(Debug)]
pub struct ActiveAttempt {
    /// The pool.
    pub pool_id: String,
    /// The worker.
    pub worker_id: String,
    /// When it began.
    pub began: Timestamp,
    /// Why it went where it went; `None` where no pass of this run of the daemon chose it.
    pub why: Option<Why>,
    /// Whether the worker's stream is open.
    pub attached: AtomicBool,
    orders: watch::Sender<Order>,
}

impl ActiveAttempt {
    /// An attempt on this worker.
    pub fn new(pool_id: String, worker_id: String) -> Self {
        Self {
            pool_id,
            worker_id,
            began: crate::clock::now(),
            why: None,
            attached: AtomicBool::new(false),
            orders: watch::Sender::new(Order::Go),
        }
    }

    /// An attempt on a worker that a pass chose, and why it did.
    pub fn chosen(pool_id: String, worker_id: String, why: Why) -> Self {
        Self {
            why: Some(why),
            ..Self::new(pool_id, worker_id)
        }
    }

    /// Gives an order. Nothing follows a stop, and the first reason for which a worker is gone is the one that counts.
    pub fn order(&self, order: Order) {
        self.orders.send_if_modified(|current| {
            let heed = matches!(
                (&*current, &order),
                (Order::Go, _) | (Order::WorkerGone(_), Order::Stop)
            );
            if heed {
                *current = order;
            }
            heed
        });
    }

    /// Hears orders.
    pub fn orders(&self) -> watch::Receiver<Order> {
        self.orders.subscribe()
    }

    /// Whether the worker's stream is open.
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }
}
