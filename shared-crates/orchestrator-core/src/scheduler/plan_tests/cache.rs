//! Tests of jobs whose prompt and answer must fit in a worker's cache.

use super::*;

/// Returns a worker with four slots that runs a job and has this many free tokens in its cache.
fn with_room(id: &str, free_tokens: u32) -> WorkerState {
    WorkerState {
        slots: 4,
        free_tokens: Some(free_tokens),
        ..worker(id, WorkerStatus::Busy, 1)
    }
}

/// Returns a job that a worker has counted.
fn takes(tokens: u32) -> QueuedJob {
    QueuedJob {
        cache_needed: Some(tokens),
        ..job()
    }
}

// [ORCHCORE-186]
#[test]
fn a_job_goes_where_the_cache_has_room_and_waits_with_the_numbers_where_none_has() {
    let pools = |left: u32| {
        let workers = vec![with_room("w0", 512), with_room("w1", left)];
        vec![pool("a", workers)]
    };
    let large = takes(3000);
    let fits = plan(std::slice::from_ref(&large), pools(3000));
    assert_eq!(dispatched(&fits), [("a", "w1")]);
    // The second job gets the room that the first has left.
    let twice = plan(&[large.clone(), takes(3000)], pools(5999));
    assert_eq!(dispatched(&twice), [("a", "w1")]);

    let waits = plan(std::slice::from_ref(&large), pools(2999));
    assert_eq!(dispatched(&waits), []);
    let why = &waits.waiting[&large.id];
    assert_eq!(why.reason, WaitReason::CacheFull);
    assert!(
        why.message.contains("need 3000 tokens")
            && why
                .message
                .contains("2999 are free, on worker `w1` of pool `a`"),
        "{}",
        why.message
    );
    let last = why.filters.last().map(|left| (left.filter, left.pools));
    assert_eq!(last, Some((Filter::Cache, 0)));
    // Starting a worker on another device with enough memory is better than waiting.
    let mut elsewhere = pools(2999);
    elsewhere.push(pool("b", vec![]));
    let started = plan(&[large], elsewhere);
    assert!(
        matches!(&started.actions[..], [Action::StartWorker { pool, .. }] if pool == "b"),
        "{started:?}"
    );
}

// [ORCHCORE-186] Otherwise, a job larger than the cache, or counted incorrectly, would wait forever.
#[test]
fn a_worker_without_a_job_has_room_for_any() {
    let idle = WorkerState {
        free_tokens: Some(100),
        ..worker("w0", WorkerStatus::Ready, 0)
    };
    let large = plan(&[takes(9000), takes(9000)], vec![pool("a", vec![idle])]);
    assert_eq!(dispatched(&large), [("a", "w0")]);
    // A worker that reports nothing about its cache gets the job.
    let silent = WorkerState {
        free_tokens: None,
        ..with_room("w0", 0)
    };
    let asked = plan(&[takes(9000)], vec![pool("a", vec![silent])]);
    assert_eq!(dispatched(&asked), [("a", "w0")]);
}

// [ORCHCORE-189] A job that no worker has counted may be refused by one with a free slot. Until the answer, no later job gets
// the room that it may need.
#[test]
fn a_job_that_may_not_fit_is_offered_alone() {
    let of = |max_tokens| QueuedJob {
        max_tokens,
        ..job()
    };
    let on = |free_tokens| {
        let roomy = WorkerState {
            context_length: Some(4096),
            ..with_room("w0", free_tokens)
        };
        vec![pool("a", vec![roomy])]
    };
    let (large, small) = (of(3000), of(10));
    let jobs = [large.clone(), small.clone()];
    assert_eq!(dispatched(&plan(&jobs, on(8000))), [("a", "w0"); 2]);
    // No job takes more than the worker's context.
    let endless = [of(100_000), small.clone()];
    assert_eq!(dispatched(&plan(&endless, on(8000))), [("a", "w0"); 2]);

    let offered = plan(&jobs, on(2000));
    assert!(
        matches!(&offered.actions[..], [Action::Dispatch { job, .. }] if *job == large.id),
        "{offered:?}"
    );
    let why = &offered.waiting[&small.id];
    assert_eq!(why.reason, WaitReason::CacheFull);
    assert!(why.message.contains("has yet to answer"), "{}", why.message);
    // It is not offered together with others either, which the worker might take first.
    let after = plan(&[small, large], on(2000));
    assert_eq!(dispatched(&after), [("a", "w0")]);
    let in_flight = |unanswered| {
        let mut pools = on(2000);
        pools[0].workers[0].unanswered = unanswered;
        dispatched(&plan(&[of(3000)], pools)).len()
    };
    assert_eq!([0, 1].map(in_flight), [1, 0]);
}

// [ORCHCORE-189]
#[test]
fn a_job_goes_to_a_worker_that_surely_has_the_room_if_there_is_one() {
    let roomy = |id, free_tokens, active| WorkerState {
        context_length: Some(4096),
        active,
        ..with_room(id, free_tokens)
    };
    let job = QueuedJob {
        max_tokens: 1000,
        ..job()
    };
    // By their load alone, the first would be the choice.
    let workers = |other| vec![roomy("w0", 100, 1), roomy("w1", other, 3)];
    let to = |other| {
        dispatched(&plan(
            std::slice::from_ref(&job),
            vec![pool("a", workers(other))],
        ))[0]
            .1
            .to_owned()
    };
    assert_eq!([2000, 200].map(to), ["w1", "w0"]);
}

// [ORCHCORE-187] Small jobs don't take the room that a large job waits for, again and again.
#[test]
fn room_is_kept_for_the_job_whose_turn_was_before() {
    let (small, large, later) = (job(), takes(3000), job());
    let workers = || vec![with_room("w0", 2000)];
    let plan_of = |pools| plan(&[small.clone(), large.clone(), later.clone()], pools);
    let kept = plan_of(vec![pool("a", workers())]);
    let to: Vec<_> = kept.actions.iter().collect();
    assert!(
        matches!(&to[..], [Action::Dispatch { job, .. }] if *job == small.id),
        "{to:?}"
    );
    let why = &kept.waiting[&later.id];
    assert_eq!(why.reason, WaitReason::CacheFull);
    assert!(
        why.message.contains("an earlier job is waiting"),
        "{}",
        why.message
    );
    // Workers that the job can't use are not reserved.
    let other = WorkerState {
        model: "m2".parse().unwrap(),
        ..with_room("w1", 2000)
    };
    let mut pools = vec![pool("a", workers())];
    pools[0].workers.push(other);
    let others = plan(&[large, job_for("m2", Placement::default())], pools);
    assert_eq!(dispatched(&others), [("a", "w1")]);
}
