//! Stops and starts on the same database.

use std::sync::Arc;

use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::pools::PoolView;
use orchestrator_core::job::{Attempt, AttemptOutcome};
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::worker::WorkerErrorCode;
use pool_core::kit::client::ClientError;
use pool_core::worker::WorkerStatus;
use serde_json::json;
use sqlx::SqliteConnection;

use crate::support::{
    FakePool, FakeWorker, Got, MODEL, Orchestrator, Process, Reader, ended, eventually, kept_text,
    one_worker, outline,
};

// [ORCHD-040] [ORCHD-090] P8: waiting jobs wait, and running jobs continue at the next token.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_interrupts_nothing() {
    let (orchestrator, pool, worker) = one_worker().await;
    let running = orchestrator.job().await;
    worker.request(1).await;
    worker.started(running);
    worker.tokens(running, 0..4);
    eventually("the text", async || {
        (orchestrator.show(running).await.text.len() == 12).then_some(())
    })
    .await;
    let waiting = orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi", "max_attempts": 1}))
        .await
        .unwrap()
        .job_id;

    let orchestrator = orchestrator.restart().await;
    // No pool has registered yet. One job waits, the other counts as running, and neither is refused.
    orchestrator.until(waiting, JobStatus::Queued).await;
    let view = orchestrator.until(running, JobStatus::Running).await;
    assert_eq!(view.text, "<0><1><2><3>");
    let resumed = orchestrator.follow(running, Some("1.5")).await.unwrap();

    worker.tokens(running, 4..6);
    pool.register(&orchestrator).await;
    worker.tokens(running, 6..7);
    worker.end(running, 7);
    assert_eq!(
        outline(&resumed.rest().await),
        [
            "token 1.6",
            "token 1.7",
            "token 1.8",
            "token 1.9",
            "end 1.10"
        ]
    );
    let view = orchestrator.until(running, JobStatus::Completed).await;
    assert_eq!(view.text, "<0><1><2><3><4><5><6>");
    assert_eq!((view.attempts.len(), view.attempts[0].fence), (1, 1));
    assert_eq!(view.attempts[0].outcome, Some(AttemptOutcome::Completed));

    let request = worker.request(2).await;
    assert_eq!((request.job_id, request.attempt), (waiting.to_string(), 1));
    worker.started(waiting);
    worker.end(waiting, 0);
    orchestrator.until(waiting, JobStatus::Completed).await;
}

// [ORCHD-090] P8: an execution that ended while no daemon ran is read from the worker's buffer.
#[tokio::test(flavor = "multi_thread")]
async fn what_ended_meanwhile_is_read_to_its_end() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    orchestrator.until(job, JobStatus::Running).await;
    let (home, config) = orchestrator.stop().await;
    worker.tokens(job, 0..3);
    worker.end(job, 3);
    let orchestrator = Orchestrator::start_in(home, config).await.unwrap();
    pool.register(&orchestrator).await;
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert_eq!((view.text.as_str(), view.attempts.len()), ("<0><1><2>", 1));
    eventually("the buffer's end", async || {
        (worker.deleted() == [job.to_string()]).then_some(())
    })
    .await;
}

/// Returns a daemon in a process of its own, a pool with a worker, and a job. A reader has seen four logged tokens of the job
/// and four that are not logged, because the database could not be written.
async fn shown_and_not_logged() -> (
    Process,
    FakePool,
    FakeWorker,
    JobId,
    Vec<Got>,
    SqliteConnection,
) {
    let daemon = Process::start_in(Arc::new(tempfile::tempdir().unwrap())).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&daemon).await;
    let job = daemon.job().await;
    let mut reader = daemon.follow(job, None).await.unwrap();
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..4);
    let mut other = daemon.database().await;
    let logged = "SELECT MAX(last_seq) FROM events WHERE job_id = ?";
    eventually("four logged tokens", async || {
        let logged = sqlx::query_scalar::<_, i64>(logged).bind(job.to_string());
        (logged.fetch_one(&mut other).await.unwrap() == 6).then_some(())
    })
    .await;
    sqlx::raw_sql("BEGIN IMMEDIATE")
        .execute(&mut other)
        .await
        .unwrap();
    worker.tokens(job, 4..8);
    let mut seen = Vec::new();
    while seen.len() < 10 {
        seen.push(reader.logged().await.unwrap());
    }
    assert_eq!(outline(&seen[9..]), ["token 1.10"]);
    (daemon, pool, worker, job, seen, other)
}

