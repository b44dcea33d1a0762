//! The waiting jobs, sorted by their turns.

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};

use super::order::Ordered;
use super::{Capacity, Load, QueuedJob, TurnKey};
use crate::job::{JobId, Priority};

/// Waiting jobs, sorted by their turns, with their number and size.
#[derive(Debug, Clone)]
pub struct Line {
    order: Ordered<TurnKey>,
    entries: HashMap<JobId, Entry>,
    bytes: u64,
    batch: usize,
    capacity: Capacity,
}

#[derive(Debug, Clone)]
struct Entry {
    job: Arc<QueuedJob>,
    key: TurnKey,
}

impl Line {
    pub(super) fn new(capacity: Capacity) -> Self {
        Self {
            order: Ordered::default(),
            entries: HashMap::new(),
            bytes: 0,
            batch: 0,
            capacity,
        }
    }

    /// Returns the number of waiting jobs.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Returns whether no job waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of waiting jobs of a class. Promoted jobs count under the class that they were submitted with.
    pub fn depth(&self, priority: Priority) -> usize {
        match priority {
            Priority::Batch => self.batch,
            Priority::Interactive => self.len() - self.batch,
        }
    }

    /// Returns the limits on waiting jobs.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Returns the load of all waiting jobs.
    pub fn load(&self) -> Load {
        Load {
            jobs: self.len(),
            bytes: self.bytes,
        }
    }

    /// Returns whether the job waits.
    pub fn contains(&self, id: JobId) -> bool {
        self.entries.contains_key(&id)
    }

    /// Returns the job if it waits.
    pub fn get(&self, id: JobId) -> Option<&Arc<QueuedJob>> {
        Some(&self.entries.get(&id)?.job)
    }

    /// Returns the sort key of a waiting job.
    pub fn key(&self, id: JobId) -> Option<TurnKey> {
        Some(self.entries.get(&id)?.key)
    }

    /// Returns the first job.
    pub fn first(&self) -> Option<&Arc<QueuedJob>> {
        let (.., id) = self.order.first()?;
        self.get(*id)
    }

    /// Returns the waiting jobs in order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<QueuedJob>> {
        self.order.iter().filter_map(|key| self.get(key.3))
    }

    /// Returns the number of jobs before `key`.
    pub fn rank(&self, key: &TurnKey) -> u64 {
        self.order.rank(key) as u64
    }

    /// Adds a job that does not wait yet. Returns it as it now waits.
    pub(super) fn insert(&mut self, job: QueuedJob, key: TurnKey) -> Arc<QueuedJob> {
        self.order.insert(key);
        self.bytes += job.bytes;
        self.batch += usize::from(job.priority == Priority::Batch);
        let job = Arc::new(job);
        let entry = Entry {
            job: Arc::clone(&job),
            key,
        };
        self.entries.insert(job.id, entry);
        job
    }

    /// Removes a job. Returns it with its sort key.
    pub(super) fn remove(&mut self, id: JobId) -> Option<(Arc<QueuedJob>, TurnKey)> {
        let Entry { job, key } = self.entries.remove(&id)?;
        self.order.remove(&key);
        self.bytes -= job.bytes;
        self.batch -= usize::from(job.priority == Priority::Batch);
        Some((job, key))
    }

    /// Changes the sort key of a waiting job. Returns whether the job waits.
    pub(super) fn sort_again(&mut self, id: JobId, change: impl FnOnce(&mut TurnKey)) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else {
            return false;
        };
        self.order.remove(&entry.key);
        change(&mut entry.key);
        self.order.insert(entry.key);
        true
    }
}
