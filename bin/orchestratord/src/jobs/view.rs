//! Shows a job with its text so far.

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::TaskView;

use super::JobService;
use crate::clock;
use crate::state::{StoreError, apply_to_text};

impl JobService {
    /// Returns a job with its text, and while it waits the reason; `None` if there is no such job.
    pub async fn view(&self, id: JobId) -> Result<Option<TaskView>, StoreError> {
        // Read before the database: events that the database lacks at its turn are in here.
        let recent = self
            .live
            .get(id)
            .map(|live| live.log.recent())
            .unwrap_or_default();
        let Some((mut job, last)) = self.store.job(id).await? else {
            return Ok(None);
        };
        recent
            .iter()
            .filter(|entry| entry.id > last)
            .for_each(|entry| apply_to_text(&mut job.text, &entry.event));
        let waiting = self.live.waiting(id, clock::now());
        Ok(Some(TaskView::new(job, waiting)))
    }
}