// [ORCHD-091] P8, P11: a stream continues where its reader was cut off, even past the end of the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_cut_anywhere_goes_on_across_a_kill() {
    let (daemon, pool, worker, job, seen, other) = shown_and_not_logged().await;
    let home = daemon.end("-KILL").await;
    drop(other);
    let daemon = Process::start_in(home).await;
    assert_eq!(daemon.show(job).await.text, "<0><1><2><3>");
    let mut readers = vec![(0, daemon.follow(job, None).await.unwrap())];
    for (index, got) in seen.iter().enumerate() {
        let id = got.id.unwrap().to_string();
        readers.push((index + 1, daemon.follow(job, Some(&id)).await.unwrap()));
    }
    pool.register(&daemon).await;
    worker.tokens(job, 8..10);
    worker.end(job, 10);
    daemon.until(job, JobStatus::Completed).await;
    let whole = daemon.follow(job, None).await.unwrap().rest().await;
    assert_eq!(whole[..seen.len()], seen);
    assert_eq!(
        outline(&whole[seen.len()..]),
        ["token 1.11", "token 1.12", "end 1.13"]
    );
    for (place, reader) in readers {
        assert_eq!(reader.rest().await, whole[place..], "after {place} events");
    }
    for place in 1..whole.len() {
        let id = whole[place - 1].id.unwrap().to_string();
        let rest = daemon.follow(job, Some(&id)).await.unwrap().rest().await;
        assert_eq!(rest, whole[place..], "replay after {id}");
    }
    assert_eq!(daemon.show(job).await.attempts.len(), 1);
}

// [ORCHD-091] P20, P11: the same holds for an orderly stop, which logs everything that was shown.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_cut_anywhere_goes_on_across_a_stop() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..8);
    let mut seen = Vec::new();
    while seen.len() < 10 {
        seen.push(reader.logged().await.unwrap());
    }
    let orchestrator = orchestrator.restart().await;
    assert_eq!(orchestrator.show(job).await.text, kept_text(&seen));
    let mut readers = Vec::new();
    for got in &seen {
        let id = got.id.unwrap().to_string();
        readers.push(orchestrator.follow(job, Some(&id)).await.unwrap());
    }
    pool.register(&orchestrator).await;
    worker.tokens(job, 8..10);
    worker.end(job, 10);
    let whole = orchestrator.follow(job, None).await.unwrap().rest().await;
    assert_eq!(whole[..seen.len()], seen);
    for (place, reader) in (1..).zip(readers) {
        assert_eq!(reader.rest().await, whole[place..], "after {place} events");
    }
}

// [ORCHD-022] [ORCHD-091] P5, P11: an end that comes before the shown tokens are sent again follows all of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_after_a_kill_follows_everything_that_was_shown() {
    let (daemon, pool, worker, job, _, other) = shown_and_not_logged().await;
    let home = daemon.end("-KILL").await;
    drop(other);
    let daemon = Process::start_in(home).await;
    let ahead = daemon.follow(job, Some("1.10")).await.unwrap();
    assert_eq!(daemon.cancel(job).await, JobStatus::Cancelled);
    assert_eq!(outline(&ahead.rest().await), ["error 2.7"]);
    let late = daemon.follow(job, Some("1.10")).await.unwrap();
    assert_eq!(outline(&late.rest().await), ["error 2.7"]);
    // The worker gets the cancel once its pool has registered.
    pool.register(&daemon).await;
    let cancel = eventually("the worker's cancel", async || {
        worker.cancels().first().cloned()
    })
    .await;
    assert_eq!((cancel.job_id, cancel.fence), (job.to_string(), 1));
}

