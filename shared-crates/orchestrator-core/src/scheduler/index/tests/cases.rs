//! Individual cases, most of them found by the property tests.

use super::*;

fn on_disk(m: usize, needed_bytes: u64) -> ModelState {
    ModelState {
        model: model(m),
        file: file(),
        needed_bytes,
        context: None,
    }
}

/// Returns a worker that has long been idle.
fn idle(id: &str, m: usize) -> WorkerState {
    WorkerState {
        id: id.into(),
        status: WorkerStatus::Ready,
        idle_since: Some(at(0)),
        ready_at: Some(at(0)),
        ..WorkerState::asked_for(&on_disk(m, 1), device(0), None, at(0))
    }
}

fn bare_pool(id: &str) -> PoolState {
    PoolState {
        id: id.into(),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![DeviceState {
            device: device(0),
            free_bytes: 0,
            total_bytes: 9 * UNIT,
        }],
        workers: vec![],
        models: vec![],
        disk_free_bytes: 0,
        downloads: vec![],
        refused_starts: vec![],
        refused_downloads: vec![],
        last_start: 0,
    }
}

/// Returns a plan with these actions.
fn of_actions(actions: impl Into<Vec<Action>>) -> Plan {
    Plan {
        actions: actions.into(),
        ..Plan::default()
    }
}

fn put(model: usize) -> Change {
    Change::Put {
        model,
        pool: None,
        device: None,
        batch: false,
        session: None,
        pause: None,
        context: None,
        cache: None,
        max_tokens: 256,
    }
}

// [ORCHCORE-068] A script takes time. Actions that are impossible by the time it answers are skipped; the rest of the plan is
// applied.
#[test]
fn what_has_changed_since_the_snapshot_is_left_out_of_the_plan() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    tested.index.set_pool(PoolState {
        devices: vec![DeviceState {
            device: device(0),
            free_bytes: 3,
            total_bytes: 9,
        }],
        workers: vec![idle("w0", 0), idle("w1", 0), idle("w2", 1)],
        models: vec![on_disk(2, 2)],
        ..bare_pool("p0")
    });
    let ids: Vec<_> = (0..3).map(|_| JobId::random()).collect();
    for id in &ids {
        tested.change(put(0), *id);
    }
    let pool = || "p0".to_owned();
    let dispatch = |job: usize, worker: &str| Action::Dispatch {
        job: ids[job],
        pool: pool(),
        worker: worker.into(),
    };
    let start = Action::StartWorker {
        pool: pool(),
        model: model(2),
        device: device(0),
        context_length: None,
    };
    let evict = |worker: &str| Action::EvictWorker {
        pool: pool(),
        worker: worker.into(),
        needed_by: model(2),
    };
    // In the meantime, a job was cancelled, and an attempt from before a restart was adopted on a worker.
    tested.index.remove(ids[0]);
    tested.index.lease("p0", "w1");
    let plan = [
        dispatch(0, "w0"),
        dispatch(1, "w1"),
        dispatch(2, "w0"),
        evict("w1"),
        evict("gone"),
        evict("w2"),
        start.clone(),
        start.clone(),
    ];
    let pass = tested
        .index
        .apply(&of_actions(plan), Chooser::Script, at(100));
    assert_eq!(pass.actions, [dispatch(2, "w0"), evict("w2"), start]);
    let why = pass.why[0].to_string();
    assert!(why.contains("only worker"), "{why}");
    assert_eq!(pass.jobs.len(), 1);
    assert!(tested.index.line().contains(ids[1]));
}

