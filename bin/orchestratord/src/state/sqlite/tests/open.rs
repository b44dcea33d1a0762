//! Opening of existing files, and their ownership.

use std::os::unix::fs::PermissionsExt as _;

use orchestrator_core::job::Input;

use super::*;
use crate::state::spec::StoredSpecRef;

// [ORCHD-004] P17
#[tokio::test]
async fn a_newer_database_is_refused_with_both_versions_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let opened = store(&dir).await;
    let id = submitted(&*opened).await;
    let newer = schema::VERSION + 6;
    sql(&opened, format!("PRAGMA user_version = {newer}")).await;
    opened.close(Duration::from_secs(5)).await;

    // After a close in order, the database is one file that can be moved.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let path = dir.path().join("jobs.db");
    let error = SqliteStore::open(&path).await.err().unwrap();
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

/// Creates a database as the first version made it, with a waiting job with a key, a job that ran when the daemon was killed,
/// and a job that is over.
async fn version_1(path: &Path) -> [JobId; 3] {
    let spec = |prompt: &str| {
        let request = TaskSubmitRequest {
            model: "m".into(),
            prompt: Some(prompt.into()),
            seed: Some(u64::MAX),
            ..Default::default()
        };
        to_json(&StoredSpecRef(&request.validate().unwrap())).unwrap()
    };
    let mut conn = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .connect()
        .await
        .unwrap();
    let script = include_str!("../migrations/0001_jobs.sql");
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
             INSERT INTO idempotency (caller, key, fingerprint, job_id, created_us) VALUES ('c', '{status}', '{EARLIER_DIGEST}', '{id}', 5);",
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
        assert_eq!(job.receipt, None);
        // [ORCHD-249] P2: the key still names the job, for its own request only.
        let known = store.known_key(&key(status, "p")).await.unwrap();
        assert_eq!(known, Some((*id, job.status)));
        let again = store.submit(job.clone(), Some(key(status, "p")), token(0, 1));
        assert_eq!(again.await.unwrap(), Submitted::Known(*id, job.status));
        let other = key(status, "q");
        for refused in [
            store.known_key(&other).await.map(drop),
            store.submit(job, Some(other), token(0, 1)).await.map(drop),
        ] {
            assert!(
                matches!(refused, Err(StoreError::KeyMismatch(_))),
                "{refused:?}"
            );
        }
    }
    // [ORCHD-225] P25: the stored end time comes from a wall clock, so the job counts as ended just now.
    let cutoffs = Cutoffs {
        drop: Some(crate::clock::now() - jiff::SignedDuration::from_hours(1)),
        forget: None,
    };
    let swept = store.sweep(cutoffs, crate::clock::now()).await.unwrap();
    assert!(!matches!(swept, Step::Dropped(_)), "{swept:?}");
    let waiting = store.recover().await.unwrap();
    let found: Vec<_> = waiting.iter().map(|job| job.queued.id).collect();
    assert_eq!(found, ids[..2]);
    let lease = store.lease(ids[0], "p", "w", crate::clock::now()).await;
    assert_eq!(lease.unwrap().fence, 2);
    // The schema's guarantees hold for the migrated tables as well.
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

// [ORCHD-225] P25: the timeline of a database continues at each start, regardless of the wall clock.
#[tokio::test]
async fn the_timeline_continues_where_it_stood() {
    let dir = tempfile::tempdir().unwrap();
    let hour = jiff::SignedDuration::from_hours(1);
    let soon = jiff::SignedDuration::from_mins(5);
    // Each case: the change to the record before the next start, and the resulting move of the timeline.
    let hour_us = hour.as_micros();
    for (change, moved) in [
        (String::new(), 0),
        // No daemon ran for an hour under this boot.
        (
            format!("UPDATE timeline SET boot_us = boot_us - {hour_us}"),
            1,
        ),
        // The host rebooted: only its wall clock could give the length of the absence.
        (
            "UPDATE timeline SET boot_id = 'another', boot_us = 0".to_owned(),
            0,
        ),
        // A virtual machine was restored to an earlier state.
        (
            format!("UPDATE timeline SET boot_us = boot_us + {hour_us}"),
            0,
        ),
        // A job arrived after the last record, before the host rebooted.
        (
            format!(
                "UPDATE timeline SET boot_id = 'another'; UPDATE jobs SET created_steady_us = created_steady_us + {hour_us}"
            ),
            1,
        ),
    ] {
        let opened = store(&dir).await;
        submitted(&*opened).await;
        let before = crate::clock::now();
        sql(&opened, change.clone()).await;
        opened.crash().await;
        let opened = store(&dir).await;
        let passed = crate::clock::now().duration_since(before);
        let off = (passed - hour * moved).abs();
        assert!(off < soon, "{change}: {passed:?}");
        opened.crash().await;
    }
}

/// Overwrites a part of every page but the first of a closed database.
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
    let id = submitted(&*opened).await;
    // A copy of the files as they are now, as a killed daemon leaves them.
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
        // A connection that is merely dropped closes some time later.
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
    // The last connection to close writes the log back, and it is not always the one closed last here.
    let log = crashed.with_extension("db-wal");
    tokio::time::timeout(Duration::from_secs(30), async {
        while log.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    damage(&crashed);
    let damaged = std::fs::read(&crashed).unwrap();
    let error = SqliteStore::open(&crashed).await.err().unwrap();
    assert!(matches!(error, StoreError::Damaged(_)), "{error}");
    assert!(error.hint().unwrap().contains("backup"));
    let left = std::fs::read(&crashed).unwrap();
    let changed = left.iter().zip(&damaged).position(|(a, b)| a != b);
    assert_eq!((changed, left.len()), (None, damaged.len()));

    // A file that is no database.
    std::fs::write(
        &crashed,
        "not a database, but long enough to be taken for one",
    )
    .unwrap();
    let error = SqliteStore::open(&crashed).await.err().unwrap();
    assert!(matches!(error, StoreError::Damaged(_)), "{error}");
}

// [ORCHD-070] P13: neither the pages of the log nor the record of an orderly close are the old run's to write.
#[tokio::test]
async fn a_run_that_another_has_followed_leaves_the_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let old = store(&dir).await;
    submitted(&*old).await;
    let new = store(&dir).await;
    let log = || {
        std::fs::metadata(dir.path().join("jobs.db-wal"))
            .unwrap()
            .len()
    };
    let held = log();
    assert!(!old.forget_log().await);
    assert_eq!(log(), held);
    // The new run still has the database open.
    old.close(Duration::from_secs(5)).await;
    let mut conn = new.readers.acquire().await.unwrap();
    assert!(!holder::was_released(&mut conn).await.unwrap());
}

// [ORCHD-005]
#[tokio::test]
async fn the_files_are_private_and_writes_are_synced() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    submitted(&*store).await;
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