/// A job of which a reader saw more than the log has, continued by another worker.
struct Elsewhere {
    daemon: Process,
    pool: FakePool,
    worker: FakeWorker,
    job: JobId,
    /// Events that the reader saw before the kill.
    seen: Vec<Got>,
}

impl Elsewhere {
    /// After a kill, the worker turns out to be gone, and another one of `build` continues the job.
    async fn begins(build: &str) -> Self {
        let (daemon, mut pool, worker, job, seen, other) = shown_and_not_logged().await;
        let home = daemon.end("-KILL").await;
        drop(other);
        worker.kill().await;
        let next = FakeWorker::start("worker-cpu-1").await;
        pool.workers = vec![ended(
            worker.info(WorkerStatus::Failed),
            "killed by signal 9",
            false,
        )];
        pool.endpoints.clear();
        pool = pool.has(&next);
        let daemon = Process::start_in(home).await;
        pool.register(&daemon).await;
        let request = next.request(1).await;
        assert_eq!((request.attempt, request.fence), (2, 2));
        let resume = request.resume.unwrap();
        assert!(resume.seen_more);
        assert_eq!(
            (resume.token_ids, resume.next_index),
            (vec![100, 101, 102, 103], Some(4))
        );
        next.started_as(job, build);
        Self {
            daemon,
            pool,
            worker: next,
            job,
            seen,
        }
    }

    /// Lets the first two of the four unlogged tokens come again and be logged.
    async fn comes_half_way() -> Self {
        let elsewhere = Self::begins("a-build").await;
        elsewhere.worker.tokens(elsewhere.job, 4..6);
        elsewhere.logged(8).await;
        elsewhere
    }

    /// Waits until the log has `count` events.
    async fn logged(&self, count: i64) {
        let mut other = self.daemon.database().await;
        let logged = "SELECT MAX(last_seq) FROM events WHERE job_id = ?";
        eventually("logged tokens", async || {
            let logged = sqlx::query_scalar::<_, i64>(logged).bind(self.job.to_string());
            (logged.fetch_one(&mut other).await.unwrap() == count).then_some(())
        })
        .await;
    }

    /// Kills the daemon and starts another one.
    async fn killed(self) -> Self {
        let home = self.daemon.end("-KILL").await;
        let daemon = Process::start_in(home).await;
        Self { daemon, ..self }
    }

    async fn follow(&self, after: &str) -> Reader {
        self.daemon.follow(self.job, Some(after)).await.unwrap()
    }

    /// Sends the rest of ten tokens and the end. Every reader, wherever it joins, gets the same stream, which begins with the
    /// events seen before the first kill. Returns the events after those, and the attempts.
    async fn ends_as_one_stream(self, from: u32) -> (Vec<Got>, Vec<Attempt>) {
        // One reader has seen everything that was shown, the other only the logged part.
        let (ahead, behind) = (self.follow("1.10").await, self.follow("1.6").await);
        self.worker.tokens(self.job, from..10);
        self.worker.end(self.job, 10);
        let view = self.daemon.until(self.job, JobStatus::Completed).await;
        assert_eq!(view.text, "<0><1><2><3><4><5><6><7><8><9>");
        let whole = self.daemon.follow(self.job, None).await.unwrap();
        let whole = whole.rest().await;
        assert_eq!(kept_text(&whole), view.text);
        assert_eq!(whole[..10], self.seen);
        assert_eq!(ahead.rest().await, whole[10..]);
        assert_eq!(behind.rest().await, whole[6..]);
        for place in 1..whole.len() {
            let id = whole[place - 1].id.unwrap().to_string();
            assert_eq!(
                self.follow(&id).await.rest().await,
                whole[place..],
                "after {id}"
            );
        }
        (whole[10..].to_vec(), view.attempts)
    }
}

fn outcomes(attempts: &[Attempt]) -> Vec<AttemptOutcome> {
    let outcomes = attempts.iter().map(|attempt| attempt.outcome.unwrap());
    outcomes.collect()
}

