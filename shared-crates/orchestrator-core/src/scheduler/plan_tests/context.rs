//! Tests of jobs that need a longer context than a worker has.

use super::*;

/// Returns a pool with the file of `m` and contexts up to 4,096 tokens; the default of 512 takes 1 GiB in all.
fn with_contexts(pool: PoolState) -> PoolState {
    let memory = ContextMemory {
        max_tokens: 4096,
        default_tokens: 512,
        base_bytes: GIB / 2,
        token_bytes: GIB / 1024,
        floor_bytes: 0,
    };
    let mut pool = pool;
    pool.models[0].context = Some(memory);
    pool
}

/// Returns a free worker with one slot.
fn of_context(id: &str, tokens: u32) -> WorkerState {
    WorkerState {
        context_length: Some(tokens),
        slots: 1,
        ..worker(id, WorkerStatus::Ready, 0)
    }
}

fn needs(tokens: u32) -> QueuedJob {
    QueuedJob {
        context_needed: Some(tokens),
        ..job()
    }
}

// [ORCHCORE-181]
#[test]
fn a_job_goes_to_no_worker_whose_context_is_too_small() {
    let pools = || {
        vec![pool(
            "a",
            vec![of_context("w0", 512), of_context("w1", 4096)],
        )]
    };
    let to_large = plan(&[needs(732), job()], pools());
    assert_eq!(dispatched(&to_large), [("a", "w1"), ("a", "w0")]);
    // The context of one worker is exactly large enough.
    assert_eq!(
        dispatched(&plan(
            &[needs(512)],
            vec![pool("a", vec![of_context("w0", 512)])]
        )),
        [("a", "w0")]
    );
    // Other jobs don't wait for that worker.
    let job = job();
    let both = plan(
        &[needs(4097), job.clone()],
        vec![pool("a", vec![of_context("w0", 512)])],
    );
    assert_eq!(dispatched(&both), [("a", "w0")]);
}

// [ORCHCORE-181] Before any worker has counted the tokens, the worker with the most room for prompt and answer is the better
// guess.
#[test]
fn of_free_workers_one_that_probably_has_the_room_is_taken() {
    let long = QueuedJob {
        bytes: 512 + 4 * 400,
        ..job()
    };
    let pools = || {
        vec![
            pool("a", vec![of_context("w0", 512)]),
            pool("b", vec![of_context("w0", 1024)]),
        ]
    };
    let alone = plan(std::slice::from_ref(&long), pools());
    assert_eq!(dispatched(&alone), [("b", "w0")]);
    assert_eq!(
        dispatched(&plan(&[long.clone(), long], pools())),
        [("b", "w0"), ("a", "w0")]
    );
    assert_eq!(dispatched(&plan(&[job()], pools())), [("a", "w0")]);
}

