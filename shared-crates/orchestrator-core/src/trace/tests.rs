use std::collections::BTreeMap;

use jiff::SignedDuration;
use pool_core::worker::{Device, ModelFile, WorkerStatus};
use proptest::prelude::*;

use super::*;
use crate::job::{Placement, Priority};
use crate::pool::PoolLiveness;
use crate::queue::QueueOrder;
use crate::scheduler::{DeviceState, LeastLoaded, ModelState, Settings, WorkerState, schedule};

fn header() -> Header {
    Header {
        version: VERSION,
        recorded_by: "test".into(),
        recorded_at: Timestamp::UNIX_EPOCH,
        policy: "least-loaded".into(),
        order: QueueOrder::Fair,
        promote_after_s: 300,
        costs: BTreeMap::new(),
    }
}

fn model(name: &str) -> ModelState {
    ModelState {
        model: name.parse().unwrap(),
        file: ModelFile {
            size_bytes: 1,
            modified_ns: 1,
            sha256: None,
        },
        needed_bytes: 10,
        context: None,
    }
}

fn id(number: u8) -> JobId {
    format!("job-01900000-0000-7000-8000-{number:012}")
        .parse()
        .unwrap()
}

/// Generates snapshots of a few jobs and pools. The numbers are small, so that neighbours have much in common but may differ in
/// every way.
fn any_snapshot() -> impl Strategy<Value = Snapshot> {
    let job = (0u8..6, 0u8..2, 0u32..2);
    let pool = (0u8..3, 0u32..3, any::<bool>());
    (
        proptest::collection::vec(job, 0..6),
        proptest::collection::vec(pool, 0..3),
        0u64..3,
        proptest::option::of(0i64..2),
    )
        .prop_map(|(jobs, pools, turns, ttl)| {
            let mut seen = HashSet::new();
            let jobs = jobs.into_iter().filter(|(number, ..)| seen.insert(*number));
            let jobs = jobs.map(|(number, of, max_tokens)| {
                Arc::new(QueuedJob {
                    id: id(number),
                    model: ["a", "b"][usize::from(of)].parse().unwrap(),
                    priority: Priority::Interactive,
                    session_id: (of == 1).then(|| "s".to_owned()),
                    created_at: Timestamp::UNIX_EPOCH,
                    not_before: None,
                    placement: Placement::default(),
                    turn: Some(u64::MAX),
                    bytes: 1,
                    max_tokens,
                    context_needed: None,
                    cache_needed: None,
                })
            });
            let pools: BTreeMap<u8, _> = pools
                .into_iter()
                .map(|(number, active, draining)| {
                    let worker = WorkerState {
                        id: "w".into(),
                        status: WorkerStatus::Ready,
                        slots: 2,
                        active,
                        unanswered: 0,
                        full: false,
                        ..WorkerState::asked_for(
                            &model("a"),
                            Device::CPU,
                            None,
                            Timestamp::UNIX_EPOCH,
                        )
                    };
                    let pool = PoolState {
                        id: format!("pool-{number}"),
                        liveness: PoolLiveness::Online,
                        draining,
                        devices: vec![DeviceState {
                            device: Device::CPU,
                            free_bytes: u64::MAX,
                            total_bytes: u64::MAX,
                        }],
                        workers: vec![worker],
                        models: vec![model("a")],
                        disk_free_bytes: 0,
                        downloads: vec![],
                        refused_starts: vec![],
                        refused_downloads: vec![],
                        last_start: 0,
                    };
                    (number, Arc::new(pool))
                })
                .collect();
            let sessions = (0..turns).map(|n| (format!("s{n}"), "pool-0".to_owned()));
            Snapshot {
                now: Timestamp::from_second(i64::try_from(turns).unwrap()).unwrap(),
                started_at: Timestamp::UNIX_EPOCH,
                settings: Settings {
                    idle_ttl: ttl.map(SignedDuration::from_secs),
                    ..Settings::default()
                },
                jobs: jobs.collect(),
                pools: pools.into_values().collect(),
                sessions: sessions.collect(),
                sizes: BTreeMap::new(),
                turns,
            }
        })
}

fn text(lines: impl IntoIterator<Item = Line>) -> String {
    lines
        .into_iter()
        .map(|line| serde_json::to_string(&line).unwrap() + "\n")
        .collect()
}