// [ORCHD-022] [ORCHD-095] P5, P11: the same build computes the shown tokens again, under their earlier ids. The attempt is
// announced to readers once none of the shown tokens is missing any more.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_shown_and_lost_is_drawn_again_by_the_same_build() {
    let elsewhere = Elsewhere::begins("a-build").await;
    let (ahead, attempts) = elsewhere.ends_as_one_stream(4).await;
    assert_eq!(
        outline(&ahead),
        ["token 1.11", "token 1.12", "attempt 2.13", "end 2.14"]
    );
    let TaskEvent::Attempt(attempt) = &ahead[2].event else {
        panic!()
    };
    assert!(attempt.continues);
    use AttemptOutcome::{Completed, OrchestratorRestarted};
    assert_eq!(outcomes(&attempts), [OrchestratorRestarted, Completed]);
    let reason = attempts[0].reason.as_ref().unwrap();
    assert!(reason.contains("killed by signal 9"), "{reason}");
}

// [ORCHD-022] [ORCHD-095] P5, P8, P11: also if the daemon is killed again while the tokens are sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_kill_while_shown_tokens_come_again_changes_no_id() {
    let elsewhere = Elsewhere::comes_half_way().await.killed().await;
    elsewhere.pool.register(&elsewhere.daemon).await;
    let (ahead, attempts) = elsewhere.ends_as_one_stream(6).await;
    assert_eq!(
        outline(&ahead),
        ["token 1.11", "token 1.12", "attempt 2.13", "end 2.14"]
    );
    assert_eq!(attempts.len(), 2);
}

// [ORCHD-022] [ORCHD-095] P5, P6, P11: also if the worker is lost while it sends them again, with or without another kill.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_loss_while_shown_tokens_come_again_changes_no_id() {
    use AttemptOutcome::{Completed, OrchestratorRestarted, WorkerLost};
    for killed in [false, true] {
        let mut elsewhere = Elsewhere::comes_half_way().await;
        if killed {
            elsewhere = elsewhere.killed().await;
            elsewhere.worker.forget(elsewhere.job);
            elsewhere.pool.register(&elsewhere.daemon).await;
        } else {
            let code = WorkerErrorCode::ShuttingDown;
            elsewhere.worker.error(elsewhere.job, code);
        }
        let request = elsewhere.worker.request(2).await;
        assert_eq!(request.attempt, 3);
        let resume = request.resume.unwrap();
        assert!(resume.seen_more);
        assert_eq!(resume.token_ids, [100, 101, 102, 103, 104, 105]);
        elsewhere.worker.started(elsewhere.job);
        let (ahead, attempts) = elsewhere.ends_as_one_stream(6).await;
        assert_eq!(
            outline(&ahead),
            ["token 1.11", "token 1.12", "attempt 3.13", "end 3.14"]
        );
        let second = if killed {
            OrchestratorRestarted
        } else {
            WorkerLost
        };
        assert_eq!(
            outcomes(&attempts),
            [OrchestratorRestarted, second, Completed]
        );
    }
}

// [ORCHD-022] P5, P9: a cancel in the meantime follows everything that was shown, with or without another kill.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_shown_tokens_come_again_follows_everything_that_was_shown() {
    for killed in [false, true] {
        let mut elsewhere = Elsewhere::comes_half_way().await;
        if killed {
            elsewhere = elsewhere.killed().await;
            elsewhere.pool.register(&elsewhere.daemon).await;
        }
        elsewhere.worker.tokens(elsewhere.job, 6..7);
        elsewhere.logged(9).await;
        let ahead = elsewhere.follow("1.10").await;
        let cancelled = elsewhere.daemon.cancel(elsewhere.job).await;
        assert_eq!(cancelled, JobStatus::Cancelled);
        assert_eq!(outline(&ahead.rest().await), ["error 2.10"]);
        let late = elsewhere.follow("1.10").await;
        assert_eq!(outline(&late.rest().await), ["error 2.10"]);
    }
}

