use super::commands::{StoredEvent, to_json};
use super::*;
use orchestrator_core::api::events::{Queued, Token};
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::{Input, JobErrorCode};
use proptest::prelude::*;
use sqlx::Row as _;
use std::os::unix::fs::PermissionsExt as _;

fn entry(attempt: u32, seq: u64, event: TaskEvent) -> Arc<LogEntry> {
    Arc::new(LogEntry {
        id: EventId { attempt, seq },
        event,
        token_ids: vec![1, 2],
        origin: None,
    })
}

fn token(attempt: u32, seq: u64) -> Arc<LogEntry> {
    entry(
        attempt,
        seq,
        TaskEvent::Token(Token {
            t: format!("{seq},"),
            i: 0,
        }),
    )
}

fn events(events: impl IntoIterator<Item = Arc<LogEntry>>) -> Progress {
    Progress {
        started_at: None,
        events: events.into_iter().collect(),
    }
}

async fn store(dir: &tempfile::TempDir) -> Store {
    Store::open(&dir.path().join("jobs.db")).await.unwrap()
}

/// Runs a statement on the writer's connection.
async fn sql(store: &Store, statement: String) {
    let statement = sqlx::AssertSqlSafe(statement);
    store
        .writer
        .run(move |conn| {
            Box::pin(async move { Ok(sqlx::raw_sql(statement).execute(conn).await.map(drop)?) })
        })
        .await
        .unwrap();
}

async fn submitted(store: &Store) -> JobId {
    let request = TaskSubmitRequest {
        model: "m".into(),
        prompt: Some("hi".into()),
        ..Default::default()
    };
    let job = Job::new(
        JobId::random(),
        request.validate().unwrap(),
        crate::clock::now(),
    );
    let id = job.id;
    let queued = Queued {
        job_id: id,
        model: job.spec.model.clone(),
        queue_position: 0,
    };
    store
        .submit(job, None, entry(0, 1, TaskEvent::Queued(queued)))
        .await
        .unwrap();
    id
}

fn ending(event: JobEvent, fence: Option<u64>, last: Arc<LogEntry>) -> Ending {
    Ending {
        event,
        fence,
        at: crate::clock::now(),
        progress: events([last]),
        usage: None,
        error: None,
        outcome: AttemptOutcome::Failed,
    }
}

fn error_event() -> TaskEvent {
    TaskEvent::Error(JobError {
        code: JobErrorCode::Cancelled,
        message: String::new(),
        retriable: false,
    })
}

// [ORCHD-003] P4
#[tokio::test]
async fn a_stale_fence_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&store).await;
    let now = crate::clock::now();
    let first = store.lease(id, "p", "w", now).await.unwrap();
    let requeue = Requeue {
        fence: first.fence,
        at: now,
        progress: Progress {
            started_at: Some(now),
            events: vec![token(1, 2)],
        },
        outcome: AttemptOutcome::WorkerLost,
        reason: "gone".into(),
        not_before: None,
    };
    store.requeue(id, requeue.clone()).await.unwrap();
    let second = store.lease(id, "p", "w", now).await.unwrap();
    assert_eq!(
        (
            second.fence,
            second.attempt,
            second.lost,
            second.started_before
        ),
        (2, 2, 1, true)
    );
    assert_eq!(second.last_reason.as_deref(), Some("gone"));

    let before = store.job(id).await.unwrap();
    let is_stale = |result: Result<(), StoreError>| {
        matches!(
            result,
            Err(StoreError::StaleFence {
                given: 1,
                current: 2,
                ..
            })
        )
    };
    assert!(is_stale(store.progress(id, 1, events([token(1, 3)])).await));
    assert!(is_stale(store.requeue(id, requeue).await));
    let end = ending(JobEvent::Errored, Some(1), entry(1, 3, error_event()));
    assert!(is_stale(store.end(id, end).await.map(drop)));
    assert_eq!(store.job(id).await.unwrap(), before);
}

