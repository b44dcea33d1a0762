//! Retention: old records are dropped.

use orchestrator_core::job::Input;

use super::*;

/// Returns whether a file in the folder contains the text.
fn a_file_holds(dir: &Path, needle: &str) -> bool {
    std::fs::read_dir(dir).unwrap().any(|file| {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        bytes
            .windows(needle.len())
            .any(|part| part == needle.as_bytes())
    })
}

/// Sweeps until nothing is left to do, and returns the number of steps.
async fn sweep(store: &SqliteStore, cutoffs: Cutoffs, now: Timestamp) -> usize {
    for steps in 0..10_000 {
        if store.sweep(cutoffs, now).await.unwrap() == Step::Done {
            assert!(store.forget_log().await);
            return steps;
        }
    }
    panic!("the sweep does not come to an end");
}

// [ORCHD-074] [ORCHD-075] P2, P11
#[tokio::test]
async fn what_is_old_is_dropped_in_steps_and_later_forgotten() {
    const LOG_ROWS: u64 = 600;
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let request = |n: u64| TaskSubmitRequest {
        model: "m".into(),
        prompt: Some(format!("the prompt of {n} {}", "long ".repeat(400_000))),
        system: Some("the system message".into()),
        stop: vec!["the stop text".into()],
        seed: Some(u64::MAX - n),
        labels: [("team".to_owned(), "a".to_owned())].into(),
        ..Default::default()
    };
    let start = crate::clock::now();
    let hour = |n: i64| start + jiff::SignedDuration::from_hours(n);
    let mut ids = Vec::new();
    // The first four jobs end after 1, 2, 3 and 4 hours; the last one never does.
    for n in 0..5u64 {
        let job = Job::new(JobId::random(), request(n).validate().unwrap(), start);
        let id = job.id;
        let queued = TaskEvent::Queued(Queued {
            job_id: id,
            model: job.spec.model.clone(),
            queue_position: 0,
        });
        store
            .submit(job, Some(key(n, "p")), entry(0, 1, queued))
            .await
            .unwrap();
        let fence = store.lease(id, "p", "w", start).await.unwrap().fence;
        // In batches smaller than a task's cooperative budget, so that the writes are sent in this order.
        for some in (2..LOG_ROWS).collect::<Vec<_>>().chunks(50) {
            let rows = some
                .iter()
                .map(|seq| store.progress(id, fence, events([token(1, *seq)])));
            for written in futures_util::future::join_all(rows).await {
                written.unwrap();
            }
        }
        if n < 4 {
            let last = entry(1, LOG_ROWS, error_event());
            let mut ending = ending(JobEvent::Cancel, None, last);
            ending.at = hour(i64::try_from(n).unwrap() + 1);
            store.end(id, ending).await.unwrap();
        }
        ids.push(id);
    }
    let before = [
        store.job(ids[2]).await.unwrap(),
        store.job(ids[4]).await.unwrap(),
    ];
    let size = || std::fs::metadata(dir.path().join("jobs.db")).unwrap().len();
    assert!(store.forget_log().await);
    let full = size();

    let now = hour(10);
    let cutoffs = Cutoffs {
        drop: Some(hour(3)),
        forget: None,
    };
    let steps = sweep(&store, cutoffs, now).await;
    assert!(steps > 4, "{steps} steps for {LOG_ROWS} rows a job");
    for (n, id) in ids.iter().enumerate().take(2) {
        let (job, _) = store.job(*id).await.unwrap().unwrap();
        assert_eq!((job.status, job.text.as_str()), (JobStatus::Cancelled, ""));
        assert_eq!(job.dropped_at, Some(now));
        assert_eq!(job.spec.input, Input::Prompt(String::new()));
        assert_eq!((&job.spec.system, job.spec.stop.len()), (&None, 0));
        assert_eq!(job.spec.seed, u64::MAX - n as u64);
        assert_eq!(
            (job.spec.labels["team"].as_str(), job.attempts.len()),
            ("a", 1)
        );
        let log = store.log_end(*id).await.unwrap().unwrap();
        assert_eq!((log.last, log.dropped_at), (None, Some(now)));
        // P2: the key still names the job.
        let known = store.known_key(&key(n, "p")).await.unwrap();
        assert_eq!(known, Some((*id, JobStatus::Cancelled)));
    }
    // Jobs that ended at the cutoff or later, or not at all, are unchanged.
    assert_eq!(store.job(ids[2]).await.unwrap(), before[0]);
    assert_eq!(store.job(ids[4]).await.unwrap(), before[1]);
    for dropped in ["the prompt of 0", "the prompt of 1"] {
        assert!(
            !a_file_holds(dir.path(), dropped),
            "{dropped} is still in a file"
        );
    }
    assert!(a_file_holds(dir.path(), "the prompt of 2"));
    assert_eq!(store.sweep(cutoffs, now).await.unwrap(), Step::Done);

    // Now all jobs that are over lose their texts, the oldest are deleted, and the file shrinks.
    let cutoffs = Cutoffs {
        drop: Some(hour(9)),
        forget: Some(hour(2)),
    };
    sweep(&store, cutoffs, now).await;
    // Some free pages are kept for new records.
    assert!(size() < full / 2, "{} of {full} bytes", size());
    assert_eq!(store.job(ids[0]).await.unwrap(), None);
    assert_eq!(store.known_key(&key(0, "p")).await.unwrap(), None);
    let filter = ListFilter {
        limit: 50,
        ..Default::default()
    };
    let listed: Vec<_> = store
        .list(&filter)
        .await
        .unwrap()
        .iter()
        .map(|job| job.id)
        .collect();
    assert_eq!(listed, [ids[4], ids[3], ids[2], ids[1]]);
    assert_eq!(store.job(ids[4]).await.unwrap(), before[1]);
}