// [ORCHD-095] P5: another build may compute other tokens, so its attempt voids the text.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_shown_and_lost_is_void_with_another_build() {
    let elsewhere = Elsewhere::begins("another-build").await;
    let (ahead, behind) = (
        elsewhere.follow("1.10").await,
        elsewhere.follow("1.6").await,
    );
    elsewhere.worker.tokens(elsewhere.job, 0..10);
    elsewhere.worker.end(elsewhere.job, 10);
    let ahead = ahead.rest().await;
    assert_eq!(ahead, behind.rest().await);
    let TaskEvent::Attempt(attempt) = &ahead[0].event else {
        panic!()
    };
    assert!(!attempt.continues);
    assert_eq!(outline(&ahead)[..2], ["attempt 2.7", "token 2.8"]);
    let mut kept = elsewhere.seen;
    kept.extend(ahead);
    assert_eq!(kept_text(&kept), "<0><1><2><3><4><5><6><7><8><9>");
}

// [ORCHD-020] P3, P11: except for tokens, readers get events only after the commit: a kill undoes no start and no end that a
// reader saw.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_told_that_a_kill_undoes() {
    for (logged, last) in [(1, "queued 0.1"), (2, "started 1.2")] {
        let daemon = Process::start_in(Arc::new(tempfile::tempdir().unwrap())).await;
        let worker = FakeWorker::start("worker-cpu-0").await;
        let pool = FakePool::start("pool-a").await.has(&worker);
        pool.register(&daemon).await;
        let job = daemon.job().await;
        let mut reader = daemon.follow(job, None).await.unwrap();
        worker.request(1).await;
        if logged == 2 {
            worker.started(job);
        }
        let mut seen = Vec::new();
        while seen.len() < logged {
            seen.push(reader.logged().await.unwrap());
        }
        let mut other = daemon.database().await;
        let lock = sqlx::raw_sql("BEGIN IMMEDIATE");
        lock.execute(&mut other).await.unwrap();
        if logged == 1 {
            worker.started(job);
        }
        worker.end(job, 0);
        // Long enough for a premature event to arrive.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let home = daemon.end("-KILL").await;
        seen.extend(reader.rest().await);
        assert_eq!(outline(&seen[logged - 1..]), [last]);
        drop(other);
        let daemon = Process::start_in(home).await;
        pool.register(&daemon).await;
        daemon.until(job, JobStatus::Completed).await;
        let whole = daemon.follow(job, None).await.unwrap().rest().await;
        assert_eq!(outline(&whole), ["queued 0.1", "started 1.2", "end 1.3"]);
    }
}

// [ORCHD-092] P6: an attempt that its worker does not know costs the job no attempt.
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_its_worker_has_forgotten_is_followed_by_one_that_goes_on() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi", "max_attempts": 1}))
        .await
        .unwrap()
        .job_id;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..4);
    eventually("the text", async || {
        (orchestrator.show(job).await.text.len() == 12).then_some(())
    })
    .await;
    let orchestrator = orchestrator.restart().await;
    let reader = orchestrator.follow(job, Some("1.6")).await.unwrap();
    worker.forget(job);
    pool.register(&orchestrator).await;
    let request = worker.request(2).await;
    assert_eq!((request.attempt, request.fence), (2, 2));
    assert_eq!(request.resume.unwrap().token_ids, [100, 101, 102, 103]);
    worker.started(job);
    worker.tokens(job, 4..5);
    worker.end(job, 5);
    assert_eq!(
        outline(&reader.rest().await),
        ["token 1.7", "attempt 2.8", "end 2.9"]
    );
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert_eq!(view.text, "<0><1><2><3><4>");
    assert_eq!(
        view.attempts[0].outcome,
        Some(AttemptOutcome::OrchestratorRestarted)
    );
}

