//! The store compared with a simple model, under random operations and crashes.

use proptest::prelude::*;

use super::*;

/// An operation on the store. `job` counts back from the latest job, `behind` is the age of the fence.
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
    /// Death of the daemon during the operation, after a number of turns of the runtime.
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

/// A job according to the state machine, the rule of the fence and the promises.
#[derive(Debug, Clone, PartialEq)]
struct ModelJob {
    id: JobId,
    status: JobStatus,
    fence: u64,
    attempt: u32,
    /// Number of the last event; 0 once the log was dropped.
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

/// The state that the database must agree with.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    jobs: Vec<ModelJob>,
    keys: std::collections::BTreeMap<u8, (u8, JobId)>,
}

/// The model's expectation of an operation, and the operation itself with all its values decided.
struct Next {
    after: Model,
    accepted: bool,
    work: futures_util::future::BoxFuture<'static, bool>,
}

impl Model {
    /// Returns the index of the job, if there are that many.
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
                let job = Job::new(JobId::random(), spec("hi"), now);
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
                let key = key.map(|(key, body)| self::key(key, &body.to_string()));
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
                    context_needed: None,
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

/// Returns the database's state in terms of the model.
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
        // While a log is being dropped, some of its rows may remain, but no reader gets them.
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
            if let Ok(Some((id, _))) = store.known_key(&self::key(key, &body.to_string())).await {
                found.keys.insert(key, (body, id));
            }
        }
    }
    found
}

/// Opens the store again, as the daemon's start does. Opening alone changes nothing: interrupted attempts keep their leases,
/// and are looked for at their workers.
async fn reopened(place: &impl Place, model: &Model) -> Store {
    let store = place.open().await;
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

// [ORCHD-008] P1, P2, P3, P4: after any operations in any order, and a crash anywhere, the database agrees with the model:
// acknowledged changes are there, others are there wholly or not at all.
pub fn the_database_follows_the_model<P: Place>() {
    let config = ProptestConfig {
        cases: 48,
        ..ProptestConfig::default()
    };
    proptest!(config, |(ops in proptest::collection::vec(op(), 1..40))| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let place = P::new();
            let mut store = place.open().await;
            let mut model = Model::default();
            for op in ops {
                if let Op::Restart = op {
                    store.close(Duration::from_secs(20)).await;
                    store = reopened(&place, &model).await;
                } else if let Op::Crash(op, turns) = &op {
                    let Some(next) = model.next(&store, op) else { continue };
                    let work = tokio::spawn(next.work);
                    for _ in 0..*turns {
                        tokio::task::yield_now().await;
                    }
                    store.crash().await;
                    // The spawned work holds the store as well, so it ends only with its command's channel.
                    let acknowledged = work.await.unwrap();
                    let new = place.open().await;
                    let found = observed(&new, &next.after).await;
                    if found == next.after {
                        model = next.after;
                    } else {
                        // A sweep makes many commits, and those made before the crash remain.
                        let swept = matches!(**op, Op::Sweep);
                        assert!(!acknowledged && (swept || found == model), "{op:?}: {found:?}");
                        if swept {
                            let again = model.next(&new, op).unwrap();
                            again.work.await;
                            model = again.after;
                        }
                    }
                    new.close(Duration::from_secs(20)).await;
                    store = reopened(&place, &model).await;
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
    });
}
