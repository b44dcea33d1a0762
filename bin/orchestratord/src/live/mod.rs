//! One job that is not over: its event log, and the attempt that runs it.

mod log;
mod stream_log;

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::scheduler::Why;
use tokio::sync::watch;

use crate::clock;

pub use log::JobLog;
pub use stream_log::Read;

/// A job that is not over, or ended a moment ago.
#[derive(Debug)]
pub struct LiveJob {
    /// Id.
    pub id: JobId,
    /// Event log.
    pub log: JobLog,
    /// Time of acceptance.
    pub created_at: Timestamp,
    /// Time of expiry.
    pub deadline: Option<Timestamp>,
    /// Correlation id of the request that submitted the job in this run of the daemon.
    correlation: Option<String>,
}

impl LiveJob {
    /// Returns a job of which an earlier run of the daemon, or none, has logged events.
    pub fn new(id: JobId, created_at: Timestamp, deadline: Option<Timestamp>, log: JobLog) -> Self {
        Self {
            id,
            log,
            created_at,
            deadline,
            correlation: None,
        }
    }

    /// Adds the correlation id of the request that submitted the job.
    #[must_use]
    pub fn submitted_by(mut self, correlation: &str) -> Self {
        self.correlation = Some(correlation.to_owned());
        self
    }

    /// Returns the correlation id for requests to other daemons: the client's, or after a restart the job's own id.
    pub fn correlation(&self) -> String {
        self.correlation
            .clone()
            .unwrap_or_else(|| self.id.to_string())
    }
}

/// An order to a running attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Continue.
    Go,
    /// The pool reported the worker gone, for this reason.
    WorkerGone(String),
    /// The job is over.
    Stop,
}

/// An attempt that holds a slot of a worker.
#[derive(Debug)]
pub struct ActiveAttempt {
    /// Id of the pool.
    pub pool_id: String,
    /// Id of the worker on the pool.
    pub worker_id: String,
    /// Point of the timeline at which the attempt began.
    pub began: Timestamp,
    /// Reason for the choice of the worker; `None` if no pass of this run of the daemon chose it.
    pub why: Option<Why>,
    /// True while the worker's stream is open.
    pub attached: AtomicBool,
    /// True once the worker has taken the job. An attempt of an earlier run of the daemon counts as taken.
    taken: AtomicBool,
    orders: watch::Sender<Order>,
}

impl ActiveAttempt {
    /// Returns an attempt on this worker.
    pub fn new(pool_id: String, worker_id: String) -> Self {
        Self {
            pool_id,
            worker_id,
            began: clock::now(),
            why: None,
            attached: AtomicBool::new(false),
            taken: AtomicBool::new(true),
            orders: watch::Sender::new(Order::Go),
        }
    }

    /// Returns an attempt on a worker that a pass chose for the reason `why`.
    pub fn chosen(pool_id: String, worker_id: String, why: Why) -> Self {
        Self {
            why: Some(why),
            taken: AtomicBool::new(false),
            ..Self::new(pool_id, worker_id)
        }
    }

    /// Returns whether the worker has taken the job.
    pub fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Relaxed)
    }

    /// Records that the worker has taken the job. Returns false if that was known.
    pub fn mark_taken(&self) -> bool {
        !self.taken.swap(true, Ordering::Relaxed)
    }

    /// Gives an order. No order follows a stop, and of several reasons for which a worker is gone the first counts.
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

    /// Returns a receiver of orders.
    pub fn orders(&self) -> watch::Receiver<Order> {
        self.orders.subscribe()
    }

    /// Returns whether the worker's stream is open.
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }
}