// [ORCHD-092] P4: a worker's record of an older attempt is not taken for an attempt that never reached the worker.
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_never_arrived_is_not_mistaken_for_the_one_before() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..2);
    orchestrator.until(job, JobStatus::Running).await;
    worker.lose_executes(true);
    worker.error(job, WorkerErrorCode::ShuttingDown);
    worker.lost_execute().await;
    assert_eq!(orchestrator.show(job).await.attempts.len(), 2);

    let orchestrator = orchestrator.restart().await;
    worker.lose_executes(false);
    pool.register(&orchestrator).await;
    let request = worker.request(2).await;
    assert_eq!((request.attempt, request.fence), (3, 3));
    assert_eq!(request.resume.unwrap().token_ids, [100, 101]);
    worker.started(job);
    worker.end(job, 2);
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert_eq!(view.text, "<0><1>");
    let outcomes: Vec<_> = view
        .attempts
        .iter()
        .map(|attempt| attempt.outcome.unwrap())
        .collect();
    use AttemptOutcome::{Completed, OrchestratorRestarted, WorkerLost};
    assert_eq!(outcomes, [WorkerLost, OrchestratorRestarted, Completed]);
}

// [ORCHD-033] [ORCHD-096] P8: a relaying pool that returns at another address loses no attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_at_the_address_that_the_pool_gives_later() {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    let first = worker.answers_elsewhere().await;
    pool.endpoints[0].url = format!("http://{}", first.addr);
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..2);
    orchestrator.until(job, JobStatus::Running).await;
    first.close();
    worker.cut_streams(job);
    first.turns_one_away().await;
    worker.tokens(job, 2..4);
    worker.end(job, 4);
    // Longer than a live pool takes to report a worker's death.
    tokio::time::sleep(std::time::Duration::from_millis(1700)).await;
    let second = worker.answers_elsewhere().await;
    pool.endpoints[0].url = format!("http://{}", second.addr);
    pool.instance = "instance-2".into();
    // A pool that has only registered has not reported its worker's fate yet.
    pool.introduce(&orchestrator).await;
    first.turns_one_away().await;
    pool.beat(&orchestrator).await;
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert_eq!(
        (view.text.as_str(), view.attempts.len()),
        ("<0><1><2><3>", 1)
    );
}

// [ORCHD-093] P7: no pool is given up before it had time to find the daemon again; after that, its attempts are.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_given_up_before_the_recovery_window_has_passed() {
    let orchestrator = Orchestrator::start_with(|config| config.recovery_window_ms = 1500).await;
    // A restart remembers the pool. Three missed heartbeats would give it up long before the window ends.
    let (_worker, _pool, job) = orchestrator.runs_on_a_hasty_pool().await;
    let (home, config) = orchestrator.stop().await;
    let started = std::time::Instant::now();
    let orchestrator = Orchestrator::start_in(home, config).await.unwrap();
    // Another pool with room is no reason to hurry.
    let other = FakeWorker::start("worker-cpu-0").await;
    let second = FakePool::start("pool-b").await.has(&other);
    second.register(&orchestrator).await;
    let request = other.request(1).await;
    assert!(
        started.elapsed().as_millis() >= 1500,
        "{:?}",
        started.elapsed()
    );
    assert_eq!((request.job_id, request.attempt), (job.to_string(), 2));
    other.started(job);
    other.end(job, 0);
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert_eq!(
        view.attempts[0].outcome,
        Some(AttemptOutcome::OrchestratorRestarted)
    );
}

// [ORCHD-094] P9: a committed cancel that did not reach the worker is sent after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_the_worker_did_not_hear_is_told_after_a_restart() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    orchestrator.until(job, JobStatus::Running).await;
    worker.slow_cancels(true);
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Cancelled);
    let orchestrator = orchestrator.restart().await;
    worker.slow_cancels(false);
    let before = worker.cancels().len();
    pool.register(&orchestrator).await;
    let cancel = eventually("the cancel", async || worker.cancels().get(before).cloned()).await;
    assert_eq!((cancel.job_id, cancel.fence), (job.to_string(), 1));
}

// [ORCHD-041] P13
#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_state_is_refused() {
    let orchestrator = Orchestrator::start().await;
    let second =
        Orchestrator::start_in(orchestrator.home.clone(), orchestrator.config.clone()).await;
    let error = format!("{:#}", second.err().unwrap());
    assert!(
        error.contains("already running") && error.contains(&std::process::id().to_string()),
        "{error}"
    );
}

