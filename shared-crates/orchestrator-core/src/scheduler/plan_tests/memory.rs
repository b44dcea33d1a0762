//! Tests of workers that make room for others, and of workers with long idle times.

use super::*;

// [ORCHCORE-060]
#[test]
fn the_least_recently_used_idle_worker_makes_room() {
    let waiting = job();
    let pools = vec![crowded("a", 50), crowded("b", 10), crowded("c", 30)];
    let plan = at(100, snapshot(std::slice::from_ref(&waiting), pools));
    assert_eq!(evicted(&plan), [("b", "w0")]);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::Evicting);
    // A worker is already stopping, so no other has to go.
    let mut stopping = crowded("b", 10);
    stopping.workers[0].status = WorkerStatus::Draining;
    let plan = at(
        100,
        snapshot(
            std::slice::from_ref(&waiting),
            vec![crowded("a", 50), stopping],
        ),
    );
    assert_eq!(plan.actions, []);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::Evicting);
}

// [ORCHCORE-060]
#[test]
fn no_more_workers_are_evicted_than_it_takes() {
    let mut pool = pool(
        "a",
        vec![idle("w0", "x", 1), idle("w1", "y", 2), idle("w2", "z", 3)],
    );
    pool.devices[0].free_bytes = 0;
    pool.models[0].needed_bytes = 4 * GIB;
    pool.workers[1].memory_bytes = 4 * GIB;
    let plan = at(100, snapshot(&[job()], vec![pool.clone()]));
    assert_eq!(evicted(&plan), [("a", "w1")]);
    pool.models[0].needed_bytes = 5 * GIB;
    let plan = at(100, snapshot(&[job()], vec![pool]));
    assert_eq!(evicted(&plan), [("a", "w0"), ("a", "w1")]);
}

// [ORCHCORE-060]
#[test]
fn of_the_workers_of_a_device_the_least_recently_used_one_goes() {
    let mut pool = pool("a", vec![idle("w0", "x", 50), idle("w1", "y", 10)]);
    pool.devices[0].free_bytes = 0;
    let plan = at(100, snapshot(&[job()], vec![pool]));
    assert_eq!(evicted(&plan), [("a", "w1")]);
}

// [ORCHCORE-060]
#[test]
fn a_worker_with_work_is_never_evicted() {
    let short = |pools: Vec<PoolState>, jobs: &[QueuedJob]| {
        let plan = at(100, snapshot(jobs, pools));
        assert_eq!(evicted(&plan), [], "{plan:?}");
        assert_eq!(plan.waiting[&jobs[0].id].reason, WaitReason::MemoryShort);
    };
    let mut working = crowded("a", 1);
    working.workers[0].active = 1;
    short(vec![working], &[job()]);
    let mut computing = crowded("a", 1);
    computing.workers[0].idle_since = None;
    short(vec![computing], &[job()]);
    // The worker has no room, so it must be working for another client.
    let mut full = crowded("a", 1);
    full.workers[0].full = true;
    short(vec![full], &[job()]);
    let mut forbidden = snapshot(&[job()], vec![crowded("a", 1)]);
    forbidden.settings.evict = false;
    assert_eq!(at(100, forbidden).actions, []);
}

// [ORCHCORE-061] Regardless of the worker's age.
#[test]
fn an_idle_worker_that_no_job_waits_for_makes_room_at_once() {
    assert_eq!(
        evicted(&at(106, snapshot(&[job()], vec![taken()]))),
        [("a", "w0")]
    );
}

// [ORCHCORE-061] Three times its load time, but no longer than the settings allow.
#[test]
fn a_worker_stays_for_its_time_while_jobs_wait_for_it() {
    let waiting = job();
    let snapshot = snapshot(&[waiting.clone(), backing_off()], vec![taken()]);
    let plan = at(110, snapshot.clone());
    assert_eq!(plan.actions, []);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::MemoryShort);
    assert!(
        plan.waiting[&waiting.id].hint.contains("in 21s"),
        "{plan:?}"
    );
    assert_eq!(plan.wake, Timestamp::from_second(130).ok());
    assert_eq!(evicted(&at(130, snapshot.clone())), [("a", "w0")]);
    let mut bounded = snapshot;
    bounded.settings.min_residence = SignedDuration::from_secs(15);
    assert_eq!(
        at(110, bounded.clone()).wake,
        Timestamp::from_second(115).ok()
    );
    assert_eq!(evicted(&at(115, bounded)), [("a", "w0")]);
}

// [ORCHCORE-061] Two models that fit one at a time: the model whose turn it is gets the memory, but not before a reload pays
// off.
#[test]
fn models_that_do_not_fit_together_take_turns() {
    let (first, second) = (job(), job_for("other", Placement::default()));
    let both = |order: [&QueuedJob; 2], pool: PoolState| {
        snapshot(&order.map(QueuedJob::clone), vec![pool])
    };
    // The pool has not yet reported that its worker is idle again.
    let busy = || {
        let mut pool = taken();
        (pool.workers[0].status, pool.workers[0].idle_since) = (WorkerStatus::Busy, None);
        pool
    };
    for pool in [taken(), busy()] {
        let early = at(129, both([&first, &second], pool.clone()));
        assert_eq!(
            (evicted(&early), dispatched(&early)),
            (vec![], vec![("a", "w0")])
        );
        let due = at(130, both([&first, &second], pool.clone()));
        assert_eq!(
            (evicted(&due), dispatched(&due)),
            (vec![("a", "w0")], vec![])
        );
        // In the opposite order, the job of the resident model comes first and runs on its worker.
        let later = at(130, both([&second, &first], pool));
        assert_eq!(
            (evicted(&later), dispatched(&later)),
            (vec![], vec![("a", "w0")])
        );
    }
}

// [ORCHCORE-062]
#[test]
fn a_worker_that_is_idle_for_long_is_unloaded() {
    let pools = || vec![pool("a", vec![idle("w0", "other", 100)])];
    let unload = |plan: &Plan| {
        plan.actions.contains(&Action::UnloadWorker {
            pool: "a".into(),
            worker: "w0".into(),
        })
    };
    let early = at(699, snapshot(&[], pools()));
    assert_eq!(
        (unload(&early), early.wake),
        (false, Timestamp::from_second(700).ok())
    );
    assert!(unload(&at(700, snapshot(&[], pools()))));
    // A job that is backing off will need the worker again.
    let later = QueuedJob {
        not_before: Some(Timestamp::from_second(1000).unwrap()),
        ..job_for("other", Placement::default())
    };
    assert!(!unload(&at(700, snapshot(&[later], pools()))));
    let mut never = snapshot(&[], pools());
    never.settings.idle_ttl = None;
    assert_eq!(
        (at(70_000, never.clone()).actions, at(70_000, never).wake),
        (vec![], None)
    );
}