// [ORCHD-003] P5: repeated writes change nothing, gaps are refused with all that came with them.
#[tokio::test]
async fn the_log_takes_every_event_once_and_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&store).await;
    let now = crate::clock::now();
    let fence = store.lease(id, "p", "w", now).await.unwrap().fence;
    store
        .progress(id, fence, events([token(1, 2), token(1, 3)]))
        .await
        .unwrap();
    store
        .progress(id, fence, events([token(1, 3), token(1, 4)]))
        .await
        .unwrap();
    let gap = Progress {
        started_at: Some(now),
        events: vec![token(1, 6)],
    };
    assert!(matches!(
        store.progress(id, fence, gap).await,
        Err(StoreError::Corrupt(_))
    ));
    let (job, last) = store.job(id).await.unwrap().unwrap();
    assert_eq!(
        (job.status, job.text.as_str(), last.seq),
        (JobStatus::Dispatched, "2,3,4,", 4)
    );
    let start = EventId { attempt: 0, seq: 0 };
    let log = store.events_after(id, start, 100).await.unwrap();
    assert_eq!(
        log.iter().map(|entry| entry.id.seq).collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    assert_eq!(log[1].token_ids, [1, 2]);
    let from_inside_a_row = store
        .events_after(id, EventId { attempt: 1, seq: 2 }, 100)
        .await
        .unwrap();
    assert_eq!(from_inside_a_row[0].id, EventId { attempt: 1, seq: 3 });
}

// [ORCHD-004] P17
#[tokio::test]
async fn a_newer_database_is_refused_with_both_versions_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let opened = store(&dir).await;
    let id = submitted(&opened).await;
    let newer = schema::VERSION + 6;
    sql(&opened, format!("PRAGMA user_version = {newer}")).await;
    opened.close(Duration::from_secs(5)).await;

    // Closed in order, it is one file that can be moved.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let path = dir.path().join("jobs.db");
    let error = Store::open(&path).await.err().unwrap();
    assert!(matches!(error, StoreError::NewerDatabase { .. }));
    let text = error.to_string();
    assert!(
        text.contains(&format!("version {newer};"))
            && text.contains(&format!("version {}", schema::VERSION)),
        "{text}"
    );
    let mut conn = SqliteConnectOptions::new()
        .filename(&path)
        .connect()
        .await
        .unwrap();
    let count: i64 = sqlx::query("SELECT COUNT(*) FROM jobs WHERE id = ?")
        .bind(id.to_string())
        .fetch_one(&mut conn)
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 1);
}

/// A database as the first version made it: a waiting job with a key, one that ran when the daemon was killed, and one that
/// is over.
async fn version_1(path: &Path) -> [JobId; 3] {
    let spec = |prompt: &str| {
        let request = TaskSubmitRequest {
            model: "m".into(),
            prompt: Some(prompt.into()),
            seed: Some(u64::MAX),
            ..Default::default()
        };
        to_json(&request.validate().unwrap()).unwrap()
    };
    let mut conn = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .connect()
        .await
        .unwrap();
    let script = include_str!("migrations/0001_jobs.sql");
    sqlx::raw_sql(script).execute(&mut conn).await.unwrap();
    let ids = [(); 3].map(|()| JobId::random());
    for (id, status) in ids.iter().zip(["queued", "running", "completed"]) {
        let event = |seq| StoredEvent {
            e: token(1, seq).event.clone(),
            ids: vec![7],
            from: None,
        };
        let statement = format!(
            "INSERT INTO jobs (id, status, model, priority, placement, labels, max_attempts, spec, created_us, ended_us, fence)
             VALUES ('{id}', '{status}', 'm', 'batch', '{{}}', '{{}}', 3, '{}', 5, iif('{status}' = 'completed', 9, NULL), 1);
             INSERT INTO attempts (job_id, number, fence, pool_id, worker_id, leased_us, ended_us, outcome)
             SELECT '{id}', 1, 1, 'p', 'w', 6, iif('{status}' = 'completed', 9, NULL), iif('{status}' = 'completed', 'completed', NULL)
             WHERE '{status}' <> 'queued';
             INSERT INTO events (job_id, attempt, first_seq, last_seq, payload) VALUES ('{id}', 1, 1, 2, '{}');
             INSERT INTO idempotency (caller, key, fingerprint, job_id, created_us) VALUES ('c', '{status}', 'f', '{id}', 5);",
            spec(status),
            to_json(&[event(1), event(2)]).unwrap(),
        );
        let statement = sqlx::AssertSqlSafe(statement);
        sqlx::raw_sql(statement).execute(&mut conn).await.unwrap();
    }
    sqlx::raw_sql("PRAGMA user_version = 1")
        .execute(&mut conn)
        .await
        .unwrap();
    ids
}

