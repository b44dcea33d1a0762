//! Shows a job with its text so far.

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::TaskView;

use crate::app::App;
use crate::clock;
use crate::state::{StoreError, apply_to_text};

/// Returns a job with its text, and while it waits the reason; `None` if there is no such job.
pub async fn view(app: &App, id: JobId) -> Result<Option<TaskView>, StoreError> {
    // Read before the database: events that the database lacks at its turn are in here.
    let recent = app
        .jobs
        .get(id)
        .map(|live| live.log.recent())
        .unwrap_or_default();
    let Some((mut job, last)) = app.store.job(id).await? else {
        return Ok(None);
    };
    recent
        .iter()
        .filter(|entry| entry.id > last)
        .for_each(|entry| apply_to_text(&mut job.text, &entry.event));
    let waiting = app.jobs.waiting(id, clock::now());
    Ok(Some(TaskView::new(job, waiting)))
}