proptest! {
    // [ORCHCORE-150] Whatever changes from pass to pass, a trace reproduces every snapshot, and repeating the decisions
    // reproduces each of them, byte for byte.
    #[test]
    fn a_trace_gives_back_what_was_seen_and_decided(
        snapshots in proptest::collection::vec(any_snapshot(), 1..8),
    ) {
        let mut recorder = Recorder::default();
        let mut lines = vec![Line::Trace(header())];
        for snapshot in &snapshots {
            let plan = schedule(snapshot, &LeastLoaded);
            lines.extend(
                recorder.pass(snapshot, &[], &plan, By::BuiltIn, None).unwrap(),
            );
        }
        let trace = Trace::read(&text(lines)).unwrap();
        prop_assert_eq!(trace.passes.len(), snapshots.len());
        let (mut rebuild, mut scribe) = (Rebuild::default(), Scribe::default());
        for (pass, original) in trace.passes.iter().zip(&snapshots) {
            let snapshot = rebuild.next(&pass.saw).unwrap();
            prop_assert_eq!(&*snapshot, original);
            let plan = schedule(&snapshot, &LeastLoaded);
            let decided = scribe.write(&snapshot, &plan, By::BuiltIn, None);
            let line = serde_json::to_string(&Line::Decided(decided)).unwrap();
            prop_assert_eq!(&line, &pass.decided_line);
        }
    }
}

// [ORCHCORE-152] A job may end before the next pass, but its duration is still recorded.
#[test]
fn a_slot_that_a_decision_takes_is_freed_by_the_pass_that_does_not_see_it_any_more() {
    let dispatch = |number| Action::Dispatch {
        job: id(number),
        pool: "p".into(),
        worker: "w".into(),
    };
    let lease = |number| HeldSlot {
        job: id(number),
        pool: "p".into(),
        worker: "w".into(),
    };
    let snapshot = Snapshot {
        now: Timestamp::UNIX_EPOCH,
        started_at: Timestamp::UNIX_EPOCH,
        settings: Settings::default(),
        jobs: vec![],
        pools: vec![],
        sessions: BTreeMap::new(),
        sizes: BTreeMap::new(),
        turns: 0,
    };
    let mut recorder = Recorder::default();
    let mut pass = |leases: &[HeldSlot], actions: Vec<Action>| {
        let plan = Plan {
            actions,
            ..Plan::default()
        };
        let lines = recorder.pass(&snapshot, leases, &plan, By::BuiltIn, None);
        match lines.unwrap() {
            [Line::Saw(saw), _] => (saw.leased, saw.freed),
            other => panic!("{other:?}"),
        }
    };
    let before = pass(&[lease(9)], vec![dispatch(1), dispatch(2)]);
    assert_eq!(before, (vec![lease(9)], vec![]));
    // The first job has ended and the second still runs. The decision already recorded their leases.
    assert_eq!(pass(&[lease(2), lease(9)], vec![]), (vec![], vec![id(1)]));
    assert_eq!(pass(&[lease(9)], vec![]), (vec![], vec![id(2)]));
    assert_eq!(pass(&[], vec![]), (vec![], vec![id(9)]));
}

// [ORCHCORE-151]
#[test]
fn a_damaged_trace_is_refused_with_its_line_and_one_that_was_cut_off_is_read() {
    let error = |text: &str| Trace::read(text).unwrap_err();
    assert_eq!(error("").line, 1);
    assert_eq!(error("{}").line, 1);
    assert_eq!(error("[1]").line, 1);
    let newer = text([Line::Trace(Header {
        version: 2,
        ..header()
    })]);
    assert_eq!(
        error(&newer).to_string(),
        "line 1 of the trace: it has version 2, but this program reads version 1"
    );
    let saw = |pass| {
        Line::Saw(Saw {
            pass,
            ..Saw::default()
        })
    };
    let decided = |pass| {
        Line::Decided(Decided {
            pass,
            by: By::BuiltIn,
            script: None,
            actions: vec![],
            waits: vec![],
            wake: None,
        })
    };
    let skipped = text([Line::Trace(header()), saw(1), decided(1), saw(3)]);
    assert_eq!(error(&skipped).line, 4);
    let whole = text([
        Line::Trace(header()),
        saw(1),
        decided(1),
        saw(2),
        decided(2),
    ]);
    for cut in 0..whole.len() {
        match Trace::read(&whole[..cut]) {
            Ok(trace) => assert!(trace.end.is_none() && trace.passes.len() <= 2, "{cut}"),
            Err(error) => assert_eq!(error.line, 1, "{cut}: {error}"),
        }
    }
    let end = TraceEnd {
        passes: 0,
        reason: EndReason::Done,
    };
    let done = text([Line::Trace(header()), Line::End(end.clone())]);
    assert_eq!(Trace::read(&done).unwrap().end, Some(end));
}