// [ORCHD-074] A log that a reader needs stays, the caller learns so, and the log is emptied later.
#[tokio::test]
async fn a_log_that_is_being_read_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&*store).await;
    let mut reading = store.readers.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM jobs")
        .fetch_all(&mut *reading)
        .await
        .unwrap();
    assert!(!store.forget_log().await);
    // The writer does not wait for the reader.
    let now = crate::clock::now();
    store.lease(id, "p", "w", now).await.unwrap();
    reading.rollback().await.unwrap();
    assert!(store.forget_log().await);
    let log = std::fs::metadata(dir.path().join("jobs.db-wal")).unwrap();
    assert_eq!(log.len(), 0);
}

// [ORCHD-242] A forgotten job leaves a row in no table.
#[tokio::test]
async fn a_forgotten_job_leaves_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&*store).await;
    let now = crate::clock::now();
    let fence = store.lease(id, "p", "w", now).await.unwrap().fence;
    let started = Progress {
        started_at: Some(now),
        events: vec![token(1, 2)],
    };
    store.progress(id, fence, started).await.unwrap();
    let ending = Ending {
        receipt: Some(Box::new(receipt())),
        ..ending(JobEvent::Finished, Some(fence), entry(1, 3, error_event()))
    };
    store.end(id, ending).await.unwrap();
    let rows = async || {
        let sql = "SELECT (SELECT COUNT(*) FROM jobs), (SELECT COUNT(*) FROM requests), (SELECT COUNT(*) FROM attempts), \
                   (SELECT COUNT(*) FROM events), (SELECT COUNT(*) FROM receipts)";
        let row = sqlx::query(sql).fetch_one(&store.readers).await.unwrap();
        [0, 1, 2, 3, 4].map(|table| row.get::<i64, _>(table))
    };
    assert_eq!(rows().await, [1, 1, 1, 3, 1]);
    let later = now + jiff::SignedDuration::from_hours(1);
    let cutoffs = Cutoffs {
        drop: Some(later),
        forget: Some(later),
    };
    sweep(&store, cutoffs, later).await;
    assert_eq!(rows().await, [0; 5]);
}