// [ORCHD-073] P17
#[tokio::test]
async fn a_database_of_the_first_version_is_migrated_with_everything_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let ids = version_1(&dir.path().join("jobs.db")).await;
    let store = store(&dir).await;
    for (id, status) in ids.iter().zip(["queued", "running", "completed"]) {
        let (job, last) = store.job(*id).await.unwrap().unwrap();
        assert_eq!(job.status.as_str(), status);
        assert_eq!(job.spec.input, Input::Prompt(status.into()));
        assert_eq!((job.spec.seed, job.text.as_str()), (u64::MAX, "1,2,"));
        assert_eq!(job.attempts.len(), usize::from(status != "queued"));
        assert_eq!((job.fence, last.seq), (1, 2));
        let key = IdempotencyKey {
            caller: "c".into(),
            key: status.into(),
            fingerprint: "f".into(),
        };
        assert_eq!(store.known_key(&key).await.unwrap().unwrap().0, *id);
    }
    let waiting = store.recover().await.unwrap();
    let found: Vec<_> = waiting.iter().map(|job| job.queued.id).collect();
    assert_eq!(found, ids[..2]);
    let lease = store.lease(ids[0], "p", "w", crate::clock::now()).await;
    assert_eq!(lease.unwrap().fence, 2);
    // What the schema promises holds for the migrated tables as well.
    let shrinks = store.writer.run(|conn| {
        Box::pin(async move {
            let mode = sqlx::query("PRAGMA auto_vacuum").fetch_one(&mut *conn);
            let mode: i64 = mode.await?.get(0);
            let broken = sqlx::query("PRAGMA foreign_key_check").fetch_all(conn);
            Ok((mode, broken.await?.len()))
        })
    });
    assert_eq!(shrinks.await.unwrap(), (2, 0));
}

/// Overwrites a part of every page behind the first of a closed database.
fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    for page in bytes.chunks_mut(4096).skip(1) {
        page[8..200].fill(0xa5);
    }
    std::fs::write(path, bytes).unwrap();
}

// [ORCHD-072]
#[tokio::test]
async fn damage_is_looked_for_after_a_stop_that_was_not_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("jobs.db");
    let opened = store(&dir).await;
    let id = submitted(&opened).await;
    // What a killed daemon leaves: the files as they are now.
    let crashed = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), crashed.path().join(file.file_name())).unwrap();
    }
    opened.close(Duration::from_secs(5)).await;
    let was_released = async |path: &Path| {
        let options = SqliteConnectOptions::new().filename(path);
        let mut conn = options.connect().await.unwrap();
        let released = holder::was_released(&mut conn).await.unwrap();
        // A connection that is merely dropped is closed some time later.
        sqlx::Connection::close(conn).await.unwrap();
        released
    };
    assert!(was_released(&path).await);
    assert!(!was_released(&crashed.path().join("jobs.db")).await);
    let sound = store(&crashed).await;
    assert_eq!(sound.status(id).await.unwrap(), Some(JobStatus::Queued));
    sound.close(Duration::from_secs(5)).await;

    let crashed = crashed.path().join("jobs.db");
    let options = SqliteConnectOptions::new().filename(&crashed);
    let mut conn = options.connect().await.unwrap();
    sqlx::query("UPDATE holder SET clean = 0")
        .execute(&mut conn)
        .await
        .unwrap();
    sqlx::Connection::close(conn).await.unwrap();
    damage(&crashed);
    let damaged = std::fs::read(&crashed).unwrap();
    let error = Store::open(&crashed).await.err().unwrap();
    assert!(matches!(error, StoreError::Damaged(_)), "{error}");
    assert!(error.hint().unwrap().contains("backup"));
    let left = std::fs::read(&crashed).unwrap();
    let changed = left.iter().zip(&damaged).position(|(a, b)| a != b);
    assert_eq!((changed, left.len()), (None, damaged.len()));

    // A file that is none at all.
    std::fs::write(
        &crashed,
        "not a database, but long enough to be taken for one",
    )
    .unwrap();
    let error = Store::open(&crashed).await.err().unwrap();
    assert!(matches!(error, StoreError::Damaged(_)), "{error}");
}

