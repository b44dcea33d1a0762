//! The order `fifo`.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Capacity, JobQueue, Line, QueuedJob, TurnKey};
use crate::job::JobId;

/// The order of arrival, whatever a job's priority and session. A job that returns to the queue keeps its place.
#[derive(Debug, Clone)]
pub struct FifoQueue {
    line: Line,
}

impl FifoQueue {
    /// Returns an empty queue.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            line: Line::new(capacity),
        }
    }
}

impl JobQueue for FifoQueue {
    fn line(&self) -> &Line {
        &self.line
    }

    fn put_back(&mut self, job: QueuedJob) -> Arc<QueuedJob> {
        self.line.remove(job.id);
        let key = self.key_for(&job);
        self.line.insert(job, key)
    }

    fn take(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        self.remove(id)
    }

    fn remove(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        Some(self.line.remove(id)?.0)
    }

    fn promote(&mut self, _now: Timestamp) -> Vec<JobId> {
        Vec::new()
    }

    fn key_for(&self, job: &QueuedJob) -> TurnKey {
        (false, 0, job.created_at, job.id)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{at, drain, job};
    use super::*;
    use crate::job::Priority;

    // [ORCHCORE-190]
    #[test]
    fn jobs_have_their_turns_in_the_order_of_arrival() {
        let mut queue = FifoQueue::new(Capacity::default());
        let jobs = [
            job(0, Priority::Batch, Some("a")),
            job(1, Priority::Interactive, Some("a")),
            job(2, Priority::Batch, None),
            job(3, Priority::Interactive, Some("b")),
        ];
        for job in &jobs {
            queue.enqueue(job.clone()).unwrap();
        }
        assert_eq!(queue.position(jobs[3].id, at(9)), Some(3));
        assert_eq!(queue.line().depth(Priority::Batch), 2);
        // One that comes back has its old place again.
        let first = queue.dequeue(at(4)).unwrap();
        queue.put_back(QueuedJob::clone(&first));
        assert_eq!(drain(&mut queue, at(9_000)), jobs.map(|job| job.id));
    }
}
