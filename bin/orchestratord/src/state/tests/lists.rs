//! Lists of jobs.

use orchestrator_core::job::Priority;

use super::*;

/// Brings a waiting job into a state.
async fn bring_to(store: &dyn JobStore, id: JobId, status: JobStatus) {
    let event = match status {
        JobStatus::Queued => return,
        JobStatus::Dispatched | JobStatus::Running => None,
        JobStatus::Completed => Some(JobEvent::Finished),
        JobStatus::Failed => Some(JobEvent::Errored),
        JobStatus::Cancelled => Some(JobEvent::Cancel),
        JobStatus::Expired => Some(JobEvent::DeadlinePassed),
    };
    let now = crate::clock::now();
    let fence = store.lease(id, "p", "w", now).await.unwrap().fence;
    if status != JobStatus::Dispatched {
        let progress = Progress {
            started_at: Some(now),
            events: vec![],
        };
        store.progress(id, fence, progress).await.unwrap();
    }
    if let Some(event) = event {
        let last = entry(1, 2, error_event());
        let ended = store.end(id, ending(event, Some(fence), last)).await;
        assert_eq!(ended.unwrap(), status);
    }
}

// [ORCHD-015] With any filter, a list has the same jobs as a full scan, page after page.
pub async fn lists_are_those_of_a_full_look(place: impl Place) {
    let store = place.open().await;
    let mut jobs = Vec::new();
    for n in 0..60 {
        let request = TaskSubmitRequest {
            model: ["a", "b", "c"][n % 3].into(),
            prompt: Some("hi".into()),
            priority: Some(Priority::ALL[n / 2 % 2]),
            ..Default::default()
        };
        let job = Job::new(
            JobId::random(),
            request.validate().unwrap(),
            crate::clock::now(),
        );
        let status = JobStatus::ALL[n * n % 7];
        jobs.push((
            job.id,
            status,
            job.spec.model.to_string(),
            job.spec.priority,
        ));
        let id = job.id;
        store
            .submit(job, None, entry(0, 1, error_event()))
            .await
            .unwrap();
        bring_to(&*store, id, status).await;
    }
    jobs.reverse();
    let with_none = |all: &[&'static str]| -> Vec<Option<String>> {
        std::iter::once(None)
            .chain(all.iter().map(|model| Some((*model).to_owned())))
            .collect()
    };
    for status in std::iter::once(None).chain(JobStatus::ALL.map(Some)) {
        for priority in std::iter::once(None).chain(Priority::ALL.map(Some)) {
            for model in with_none(&["a", "b", "c", "d"]) {
                let expected: Vec<_> = jobs
                    .iter()
                    .filter(|(_, s, m, p)| {
                        status.is_none_or(|status| status == *s)
                            && priority.is_none_or(|priority| priority == *p)
                            && model.as_ref().is_none_or(|model| model == m)
                    })
                    .map(|(id, ..)| *id)
                    .collect();
                let mut filter = ListFilter {
                    statuses: status.into_iter().collect(),
                    priority,
                    model,
                    limit: 7,
                    ..ListFilter::default()
                };
                assert_eq!(store.count(&filter).await.unwrap(), expected.len() as u64);
                let mut found = Vec::new();
                loop {
                    let page = store.list(&filter).await.unwrap();
                    found.extend(page.iter().map(|job| job.id));
                    let Some(last) = page.last().filter(|_| page.len() == 7) else {
                        break;
                    };
                    filter.before = Some(last.id);
                }
                assert_eq!(found, expected, "{filter:?}");
            }
        }
    }
}