// [ORCHCORE-182]
#[test]
fn a_worker_with_more_room_is_started_for_a_job_that_needs_it() {
    let start = |free_bytes: u64, job: QueuedJob| {
        let mut pool = with_contexts(pool("a", vec![of_context("w0", 512)]));
        pool.devices[0].free_bytes = free_bytes;
        let plan = plan(&[job], vec![pool]);
        match plan.actions.as_slice() {
            [Action::StartWorker { context_length, .. }] => Some(*context_length),
            [] => None,
            other => panic!("{other:?}"),
        }
    };
    // Room for the answer, in steps of 256 tokens.
    assert_eq!(start(8 * GIB, needs(732)), Some(Some(1024)));
    // Before any worker has counted the tokens, the size of the request gives an estimate of the prompt's length.
    let uncounted = QueuedJob {
        bytes: 512 + 4 * 1500,
        ..job_for("m", Placement::default())
    };
    let new = |free_bytes: u64| {
        let mut pool = with_contexts(pool("a", vec![]));
        pool.devices[0].free_bytes = free_bytes;
        let plan = plan(std::slice::from_ref(&uncounted), vec![pool]);
        match plan.actions.as_slice() {
            [Action::StartWorker { context_length, .. }] => *context_length,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(new(8 * GIB), Some(1792));
    assert_eq!(new(GIB), None);
    // If the memory does not suffice for that, room for the prompt.
    assert_eq!(start(GIB + GIB / 2, needs(732)), Some(Some(1024)));
    assert_eq!(
        start(GIB / 2 + 768 * (GIB / 1024), needs(732)),
        Some(Some(768))
    );
    assert_eq!(start(GIB / 2 + 768 * (GIB / 1024) - 1, needs(732)), None);
    // Never more than the model's own limit.
    assert_eq!(start(8 * GIB, needs(4000)), Some(Some(4096)));
    assert_eq!(start(8 * GIB, needs(4096)), Some(Some(4096)));
    assert_eq!(start(8 * GIB, needs(4097)), None);
    // The job waits for a starting worker with that context.
    let starting = WorkerState {
        context_length: Some(1024),
        ..worker("w1", WorkerStatus::Starting, 0)
    };
    let waiting = needs(732);
    let pool = with_contexts(pool("a", vec![of_context("w0", 512), starting]));
    let plan = plan(std::slice::from_ref(&waiting), vec![pool]);
    assert_eq!(plan.actions, []);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::WorkerStarting);
}

// [ORCHCORE-182] A small worker of the same model that no job could use is evicted like any other.
#[test]
fn a_smaller_worker_of_the_model_makes_room_for_a_larger_one() {
    let mut full = with_contexts(pool(
        "a",
        vec![WorkerState {
            idle_since: Some(Timestamp::UNIX_EPOCH),
            ..of_context("w0", 512)
        }],
    ));
    full.devices[0].free_bytes = GIB / 2;
    let plan = plan(&[needs(732)], vec![full]);
    assert_eq!(evicted(&plan), [("a", "w0")]);
}

// [ORCHCORE-182] A refused start with a long context implies nothing about a shorter one.
#[test]
fn a_refused_context_holds_up_only_those_that_need_as_much() {
    let refused = |context_length| RefusedStart {
        model: "m".parse().unwrap(),
        device: Device::CPU,
        context_length,
        message: "no memory".into(),
    };
    let with = |context_length, job: QueuedJob| {
        let mut pool = with_contexts(pool("a", vec![]));
        pool.refused_starts = vec![refused(context_length)];
        let id = job.id;
        let plan = plan(&[job], vec![pool]);
        match plan.actions.as_slice() {
            [Action::StartWorker { context_length, .. }] => Ok(*context_length),
            _ => Err(plan.waiting[&id].reason),
        }
    };
    assert_eq!(with(Some(1024), job()), Ok(None));
    assert_eq!(with(Some(1024), needs(732)), Ok(Some(768)));
    assert_eq!(with(Some(768), needs(732)), Err(WaitReason::StartRefused));
    assert_eq!(with(None, needs(732)), Err(WaitReason::StartRefused));
}

// [ORCHCORE-183]
#[test]
fn the_context_is_a_filter_with_its_own_reason_and_remedy() {
    let explained = |job: &QueuedJob, pool: PoolState| {
        let plan = plan(std::slice::from_ref(job), vec![pool]);
        let why = Arc::clone(&plan.waiting[&job.id]);
        let last = why.filters.last().map(|count| (count.filter, count.pools));
        (why, last)
    };
    let job = needs(5000);
    let small = || with_contexts(pool("a", vec![of_context("w0", 512)]));
    let (why, last) = explained(&job, small());
    assert_eq!(
        (why.reason, last),
        (WaitReason::ContextShort, Some((Filter::Context, 0)))
    );
    assert!(
        why.message.contains("5000 tokens") && why.message.contains("allow at most 4096"),
        "{why:?}"
    );
    assert!(why.hint.contains("shorter prompt"), "{why:?}");
    let (why, _) = explained(&job, pool("a", vec![of_context("w0", 512)]));
    assert_eq!(why.reason, WaitReason::ContextShort);
    assert!(why.hint.contains("--context-length 5000"), "{why:?}");
    // A file allows the context, but there is no memory for it.
    let mut short = small();
    short.devices[0] = DeviceState {
        free_bytes: GIB,
        total_bytes: 2 * GIB,
        ..short.devices[0]
    };
    let (why, last) = explained(&needs(2000), short);
    assert_eq!(
        (why.reason, last),
        (WaitReason::MemoryShort, Some((Filter::MemoryFits, 0)))
    );
    assert!(
        why.message.contains("2000 tokens") && why.message.contains("needs 2.5 GiB"),
        "{why:?}"
    );
    assert!(why.hint.contains("shorter prompt"), "{why:?}");
}