// [ORCHCORE-068] A script may stop the very worker that jobs wait for. Found by the property test.
#[test]
fn a_pass_after_a_plan_of_somebody_else_looks_everywhere_again() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    tested.now = 100;
    tested.index.set_pool(PoolState {
        workers: vec![idle("w0", 1)],
        models: vec![on_disk(0, 1)],
        ..bare_pool("p0")
    });
    tested.index.set_pool(PoolState {
        workers: vec![idle("w1", 0)],
        ..bare_pool("p1")
    });
    tested.index.lease("p1", "w1");
    tested.change(put(0), JobId::random());
    tested.pass().unwrap();
    // The slot is free again, so the job could have it.
    tested.index.release("p1", "w1", true, at(100));
    let evict = |pool: &str, worker: &str| Action::EvictWorker {
        pool: pool.into(),
        worker: worker.into(),
        needed_by: model(0),
    };
    let applied = tested
        .index
        .apply(&of_actions([evict("p1", "w1")]), Chooser::Script, at(100));
    assert_eq!(applied.actions, [evict("p1", "w1")]);
    let pass = tested.index.pass(at(100));
    assert_eq!(pass.actions, [evict("p0", "w0")]);
}

// [ORCHCORE-068] A model is no longer needed once a script has placed its last job.
#[test]
fn a_plan_of_somebody_else_leaves_no_model_needed_without_jobs() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    tested.index.set_pool(PoolState {
        workers: vec![idle("w0", 0), idle("w1", 0)],
        ..bare_pool("p0")
    });
    let id = JobId::random();
    tested.change(put(0), id);
    let dispatch = Action::Dispatch {
        job: id,
        pool: "p0".into(),
        worker: "w0".into(),
    };
    // Later than the idle limit of a worker.
    let late = at(3600);
    let applied = tested
        .index
        .apply(&of_actions([dispatch.clone()]), Chooser::Script, late);
    assert_eq!(applied.actions, [dispatch]);
    let unload = Action::UnloadWorker {
        pool: "p0".into(),
        worker: "w1".into(),
    };
    assert_eq!(tested.index.pass(late).actions, [unload]);
}

// [ORCHCORE-066] Jobs from before a restart wait for pools that may still register; later jobs are judged at once.
#[test]
fn a_job_of_after_a_restart_does_not_wait_with_those_of_before() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    let failed = WorkerState {
        status: WorkerStatus::Failed,
        start_failure: Some("bad".into()),
        ..idle("w0", 0)
    };
    tested.index.set_pool(PoolState {
        workers: vec![failed],
        models: vec![on_disk(0, 1)],
        ..bare_pool("p0")
    });
    tested.change(put(0), JobId::random());
    tested.change(Change::Time(10), JobId::random());
    tested.pass().unwrap();
    assert_eq!(tested.jobs.len(), 1);
    let late = JobId::random();
    tested.change(put(0), late);
    tested.pass().unwrap();
    assert!(!tested.jobs.contains(&late) && tested.jobs.len() == 1);
}

// [ORCHCORE-066] A start may take the memory for which another was refused, so that the other one now needs an eviction.
#[test]
fn a_refused_start_is_judged_again_when_another_takes_its_memory() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    tested.index.set_pool(PoolState {
        devices: vec![DeviceState {
            device: device(0),
            free_bytes: 3,
            total_bytes: 6,
        }],
        workers: vec![idle("w0", 2)],
        models: vec![on_disk(1, 3), on_disk(3, 1)],
        refused_starts: vec![RefusedStart {
            model: model(1),
            device: device(0),
            context_length: None,
            message: "no".into(),
        }],
        ..bare_pool("p0")
    });
    tested.change(Change::Time(60), JobId::random());
    tested.change(put(1), JobId::random());
    tested.pass().unwrap();
    tested.change(put(3), JobId::random());
    tested.pass().unwrap();
    let evict = Action::EvictWorker {
        pool: "p0".into(),
        worker: "w0".into(),
        needed_by: model(1),
    };
    assert_eq!(tested.index.pass(at(60)).actions, [evict]);
}