// [ORCHD-002] A restart changes no record.
#[tokio::test(flavor = "multi_thread")]
async fn finished_jobs_read_the_same_after_a_restart() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let done = orchestrator.job().await;
    worker.request(1).await;
    worker.started(done);
    worker.tokens(done, 0..3);
    worker.end(done, 3);
    let before = orchestrator.until(done, JobStatus::Completed).await;
    let events = orchestrator.follow(done, None).await.unwrap().rest().await;
    let orchestrator = orchestrator.restart().await;
    assert_eq!(orchestrator.show(done).await, before);
    assert_eq!(
        orchestrator.follow(done, None).await.unwrap().rest().await,
        events
    );
    assert_eq!(orchestrator.cancel(done).await, JobStatus::Completed);
}

// [ORCHD-022] [ORCHD-094] P5: an id that a reader may have seen before a crash is never used for another event.
#[tokio::test(flavor = "multi_thread")]
async fn what_ends_an_interrupted_job_follows_everything_that_was_shown_of_it() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..4);
    eventually("the text", async || {
        (orchestrator.show(job).await.text.len() == 12).then_some(())
    })
    .await;
    // At the second restart no attempt was running, and no later one has begun.
    let orchestrator = orchestrator.restart().await.restart().await;
    let ahead = orchestrator.follow(job, Some("1.57")).await.unwrap();
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Cancelled);
    assert_eq!(outline(&ahead.rest().await), ["error 2.7"]);
    let late = orchestrator.follow(job, Some("1.57")).await.unwrap();
    assert_eq!(outline(&late.rest().await), ["error 2.7"]);

    // The worker keeps computing until its pool reports its address.
    pool.register(&orchestrator).await;
    let cancel = eventually("the orphan's cancel", async || {
        worker.cancels().first().cloned()
    })
    .await;
    assert_eq!((cancel.job_id, cancel.fence), (job.to_string(), 1));
}

// [ORCHD-079] A stored pool is known right after a restart, its next heartbeat is accepted, and a goodbye is final.
#[tokio::test(flavor = "multi_thread")]
async fn pools_are_known_after_a_restart() {
    let (orchestrator, mut pool, worker) = one_worker().await;
    let before: PoolView = orchestrator.client.get("/v2/pools/pool-a").await.unwrap();
    let orchestrator = orchestrator.restart().await;
    let known: PoolView = orchestrator.client.get("/v2/pools/pool-a").await.unwrap();
    assert_eq!(
        (&known.url, known.registered_at),
        (&before.url, before.registered_at)
    );
    assert!(known.status.is_none());
    // The pool may have the model.
    let unknown = json!({"model": "its-own", "prompt": "hi"});
    let said = orchestrator.submit(unknown.clone()).await.unwrap_err();
    let ClientError::Api { status, error } = &said else {
        panic!("{said}");
    };
    assert_eq!((*status, error.code.as_str()), (503, "POOL_UNAVAILABLE"));
    assert!(
        error.retriable && error.message.contains("`pool-a`"),
        "{said}"
    );
    // The pool need not register again.
    pool.beat(&orchestrator).await;
    let said = orchestrator.submit(unknown).await.unwrap_err();
    assert_eq!(said.status(), Some(404));
    // Until a new instance reports, the models of the previous one count.
    let mut own = pool.models[0].clone();
    own.model_ref = "its-own".parse().unwrap();
    pool.models.push(own);
    pool.beat(&orchestrator).await;
    pool.instance = "instance-2".into();
    pool.introduce(&orchestrator).await;
    let own = json!({"model": "its-own", "prompt": "hi"});
    orchestrator.submit(own).await.unwrap();
    pool.models.pop();
    pool.beat(&orchestrator).await;
    let job = orchestrator.job().await;
    assert_eq!(worker.request(1).await.job_id, job.to_string());

    let gone = orchestrator.client.delete::<()>("/v2/pools/pool-a").await;
    gone.unwrap();
    let orchestrator = orchestrator.restart().await;
    let unknown = orchestrator
        .client
        .get::<PoolView>("/v2/pools/pool-a")
        .await;
    assert_eq!(unknown.unwrap_err().status(), Some(404));
}
