//! Explanations of a job's wait and of its attempts' placements.

use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::{AttemptPlacement, TaskExplanation};

use super::JobService;
use crate::clock;
use crate::fleet::Fleet;
use crate::state::StoreError;

/// Number of log events read at once.
const PAGE: usize = 1024;

impl JobService {
    /// Explains a job's wait and placements. Returns `None` if the job does not exist.
    pub async fn explain(
        &self,
        fleet: &Fleet,
        id: JobId,
    ) -> Result<Option<TaskExplanation>, StoreError> {
        // Read the running attempt before the database: if it ends in between, the log already has the reason for its placement.
        let running = self.live.attempt(id);
        let mut waiting = self.live.waiting(id, clock::now());
        if let Some(waiting) = &mut waiting
            && let Some(awaited) = fleet.awaited_words(clock::now())
        {
            waiting.explanation.message += &format!(" ({awaited})");
        }
        let Some((job, _)) = self.store.job(id).await? else {
            return Ok(None);
        };
        let begun = self.begun(id).await?;
        let placements = job.attempts.iter().map(|attempt| {
            let logged = begun.iter().find(|(number, _)| *number == attempt.number);
            let held = running.as_ref().filter(|held| {
                attempt.ended_at.is_none()
                    && held.pool_id == attempt.pool_id
                    && held.worker_id == attempt.worker_id
            });
            let why = logged.and_then(|(_, why)| why.clone());
            AttemptPlacement {
                attempt: attempt.number,
                pool_id: attempt.pool_id.clone(),
                worker_id: attempt.worker_id.clone(),
                why: why.or_else(|| Some(held?.why?.to_string())),
            }
        });
        let unheard = running
            .as_ref()
            .filter(|held| !held.is_attached() && !job.status.is_terminal());
        Ok(Some(TaskExplanation {
            id,
            status: job.status,
            out_of_reach: unheard
                .map(|held| fleet.out_of_reach(&held.pool_id, &held.worker_id, clock::now())),
            placements: placements.collect(),
            waiting,
        }))
    }

    /// Reads the attempts that began from the log: each attempt's number, and the reason for its placement if one was logged.
    async fn begun(&self, id: JobId) -> Result<Vec<(u32, Option<String>)>, StoreError> {
        let mut begun = Vec::new();
        let mut place = EventId { attempt: 0, seq: 0 };
        loop {
            let page = self.store.events_after(id, place, PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(begun);
            };
            place = last.id;
            begun.extend(page.iter().filter_map(|entry| match &entry.event {
                TaskEvent::Started(started) => Some((started.attempt, started.why.clone())),
                TaskEvent::Attempt(again) => Some((again.attempt, again.why.clone())),
                _ => None,
            }));
        }
    }
}