// [ORCHCORE-066] A start may take the memory of a worker that was stopped for another model, so that the other model needs a
// further eviction.
#[test]
fn a_class_that_waits_for_memory_is_judged_again_when_a_start_takes_it() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    let ending = WorkerState {
        status: WorkerStatus::Draining,
        memory_bytes: 2,
        ..idle("w0", 3)
    };
    tested.index.set_pool(PoolState {
        devices: vec![DeviceState {
            device: device(0),
            free_bytes: 1,
            total_bytes: 6,
        }],
        workers: vec![
            ending,
            WorkerState {
                memory_bytes: 3,
                ..idle("w1", 0)
            },
        ],
        models: vec![on_disk(1, 3), on_disk(3, 1)],
        ..bare_pool("p0")
    });
    tested.change(put(1), JobId::random());
    tested.pass().unwrap();
    tested.change(put(3), JobId::random());
    tested.pass().unwrap();
    let evict = Action::EvictWorker {
        pool: "p0".into(),
        worker: "w1".into(),
        needed_by: model(1),
    };
    assert_eq!(tested.index.pass(at(0)).actions, [evict]);
}

// [ORCHCORE-066] If the only pool with the file can't run it any more, another pool may download it.
#[test]
fn a_class_that_was_short_of_memory_may_come_to_lack_the_model() {
    let settings = Settings {
        download: true,
        evict: false,
        ..Settings::default()
    };
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, settings);
    let with_file = PoolState {
        models: vec![on_disk(0, 3)],
        ..bare_pool("p1")
    };
    tested.index.set_pool(with_file.clone());
    tested.index.set_pool(PoolState {
        disk_free_bytes: 1 << 31,
        ..bare_pool("p2")
    });
    tested.change(put(0), JobId::random());
    tested.pass().unwrap();
    tested.index.set_pool(PoolState {
        devices: vec![],
        ..with_file
    });
    let download = Action::Download {
        pool: "p2".into(),
        model: model(0),
    };
    assert_eq!(tested.index.pass(at(0)).actions, [download]);
}

// [ORCHCORE-062] A pool's report of a worker's idleness may be older than our own leases.
#[test]
fn idleness_counts_from_the_end_of_the_latest_lease() {
    let settings = Settings {
        idle_ttl: Some(SignedDuration::from_secs(120)),
        ..Settings::default()
    };
    let mut index = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, settings).index;
    let worker = WorkerState {
        id: "w0".into(),
        ..WorkerState::asked_for(
            &ModelState {
                model: model(0),
                file: file(),
                needed_bytes: 1,
                context: None,
            },
            device(0),
            None,
            at(0),
        )
    };
    index.set_pool(PoolState {
        id: "p0".into(),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![],
        workers: vec![WorkerState {
            status: WorkerStatus::Ready,
            idle_since: Some(at(0)),
            ..worker
        }],
        models: vec![],
        disk_free_bytes: 0,
        downloads: vec![],
        refused_starts: vec![],
        refused_downloads: vec![],
        last_start: 0,
    });
    index.lease("p0", "w0");
    assert_eq!(index.pass(at(119)).actions, []);
    assert_eq!(index.pass(at(130)).actions, []);
    index.release("p0", "w0", true, at(140));
    let pass = index.pass(at(150));
    assert_eq!((pass.actions, pass.wake), (vec![], Some(at(260))));
    let unload = Action::UnloadWorker {
        pool: "p0".into(),
        worker: "w0".into(),
    };
    assert_eq!(index.pass(at(260)).actions, [unload]);
}