// [ORCHD-070] P13
#[tokio::test]
async fn a_run_that_another_has_followed_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let old = store(&dir).await;
    let id = submitted(&old).await;
    let lease = old.lease(id, "p", "w", crate::clock::now()).await.unwrap();
    let new = store(&dir).await;
    let before = new.job(id).await.unwrap();
    let late = old.progress(id, lease.fence, events([token(1, 2)])).await;
    assert!(matches!(late, Err(StoreError::Closed)), "{late:?}");
    old.taken_over().await;
    assert!(old.is_taken_over() && !new.is_taken_over());
    let end = ending(JobEvent::Cancel, None, entry(1, 2, error_event()));
    assert!(matches!(
        old.end(id, end.clone()).await,
        Err(StoreError::Closed)
    ));
    assert_eq!(new.job(id).await.unwrap(), before);
    assert_eq!(new.end(id, end).await.unwrap(), JobStatus::Cancelled);
    // Its end does not say that the database was closed in order: it is still open.
    old.close(Duration::from_secs(5)).await;
    let mut conn = new.readers.acquire().await.unwrap();
    assert!(!holder::was_released(&mut conn).await.unwrap());
}

// [ORCHD-005]
#[tokio::test]
async fn the_files_are_private_and_writes_are_synced() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    submitted(&store).await;
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        assert_eq!(
            file.metadata().unwrap().permissions().mode() & 0o777,
            0o600,
            "{:?}",
            file.file_name()
        );
    }
    let pragmas = store.writer.run(|conn| {
        Box::pin(async move {
            let journal: String = sqlx::query("PRAGMA journal_mode")
                .fetch_one(&mut *conn)
                .await?
                .get(0);
            let sync: i64 = sqlx::query("PRAGMA synchronous")
                .fetch_one(&mut *conn)
                .await?
                .get(0);
            let keys: i64 = sqlx::query("PRAGMA foreign_keys")
                .fetch_one(&mut *conn)
                .await?
                .get(0);
            Ok((journal, sync, keys))
        })
    });
    assert_eq!(pragmas.await.unwrap(), ("wal".to_owned(), 2, 1));
}

// [ORCHD-006] P16: refused while the disk is full, healed by itself; nothing of a refused batch stays.
#[tokio::test]
async fn a_full_disk_refuses_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let kept = submitted(&store).await;
    // SQLite takes the present size for a limit below it: from now on the file can't grow, as on a full disk.
    sql(&store, "PRAGMA max_page_count = 1".into()).await;
    let big = || {
        let prompt = Some("x".repeat(100_000));
        let request = TaskSubmitRequest {
            model: "m".into(),
            prompt,
            ..Default::default()
        };
        Job::new(
            JobId::random(),
            request.validate().unwrap(),
            crate::clock::now(),
        )
    };
    let submit = async |job: Job| {
        let queued = Queued {
            job_id: job.id,
            model: job.spec.model.clone(),
            queue_position: 0,
        };
        store
            .submit(job, None, entry(0, 1, TaskEvent::Queued(queued)))
            .await
    };
    let (a, b) = (big(), big());
    let ids = [a.id, b.id];
    let results = futures_util::future::join(submit(a), submit(b)).await;
    for result in [results.0, results.1] {
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
    }
    assert_eq!(store.status(kept).await.unwrap(), Some(JobStatus::Queued));
    for id in ids {
        assert_eq!(store.status(id).await.unwrap(), None);
    }
    sql(&store, "PRAGMA max_page_count = 1000000".into()).await;
    submit(big()).await.unwrap();
}

