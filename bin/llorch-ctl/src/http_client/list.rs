//! A list of jobs as one sequence of pages that contains each job exactly once, even while jobs change.

use std::collections::{HashSet, VecDeque};

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::{JobStatus, Priority};
use pool_core::kit::client::ClientError;

use super::Orchestrator;

/// Jobs requested for one page: the orchestrator's maximum.
const PAGE: usize = 500;

/// Filter of a list of jobs.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    /// Accepted states; empty for all.
    pub statuses: Vec<JobStatus>,
    /// Only of this model.
    pub model: Option<String>,
    /// Only of this priority.
    pub priority: Option<Priority>,
}

impl JobFilter {
    pub(super) fn query(&self) -> Vec<(&'static str, String)> {
        let names: Vec<_> = self.statuses.iter().map(|status| status.as_str()).collect();
        let parts = [
            ("status", Some(names.join(",")).filter(|n| !n.is_empty())),
            ("model", self.model.clone()),
            (
                "priority",
                self.priority.map(|priority| priority.to_string()),
            ),
        ];
        parts
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect()
    }

    /// Returns the filter restricted to `states`; `None` if no state remains.
    pub fn within(&self, states: &[JobStatus]) -> Option<Self> {
        let wanted =
            |status: &&JobStatus| self.statuses.is_empty() || self.statuses.contains(status);
        let statuses: Vec<_> = states.iter().filter(wanted).copied().collect();
        (!statuses.is_empty()).then(|| Self {
            statuses,
            ..self.clone()
        })
    }
}

/// The pages of a list. Finished jobs are requested after unfinished ones: a job that ends meanwhile appears in the
/// second part, unless the first part already had it.
#[derive(Debug)]
pub struct JobPages {
    orchestrator: Orchestrator,
    parts: VecDeque<JobFilter>,
    short_ids: bool,
    cursor: Option<String>,
    /// Jobs of the first part, which the second part may contain as well.
    seen: HashSet<JobId>,
}

impl JobPages {
    pub(super) fn new(orchestrator: Orchestrator, filter: &JobFilter, short_ids: bool) -> Self {
        let states: [&[JobStatus]; 2] = [&JobStatus::ACTIVE, &JobStatus::TERMINAL];
        Self {
            orchestrator,
            parts: states
                .into_iter()
                .filter_map(|states| filter.within(states))
                .collect(),
            short_ids,
            cursor: None,
            seen: HashSet::new(),
        }
    }

    /// Returns whether the next page has finished jobs.
    pub fn has_reached_finished(&self) -> bool {
        let states = self.parts.front().map(|part| &part.statuses);
        states.is_some_and(|states| states.iter().all(|status| status.is_terminal()))
    }

    /// Returns the next jobs, at most `limit`; `None` at the end. A page may be empty.
    pub async fn next(&mut self, limit: usize) -> Result<Option<Vec<TaskSummary>>, ClientError> {
        let Some(filter) = self.parts.front() else {
            return Ok(None);
        };
        let mut query = filter.query();
        query.push(("limit", limit.clamp(1, PAGE).to_string()));
        if self.short_ids {
            query.push(("short_ids", "true".to_owned()));
        }
        query.extend(self.cursor.take().map(|cursor| ("cursor", cursor)));
        let mut page = self.orchestrator.page(&query).await?;
        page.jobs.retain(|job| !self.seen.contains(&job.id));
        if self.parts.len() > 1 {
            self.seen.extend(page.jobs.iter().map(|job| job.id));
        }
        self.cursor = page.next_cursor;
        if self.cursor.is_none() {
            self.parts.pop_front();
        }
        Ok(Some(page.jobs))
    }
}