// [ORCHCORE-180] A job moves between the shares as pools come and go.
#[test]
fn jobs_that_nothing_can_run_are_counted_apart() {
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    let load = |jobs| Load {
        jobs,
        bytes: jobs as u64,
    };
    for m in [0, 0, 3] {
        tested.change(put(m), JobId::random());
    }
    assert_eq!(tested.index.stranded(), load(3));
    let pool = || PoolState {
        models: vec![on_disk(0, 9 * UNIT)],
        ..bare_pool("p0")
    };
    // Other workers hold the memory, but may release it.
    tested.index.set_pool(pool());
    assert_eq!(tested.index.stranded(), load(1));
    tested.change(put(0), JobId::random());
    assert_eq!(tested.index.stranded(), load(1));
    tested.index.set_pool(PoolState {
        liveness: PoolLiveness::Suspect,
        ..pool()
    });
    assert_eq!(tested.index.stranded(), load(1));
    tested.index.set_pool(PoolState {
        draining: true,
        ..pool()
    });
    assert_eq!(tested.index.stranded(), load(4));
    // No device is large enough.
    tested.index.set_pool(PoolState {
        models: vec![on_disk(0, 10 * UNIT)],
        ..bare_pool("p0")
    });
    assert_eq!(tested.index.stranded(), load(4));
    tested.index.set_pool(PoolState {
        workers: vec![idle("w0", 3)],
        models: vec![],
        ..bare_pool("p0")
    });
    assert_eq!(tested.index.stranded(), load(3));
    tested.index.remove_pool("p0");
    assert_eq!(tested.index.stranded(), load(4));
    for id in tested.jobs.clone() {
        tested.index.remove(id);
    }
    assert_eq!(tested.index.stranded(), load(0));
}

// [ORCHCORE-187] If the job that workers were reserved for is gone or has its room, the others are evaluated in the same pass or
// the next.
#[test]
fn what_was_kept_for_a_job_is_given_to_others_when_it_is_gone() {
    let busy = WorkerState {
        status: WorkerStatus::Busy,
        slots: 4,
        free_tokens: Some(300),
        idle_since: None,
        ..idle("w0", 0)
    };
    let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
    tested.index.lease("p0", "w0");
    let state = |free_tokens| PoolState {
        workers: vec![WorkerState {
            free_tokens: Some(free_tokens),
            ..busy.clone()
        }],
        ..bare_pool("p0")
    };
    tested.index.set_pool(state(300));
    let ids: Vec<_> = (0..4).map(|_| JobId::random()).collect();
    let needs = |cache| {
        let mut change = put(0);
        if let Change::Put { cache: needed, .. } = &mut change {
            *needed = cache;
        }
        change
    };
    for (id, cache) in ids.iter().zip([Some(800), None, Some(900), None]) {
        tested.change(needs(cache), *id);
    }
    let given = |pass: PassOutcome| -> Vec<JobId> {
        let jobs = pass.actions.into_iter().map(|action| match action {
            Action::Dispatch { job, .. } => job,
            other => panic!("{other:?}"),
        });
        jobs.collect()
    };
    assert_eq!(given(tested.index.pass(at(100))), []);
    // No worker stays reserved for a cancelled job.
    tested.index.remove(ids[0]);
    assert_eq!(given(tested.index.pass(at(100))), [ids[1]]);
    assert_eq!(given(tested.index.pass(at(100))), []);
    // No worker stays reserved for a job that got its room.
    tested.index.set_pool(state(950));
    assert_eq!(given(tested.index.pass(at(100))), [ids[2]]);
    for _ in 0..2 {
        tested.index.answered("p0", "w0");
    }
    assert_eq!(given(tested.index.pass(at(100))), [ids[3]]);
}