// [ORCHD-007] A command that is refused takes nothing of those with it that share its transaction.
#[tokio::test]
async fn commands_of_one_commit_fail_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&store).await;
    let now = crate::clock::now();
    let leases = (0..20).map(|_| store.lease(id, "p", "w", now));
    let results = futures_util::future::join_all(leases).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let (job, _) = store.job(id).await.unwrap().unwrap();
    assert_eq!((job.fence, job.attempts.len()), (1, 1));
}

/// Whether a file of the folder holds the text.
fn a_file_holds(dir: &Path, needle: &str) -> bool {
    std::fs::read_dir(dir).unwrap().any(|file| {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        bytes
            .windows(needle.len())
            .any(|part| part == needle.as_bytes())
    })
}

/// Sweeps until nothing is left to do, and returns how many steps that took.
async fn sweep(store: &Store, cutoffs: Cutoffs, now: Timestamp) -> usize {
    for steps in 0..10_000 {
        if store.sweep(cutoffs, now).await.unwrap() == Step::Done {
            store.forget_log().await;
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
    let key = |n: u64| IdempotencyKey {
        caller: "c".into(),
        key: n.to_string(),
        fingerprint: "f".into(),
    };
    let start = crate::clock::now();
    let hour = |n: i64| start + jiff::SignedDuration::from_hours(n);
    let mut ids = Vec::new();
    // The first four end after 1, 2, 3 and 4 hours; the last one never does.
    for n in 0..5u64 {
        let job = Job::new(JobId::random(), request(n).validate().unwrap(), start);
        let id = job.id;
        let queued = TaskEvent::Queued(Queued {
            job_id: id,
            model: job.spec.model.clone(),
            queue_position: 0,
        });
        store
            .submit(job, Some(key(n)), entry(0, 1, queued))
            .await
            .unwrap();
        let fence = store.lease(id, "p", "w", start).await.unwrap().fence;
        // Fewer at once than a task may do in a row, so that they are sent in this order.
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
    store.forget_log().await;
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
        // P2: its key still names it.
        let known = store.known_key(&key(n as u64)).await.unwrap();
        assert_eq!(known, Some((*id, JobStatus::Cancelled)));
    }
    // What ended at the cutoff or later is as it was, and so is what has not ended at all.
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

    // Everything that is over goes, and the file gives the space back.
    let cutoffs = Cutoffs {
        drop: Some(hour(9)),
        forget: Some(hour(2)),
    };
    sweep(&store, cutoffs, now).await;
    // Some free pages are kept for what comes.
    assert!(size() < full / 2, "{} of {full} bytes", size());
    assert_eq!(store.job(ids[0]).await.unwrap(), None);
    assert_eq!(store.known_key(&key(0)).await.unwrap(), None);
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

// [ORCHD-015] Whatever is filtered by, a list is what a look at every job gives, page after page.
#[tokio::test]
async fn lists_are_those_of_a_full_look() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
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
        store
            .submit(job.clone(), None, entry(0, 1, error_event()))
            .await
            .unwrap();
        sql(
            &store,
            format!(
                "UPDATE jobs SET status = '{status}' WHERE id = '{}'",
                job.id
            ),
        )
        .await;
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
                    status,
                    priority,
                    model,
                    before: None,
                    limit: 7,
                };
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

/// What may happen to the store. `job` counts from the latest, `behind` says how old the fence is.
#[derive(Debug, Clone)]
enum Op {
    Submit(Option<(u8, u8)>),
    Lease(usize),
    Start(usize, u64),
    Tokens(usize, u64, u64),
    End(usize, JobEvent, Option<u64>),
    Requeue(usize, u64),
    Restart,
    Sweep,
    /// The daemon dies while it does this, after a number of turns of the runtime.
    Crash(Box<Op>, u8),
}

fn op() -> impl Strategy<Value = Op> {
    let behind = || prop_oneof![4 => Just(0u64), 1 => Just(1)];
    let job = || prop_oneof![3 => Just(0usize), 1 => Just(1), 1 => Just(2)];
    let event = prop_oneof![
        Just(JobEvent::Finished),
        Just(JobEvent::Errored),
        Just(JobEvent::Cancel),
        Just(JobEvent::DeadlinePassed)
    ];
    let plain = prop_oneof![
        3 => proptest::option::of((0..3u8, 0..2u8)).prop_map(Op::Submit),
        5 => job().prop_map(Op::Lease),
        5 => (job(), behind()).prop_map(|(job, behind)| Op::Start(job, behind)),
        4 => (job(), behind(), 1..4u64).prop_map(|(job, behind, count)| Op::Tokens(job, behind, count)),
        2 => (job(), event, proptest::option::of(behind())).prop_map(|(job, event, behind)| Op::End(job, event, behind)),
        2 => (job(), behind()).prop_map(|(job, behind)| Op::Requeue(job, behind)),
        1 => Just(Op::Restart),
        1 => Just(Op::Sweep),
    ];
    let plain = plain.boxed();
    prop_oneof![
        8 => plain.clone(),
        1 => (plain, 0..12u8).prop_map(|(op, turns)| Op::Crash(Box::new(op), turns)),
    ]
}

/// A job as the state machine, the rule of the fence and the promises have it.
#[derive(Debug, Clone, PartialEq)]
struct ModelJob {
    id: JobId,
    status: JobStatus,
    fence: u64,
    attempt: u32,
    /// Its last event; 0 once its log was dropped.
    last: u64,
    open_attempt: bool,
    dropped: bool,
}

impl ModelJob {
    fn step(&mut self, event: JobEvent) -> bool {
        let next = self.status.transition(event);
        next.inspect(|status| self.status = *status).is_ok()
    }

    fn is_held(&self) -> bool {
        matches!(self.status, JobStatus::Dispatched | JobStatus::Running)
    }
}

/// All that the database must agree with.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    jobs: Vec<ModelJob>,
    keys: std::collections::BTreeMap<u8, (u8, JobId)>,
}

/// What the model says of an operation, and the operation itself with everything in it decided.
struct Next {
    after: Model,
    accepted: bool,
    work: futures_util::future::BoxFuture<'static, bool>,
}

impl Model {
    /// Index of the job, where there are so many.
    fn at(&self, back: usize) -> Option<usize> {
        self.jobs.len().checked_sub(back + 1)
    }

    fn next(&self, store: &Store, op: &Op) -> Option<Next> {
        let (mut after, store, now) = (self.clone(), store.clone(), crate::clock::now());
        let next = |accepted, after, work| {
            Some(Next {
                after,
                accepted,
                work,
            })
        };
        match *op {
            Op::Submit(key) => {
                let request = TaskSubmitRequest {
                    model: "m".into(),
                    prompt: Some("hi".into()),
                    ..Default::default()
                };
                let job = Job::new(JobId::random(), request.validate().unwrap(), now);
                let known = key.and_then(|(key, _)| self.keys.get(&key).copied());
                let (accepted, named) = match (key, known) {
                    (Some((_, body)), Some((first, named))) => (body == first, named),
                    _ => {
                        after.jobs.push(ModelJob {
                            id: job.id,
                            status: JobStatus::Queued,
                            fence: 0,
                            attempt: 0,
                            last: 1,
                            open_attempt: false,
                            dropped: false,
                        });
                        if let Some((key, body)) = key {
                            after.keys.insert(key, (body, job.id));
                        }
                        (true, job.id)
                    }
                };
                let key = key.map(|(key, body)| IdempotencyKey {
                    caller: "c".into(),
                    key: key.to_string(),
                    fingerprint: body.to_string(),
                });
                let work = async move {
                    let (id, first) = (job.id, entry(0, 1, error_event()));
                    match store.submit(job, key, first).await {
                        Ok(Submitted::New) => id == named,
                        Ok(Submitted::Known(known, _)) => known == named,
                        Err(_) => false,
                    }
                };
                next(accepted, after, Box::pin(work))
            }
            Op::Lease(back) => {
                let job = &mut after.jobs[self.at(back)?];
                let accepted = job.step(JobEvent::Leased);
                if accepted {
                    job.fence += 1;
                    job.attempt += 1;
                    job.open_attempt = true;
                }
                let (id, fence) = (job.id, job.fence);
                let work = async move {
                    let lease = store.lease(id, "p", "w", now).await;
                    lease.is_ok_and(|lease| lease.fence == fence)
                };
                next(accepted, after, Box::pin(work))
            }
            Op::Start(back, behind) | Op::Tokens(back, behind, _) => {
                let job = &mut after.jobs[self.at(back)?];
                let count = if let Op::Tokens(_, _, count) = op {
                    *count
                } else {
                    1
                };
                let started_at = matches!(op, Op::Start(..)).then_some(now);
                let (id, fence) = (job.id, job.fence.wrapping_sub(behind));
                let (attempt, last) = (job.attempt, job.last);
                let accepted = job.is_held() && behind == 0;
                if accepted {
                    if started_at.is_some() {
                        job.step(JobEvent::Started);
                    }
                    job.last += count;
                }
                let work = async move {
                    let events = (1..=count).map(|n| token(attempt, last + n)).collect();
                    let progress = Progress { started_at, events };
                    store.progress(id, fence, progress).await.is_ok()
                };
                next(accepted, after, Box::pin(work))
            }
            Op::End(back, event, behind) => {
                let job = &mut after.jobs[self.at(back)?];
                let was_over = job.status.is_terminal();
                let fence = behind.map(|behind| job.fence.wrapping_sub(behind));
                let last = entry(job.attempt, job.last + 1, error_event());
                let accepted = behind.is_none_or(|behind| behind == 0) && job.step(event);
                if accepted && !was_over {
                    job.last += 1;
                    job.open_attempt = false;
                }
                let (id, status) = (job.id, job.status);
                let work = async move {
                    let ended = store.end(id, ending(event, fence, last)).await;
                    ended.is_ok_and(|ended| ended == status)
                };
                next(accepted, after, Box::pin(work))
            }
            Op::Requeue(back, behind) => {
                let job = &mut after.jobs[self.at(back)?];
                let accepted = behind == 0 && job.step(JobEvent::AttemptLost);
                if accepted {
                    job.open_attempt = false;
                }
                let requeue = Requeue {
                    fence: job.fence.wrapping_sub(behind),
                    at: now,
                    progress: Progress::default(),
                    outcome: AttemptOutcome::WorkerLost,
                    reason: String::new(),
                    not_before: None,
                };
                let id = job.id;
                let work = async move { store.requeue(id, requeue).await.is_ok() };
                next(accepted, after, Box::pin(work))
            }
            Op::Sweep => {
                for job in after.jobs.iter_mut().filter(|job| job.status.is_terminal()) {
                    (job.dropped, job.last) = (true, 0);
                }
                let work = async move {
                    let later = now + jiff::SignedDuration::from_secs(1);
                    let cutoffs = Cutoffs {
                        drop: Some(later),
                        forget: None,
                    };
                    loop {
                        match store.sweep(cutoffs, later).await {
                            Ok(Step::Done) => return true,
                            Ok(_) => {}
                            Err(_) => return false,
                        }
                    }
                };
                next(true, after, Box::pin(work))
            }
            Op::Restart | Op::Crash(..) => None,
        }
    }
}

/// What the database says, in the model's words.
async fn observed(store: &Store, model: &Model) -> Model {
    let mut found = Model::default();
    for expected in &model.jobs {
        let Some((job, last)) = store.job(expected.id).await.unwrap() else {
            continue;
        };
        let fences: Vec<_> = job.attempts.iter().map(|attempt| attempt.fence).collect();
        assert!(fences.is_sorted_by(|a, b| a < b), "{fences:?}");
        assert_eq!(
            job.attempts.last().map_or(0, |attempt| attempt.fence),
            job.fence
        );
        let start = EventId { attempt: 0, seq: 0 };
        let log = store.events_after(job.id, start, usize::MAX).await.unwrap();
        let contiguous = log.iter().zip(1..).all(|(entry, seq)| entry.id.seq == seq);
        // Of a log that is being dropped some rows may be left, and nobody is shown them.
        let whole = contiguous && log.len() as u64 == last.seq;
        assert!(whole || job.dropped_at.is_some(), "{log:?}");
        let open = job
            .attempts
            .iter()
            .filter(|attempt| attempt.ended_at.is_none());
        found.jobs.push(ModelJob {
            id: job.id,
            status: job.status,
            fence: job.fence,
            attempt: job.attempts.len().try_into().unwrap(),
            last: last.seq,
            open_attempt: open.count() > 0,
            dropped: job.dropped_at.is_some(),
        });
    }
    for key in 0..3 {
        for body in 0..2 {
            let key_of = IdempotencyKey {
                caller: "c".into(),
                key: key.to_string(),
                fingerprint: body.to_string(),
            };
            if let Ok(Some((id, _))) = store.known_key(&key_of).await {
                found.keys.insert(key, (body, id));
            }
        }
    }
    found
}

/// Opens the store again, as the daemon does when it starts. That alone changes nothing: what ran is looked for where it
/// ran, under the lease that it had.
async fn reopened(dir: &tempfile::TempDir, model: &Model) -> Store {
    let store = store(dir).await;
    let found = store.recover().await.unwrap();
    let live = model.jobs.iter().filter(|job| !job.status.is_terminal());
    let expected: Vec<_> = live
        .map(|job| (job.id, job.is_held().then_some(job.fence)))
        .collect();
    let interrupted = |job: &Recovered| job.interrupted.as_ref().map(|attempt| attempt.fence);
    let found: Vec<_> = found
        .iter()
        .map(|job| (job.queued.id, interrupted(job)))
        .collect();
    assert_eq!(found, expected);
    for job in &model.jobs {
        let lease = store.held_lease(job.id, job.fence).await.unwrap();
        let lease = lease.map(|lease| (lease.attempt, lease.fence));
        assert_eq!(lease, job.is_held().then_some((job.attempt, job.fence)));
    }
    store
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    // [ORCHD-008] P1, P2, P3, P4: whatever comes in whatever order, and wherever a crash falls, the database agrees with
    // the model: what was acknowledged is there, what was not is there wholly or not at all.
    #[test]
    fn the_database_follows_the_model(ops in proptest::collection::vec(op(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut store = store(&dir).await;
            let mut model = Model::default();
            for op in ops {
                if let Op::Restart = op {
                    store.close(Duration::from_secs(20)).await;
                    store = reopened(&dir, &model).await;
                } else if let Op::Crash(op, turns) = &op {
                    let Some(next) = model.next(&store, op) else { continue };
                    let work = tokio::spawn(next.work);
                    for _ in 0..*turns {
                        tokio::task::yield_now().await;
                    }
                    store.crash().await;
                    // The spawned work holds the store as well, so it ends only with its command's channel.
                    let acknowledged = work.await.unwrap();
                    let new = self::store(&dir).await;
                    let found = observed(&new, &next.after).await;
                    if found == next.after {
                        model = next.after;
                    } else {
                        // A sweep is many commits; whatever it got done is done.
                        let swept = matches!(**op, Op::Sweep);
                        assert!(!acknowledged && (swept || found == model), "{op:?}: {found:?}");
                        if swept {
                            let again = model.next(&new, op).unwrap();
                            again.work.await;
                            model = again.after;
                        }
                    }
                    new.close(Duration::from_secs(20)).await;
                    store = reopened(&dir, &model).await;
                } else {
                    let Some(next) = model.next(&store, &op) else { continue };
                    let done = next.work.await;
                    assert_eq!(done, next.accepted, "{op:?} {model:?}");
                    if done {
                        model = next.after;
                    }
                }
                assert_eq!(observed(&store, &model).await, model, "{op:?}");
            }
        });
    }
}