// [ORCHCORE-189]
#[test]
fn a_job_that_may_be_refused_is_offered_when_the_worker_has_answered_those_before() {
    let ids: Vec<_> = (0..4).map(|_| JobId::random()).collect();
    let queued = || {
        let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
        tested.index.lease("p0", "w0");
        let pool = PoolState {
            workers: vec![WorkerState {
                status: WorkerStatus::Busy,
                context_length: Some(1024),
                slots: 6,
                free_tokens: Some(1000),
                idle_since: None,
                ..idle("w0", 0)
            }],
            ..bare_pool("p0")
        };
        tested.index.set_pool(pool.clone());
        for (id, tokens) in ids.iter().zip([200, 800, 10, 10]) {
            let mut change = put(0);
            if let Change::Put { max_tokens, .. } = &mut change {
                *max_tokens = tokens;
            }
            tested.change(change, *id);
        }
        tested.pass().unwrap();
        assert_eq!(tested.jobs, ids[1..]);
        (tested, pool)
    };
    // The second job goes alone, whether the worker takes the first job or refuses it.
    for refuses in [false, true] {
        let (mut tested, _) = queued();
        match refuses {
            true => tested.index.release("p0", "w0", false, at(100)),
            false => assert!(tested.index.answered("p0", "w0")),
        }
        tested.pass().unwrap();
        assert_eq!(tested.jobs, ids[2..]);
        tested.pass().unwrap();
        assert_eq!(tested.jobs, ids[2..]);
        assert!(tested.index.answered("p0", "w0"));
        tested.pass().unwrap();
        assert_eq!(tested.jobs, ids[3..]);
    }
    // A job that comes before the large one, and surely fits.
    let (mut batch, _) = queued();
    for id in &ids[1..] {
        let job = batch.index.remove(*id).unwrap().as_ref().clone();
        batch.index.put(QueuedJob {
            priority: Priority::Batch,
            turn: None,
            ..job
        });
    }
    batch.pass().unwrap();
    assert_eq!(batch.jobs, ids[1..]);
    let mut small = put(0);
    if let Change::Put { max_tokens, .. } = &mut small {
        *max_tokens = 10;
    }
    batch.change(small, JobId::random());
    batch.pass().unwrap();
    assert_eq!(batch.jobs, ids[1..]);
    // The job that takes the place of a cancelled one fits in any case.
    let (mut cancelled, _) = queued();
    cancelled.index.remove(ids[1]);
    cancelled.jobs.remove(0);
    cancelled.pass().unwrap();
    assert_eq!(cancelled.jobs, []);
    // An offer outlasts the pool's absence, in which the worker may answer.
    for answers in [false, true] {
        let (mut away, pool) = queued();
        away.index.remove_pool("p0");
        if answers {
            assert!(!away.index.answered("p0", "w0"));
        }
        away.index.set_pool(PoolState {
            workers: vec![WorkerState {
                free_tokens: Some(700),
                ..pool.workers[0].clone()
            }],
            ..pool
        });
        away.pass().unwrap();
        assert_eq!(away.jobs, ids[if answers { 2 } else { 1 }..]);
    }
}

// [ORCHCORE-187] No worker stays reserved for a job that another worker is being started for.
#[test]
fn what_was_kept_for_a_job_is_given_to_others_when_a_worker_starts_for_it() {
    let tested = || {
        let mut tested = Tested::new(BuiltIn::LeastLoaded, QueueOrder::Fair, Settings::default());
        tested.index.lease("p0", "w0");
        tested.index.set_pool(PoolState {
            devices: vec![DeviceState {
                device: device(0),
                free_bytes: 3 * UNIT,
                total_bytes: 6 * UNIT,
            }],
            models: vec![ModelState {
                context: Some(ContextMemory {
                    max_tokens: 512,
                    default_tokens: 512,
                    base_bytes: 0,
                    token_bytes: 1,
                    floor_bytes: 0,
                }),
                ..on_disk(0, 1)
            }],
            workers: vec![WorkerState {
                context_length: Some(256),
                slots: 2,
                free_tokens: Some(0),
                ..idle("w0", 0)
            }],
            ..bare_pool("p0")
        });
        tested
    };
    let ids: Vec<_> = (0..3).map(|_| JobId::random()).collect();
    let (large, small, long) = ((None, Some(200)), (None, None), (Some(500), None));
    for needs in [[large, small, long], [large, long, small]] {
        let mut tested = tested();
        for (id, (needed, cached)) in ids.iter().zip(needs) {
            let mut change = put(0);
            if let Change::Put { context, cache, .. } = &mut change {
                (*context, *cache) = (needed, cached);
            }
            tested.change(change, *id);
        }
        // The large job waits for room, with the small one behind it. A worker is started for the long job, and both can use
        // that worker.
        tested.pass().unwrap();
        assert_eq!(tested.jobs, ids);
        tested.pass().unwrap();
        assert_eq!(tested.jobs.len(), 2);
    }
}
