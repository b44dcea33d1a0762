mod limits;

use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;

use jiff::Timestamp;
use pool_core::api::pool::ContextMemory;
use pool_core::worker::{Device, ModelFile, WorkerStatus};

use super::*;
use crate::adopt::{self, Proposal};
use crate::check::check;
use crate::decide::{Costs, Decider, Decision};
use crate::job::{JobId, Placement, Priority};
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;
use crate::scheduler::{
    Action, DeviceState, LeastLoaded, ModelState, PoolState, Settings, Snapshot, WaitReason,
    WorkerState, schedule,
};
use crate::trace::By;

/// Only a broken limit makes a run take this long, even on a busy machine.
const LONG: Duration = Duration::from_secs(30);

static RUNNER: LazyLock<Mutex<Runner>> = LazyLock::new(|| Mutex::new(Runner::start().unwrap()));

fn file() -> ModelFile {
    ModelFile {
        size_bytes: 100,
        modified_ns: 1,
        sha256: None,
    }
}

fn worker(id: &str, model: &str, active: u32) -> WorkerState {
    WorkerState {
        id: id.into(),
        status: WorkerStatus::Ready,
        slots: 2,
        active,
        unanswered: 0,
        full: false,
        ..WorkerState::asked_for(
            &ModelState {
                model: model.parse().unwrap(),
                file: file(),
                needed_bytes: 1 << 30,
                context: None,
            },
            Device::CPU,
            None,
            Timestamp::UNIX_EPOCH,
        )
    }
}

fn pool(id: &str, free_bytes: u64, workers: Vec<WorkerState>) -> PoolState {
    let models = ["a", "b"].map(|model| ModelState {
        model: model.parse().unwrap(),
        file: file(),
        needed_bytes: 1 << 30,
        context: None,
    });
    PoolState {
        id: id.into(),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![DeviceState {
            device: Device::CPU,
            free_bytes,
            total_bytes: 8 << 30,
        }],
        workers,
        models: models.into(),
        disk_free_bytes: 0,
        downloads: vec![],
        refused_starts: vec![],
        refused_downloads: vec![],
        last_start: 0,
    }
}

fn job(model: &str, max_tokens: u32) -> QueuedJob {
    QueuedJob {
        id: JobId::random(),
        model: model.parse().unwrap(),
        priority: Priority::Interactive,
        session_id: None,
        created_at: Timestamp::UNIX_EPOCH,
        not_before: None,
        placement: Placement::default(),
        turn: None,
        bytes: 100,
        max_tokens,
        context_needed: None,
        cache_needed: None,
    }
}

fn snapshot(jobs: Vec<QueuedJob>, pools: Vec<PoolState>) -> Arc<Snapshot> {
    Arc::new(Snapshot {
        now: Timestamp::from_second(1000).unwrap(),
        started_at: Timestamp::UNIX_EPOCH,
        settings: Settings::default(),
        jobs: jobs.into_iter().map(Arc::new).collect(),
        pools: pools.into_iter().map(Arc::new).collect(),
        sessions: Default::default(),
        sizes: Default::default(),
        turns: 0,
    })
}

fn one_free_worker() -> Arc<Snapshot> {
    snapshot(
        vec![job("a", 10), job("a", 20), job("b", 30)],
        vec![pool("p", 4 << 30, vec![worker("w", "a", 0)])],
    )
}

fn pass(snapshot: &Arc<Snapshot>) -> Arc<ScriptInput> {
    let built_in = schedule(snapshot, &LeastLoaded);
    Arc::new(ScriptInput {
        candidates: adopt::candidates(snapshot, &built_in),
        snapshot: Arc::clone(snapshot),
        costs: Arc::new([("cheap".to_owned(), 0.5)].into()),
    })
}

fn run_on(snapshot: &Arc<Snapshot>, source: &str) -> Ran {
    let script = match Script::compile(source.as_bytes()) {
        Ok(script) => script,
        Err(error) => {
            return Ran {
                result: Err(error),
                printed: vec![],
            };
        }
    };
    let runner = RUNNER
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    runner.run(&script, pass(snapshot), LONG, true)
}

fn proposals(source: &str) -> Vec<Proposal> {
    let acts = run_on(&one_free_worker(), source).result.unwrap();
    acts.into_iter().map(|act| act.proposal).collect()
}

fn error(source: &str) -> ScriptError {
    run_on(&one_free_worker(), source).result.unwrap_err()
}

fn body(statements: &str) -> String {
    format!("fn schedule(ctx) {{ {statements} }}")
}

// [ORCHCORE-140]
#[test]
fn a_script_returns_actions_made_of_what_it_sees() {
    let found = proposals(&body(
        r#"let worker = ctx.workers[0];
           let device = ctx.pools[0].devices[0];
           [dispatch(ctx.jobs[1], worker), start_worker(device, ctx.jobs[2]), wait(ctx.jobs[0], "later", 500)]"#,
    ));
    assert_eq!(
        found,
        [
            Proposal::Dispatch {
                job: 1,
                pool: 0,
                worker: 0
            },
            Proposal::StartWorker {
                pool: 0,
                device: Device::CPU,
                model: "b".parse().unwrap(),
                context_length: None,
            },
            Proposal::Wait {
                job: 0,
                reason: "later".into(),
                again: Some(jiff::SignedDuration::from_millis(500))
            },
        ]
    );
}

// [ORCHCORE-141] Every name in the documentation, with its expected value for this snapshot.
#[test]
fn views_and_helpers_tell_what_the_snapshot_holds() {
    let mut jobs = vec![job("a", 10), job("b", 20)];
    jobs[0].session_id = Some("s".into());
    jobs[0].placement.pool = Some("cheap".into());
    jobs[1].created_at = Timestamp::from_second(990).unwrap();
    let mut busy = worker("w1", "a", 1);
    busy.idle_since = None;
    let mut idle = worker("w2", "b", 0);
    idle.idle_since = Some(Timestamp::from_second(998).unwrap());
    idle.memory_bytes = u64::MAX;
    let mut snapshot = snapshot(
        jobs,
        vec![
            pool("cheap", u64::MAX, vec![busy]),
            pool("dear", 7, vec![idle]),
        ],
    );
    Arc::make_mut(&mut snapshot)
        .sessions
        .insert("s".into(), "dear".into());
    let checks = [
        ("ctx.now_ms", "1000000"),
        ("ctx.waiting", "2"),
        ("ctx.jobs.len", "2"),
        ("ctx.pools.len", "2"),
        ("ctx.workers.len", "2"),
        ("ctx.jobs[0].model", "a"),
        ("ctx.jobs[0].priority", "interactive"),
        ("ctx.jobs[0].session", "s"),
        ("ctx.jobs[0].last_pool", "dear"),
        ("ctx.jobs[1].session == ()", "true"),
        ("ctx.jobs[0].pool", "cheap"),
        ("ctx.jobs[0].device == ()", "true"),
        ("ctx.jobs[1].age_ms", "10000"),
        ("age_ms(ctx.jobs[1])", "10000"),
        ("ctx.jobs[0].max_tokens", "10"),
        ("ctx.jobs[0].request_bytes", "100"),
        ("ctx.pools[0].id", "cheap"),
        ("ctx.pools[0].online", "true"),
        ("ctx.pools[0].cost", "0.5"),
        ("cost(ctx.pools[1])", "1.0"),
        ("cost(ctx.workers[0])", "0.5"),
        ("ctx.pools[0].models", r#"["a", "b"]"#),
        ("ctx.pools[1].devices[0].id", "cpu"),
        ("ctx.pools[1].devices[0].pool", "dear"),
        // Numbers above the range of a script's integers appear as the largest integer.
        ("ctx.pools[0].devices[0].free_bytes", "9223372036854775807"),
        ("free_bytes(ctx.pools[0])", "9223372036854775807"),
        ("free_bytes(ctx.pools[1], \"cpu\")", "7"),
        ("free_bytes(ctx.pools[1], \"cuda:0\")", "0"),
        (
            "needed_bytes(ctx.pools[0].devices[0], ctx.jobs[0])",
            "1073741824",
        ),
        ("ctx.workers[0].pool", "cheap"),
        ("ctx.workers[0].model", "a"),
        ("ctx.workers[0].device", "cpu"),
        ("ctx.workers[0].status", "ready"),
        ("ctx.workers[0].slots", "2"),
        ("ctx.workers[0].free_slots", "1"),
        ("ctx.workers[0].idle_ms == ()", "true"),
        ("ctx.workers[1].idle_ms", "2000"),
        ("ctx.workers[1].memory_bytes", "9223372036854775807"),
        ("workers_with(ctx, \"a\").len", "1"),
        ("workers_with(ctx, \"a\")[0].id", "w1"),
        ("workers_with(ctx, \"no model\").len", "0"),
        ("starting(ctx, \"a\")", "0"),
        ("fits(ctx.jobs[0], ctx.workers[0])", "true"),
        ("fits(ctx.jobs[0], ctx.workers[1])", "false"),
        ("fits(ctx.jobs[0], ctx.pools[0].devices[0])", "true"),
        ("fits(ctx.jobs[0], ctx.pools[1].devices[0])", "false"),
        ("best_worker(ctx, ctx.jobs[0]).id", "w1"),
        ("best_device(ctx, ctx.jobs[0]).pool", "cheap"),
        ("can_evict(ctx.workers[0], ctx.jobs[1])", "false"),
        ("can_evict(ctx.workers[1], ctx.jobs[0])", "true"),
    ];
    for (expression, expected) in checks {
        let ran = run_on(&snapshot, &body(&format!("print({expression}); []")));
        assert!(ran.result.is_ok(), "{expression}: {:?}", ran.result);
        assert_eq!(ran.printed, [expected], "{expression}");
    }
}

// [ORCHCORE-141] The replaced functions behave as the language defines them.
#[test]
fn lists_are_sorted_and_texts_replaced_as_rhai_does() {
    let checks = [
        ("let a = [3, 1, 2]; a.sort(|x, y| x - y); a", "[1, 2, 3]"),
        ("let a = [3, 1, 2]; a.sort(|x, y| x > y); a", "[3, 2, 1]"),
        ("let a = [3, 1, 2]; a.sort_by(|x, y| y - x); a", "[3, 2, 1]"),
        ("let a = [3, 1, 2]; a.sort(); a", "[1, 2, 3]"),
        (
            "let a = [[1, 9], [0, 8], [1, 7], [0, 6]]; a.sort(|x, y| x[0] - y[0]); a",
            "[[0, 8], [0, 6], [1, 9], [1, 7]]",
        ),
        (
            "let a = [1, 1, 2, 1]; a.dedup(|x, y| x == y); a",
            "[1, 2, 1]",
        ),
        (
            "let a = []; a.sort(|x, y| x - y); a.dedup(|x, y| true); a",
            "[]",
        ),
        ("let s = \"a-b-c\"; s.replace(\"-\", \"::\"); s", "a::b::c"),
        ("let s = \"a-b-c\"; s.replace('-', \"\"); s", "abc"),
        ("let s = \"a-b-c\"; s.replace('-', '+'); s", "a+b+c"),
        ("let s = \"ab\"; s.replace(\"\", \".\"); s", ".a.b."),
    ];
    for (statements, expected) in checks {
        let source = body(&format!("print({{ {statements} }}); []"));
        let ran = run_on(&one_free_worker(), &source);
        assert!(ran.result.is_ok(), "{statements}: {:?}", ran.result);
        assert_eq!(ran.printed, [expected], "{statements}");
    }
}

// [ORCHCORE-141]
#[test]
fn what_a_script_has_asked_for_is_gone_from_what_it_sees() {
    let ran = run_on(
        &one_free_worker(),
        &body(
            "let w = ctx.workers[0]; let d = ctx.pools[0].devices[0];
             let first = dispatch(ctx.jobs[0], w);
             print(`${w.free_slots} ${fits(ctx.jobs[0], w)} ${fits(ctx.jobs[1], w)}`);
             let second = start_worker(d, ctx.jobs[2]);
             print(`${d.free_bytes} ${starting(ctx, \"b\")}`);
             [first, second]",
        ),
    );
    assert_eq!(ran.result.unwrap().len(), 2);
    assert_eq!(ran.printed, ["1 false true", "3221225472 1"]);
}

// [ORCHCORE-143]
#[test]
fn an_error_tells_its_line_and_column() {
    let compile = error("fn schedule(ctx) {\n  let x = ;\n  []\n}");
    assert_eq!(
        (compile.kind, compile.line, compile.column),
        (ScriptErrorKind::Compile, Some(2), Some(11))
    );
    let deep = error("fn help() {\n  nowhere\n}\nfn schedule(ctx) {\n  help()\n}");
    assert_eq!((deep.kind, deep.line), (ScriptErrorKind::Runtime, Some(2)));
    assert_eq!(
        deep.to_string(),
        "line 2, column 3: Variable not found: nowhere"
    );
}

// [ORCHCORE-144]
#[test]
fn the_same_snapshot_gives_the_same_actions() {
    let source = body(
        "let m = #{}; for j in ctx.jobs { m[j.id] = j.max_tokens; }
         let out = []; for id in m.keys() { print(id); } for j in ctx.jobs { out.push(wait(j)); } out",
    );
    let snapshot = one_free_worker();
    let runs: Vec<_> = (0..3)
        .map(|_| {
            let ran = run_on(&snapshot, &source);
            let acts = ran.result.unwrap();
            (
                acts.into_iter().map(|a| a.proposal).collect::<Vec<_>>(),
                ran.printed,
            )
        })
        .collect();
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

fn decide(snapshot: &Arc<Snapshot>, source: &str) -> Decision {
    let script = Script::compile(source.as_bytes()).unwrap();
    Decider::script(&LeastLoaded, script, Costs::default(), LONG)
        .unwrap()
        .decide(snapshot)
}

// [ORCHCORE-186] [ORCHCORE-145]
#[test]
fn a_script_is_held_to_the_room_in_a_workers_cache() {
    let mut busy = worker("w", "a", 1);
    (busy.slots, busy.free_tokens) = (4, Some(1000));
    busy.context_length = Some(4096);
    let large = |tokens| QueuedJob {
        cache_needed: Some(tokens),
        ..job("a", 100)
    };
    let uncounted = QueuedJob {
        max_tokens: 2000,
        ..job("a", 100)
    };
    let snapshot = snapshot(
        vec![large(900), large(1001), large(600), uncounted],
        vec![pool("p", 4 << 30, vec![busy])],
    );
    let decided = |answer: &str| decide(&snapshot, &body(answer));
    for (answer, why) in [
        (
            "[dispatch(ctx.jobs[1], ctx.workers[0])]",
            "the job needs 1001 tokens of the worker's cache, but only 1000 are free",
        ),
        (
            "[dispatch(ctx.jobs[0], ctx.workers[0]), dispatch(ctx.jobs[2], ctx.workers[0])]",
            "the job needs 600 tokens of the worker's cache, but only 100 are free",
        ),
        (
            "[dispatch(ctx.jobs[0], ctx.workers[0]), dispatch(ctx.jobs[3], ctx.workers[0])]",
            "the job may need 2064 tokens of the worker's cache, and earlier ones are on their way there",
        ),
    ] {
        let error = decided(answer).error.unwrap();
        assert!(error.message.contains(why), "{answer}: {error}");
    }
    let seen = "let w = ctx.workers[0]; let first = dispatch(ctx.jobs[0], w); \
        if w.free_tokens != 100 || ctx.jobs[1].cache_needed != 1001 { throw `${w.free_tokens}`; }; [first]";
    let decision = decided(seen);
    assert!(decision.error.is_none(), "{:?}", decision.error);
    assert_eq!(decision.plan.actions.len(), 1);
}

// [ORCHCORE-181] [ORCHCORE-182] [ORCHCORE-145] A script sees the context that a job needs, and can't give it less.
#[test]
fn a_script_is_held_to_the_context_that_a_job_needs() {
    let mut small = worker("small", "a", 0);
    small.context_length = Some(512);
    let mut on = pool("p", 4 << 30, vec![small]);
    on.models[0].context = Some(ContextMemory {
        max_tokens: 8192,
        default_tokens: 512,
        base_bytes: 512 << 20,
        token_bytes: 1 << 20,
        floor_bytes: 0,
    });
    let long = QueuedJob {
        context_needed: Some(732),
        ..job("a", 100)
    };
    let snapshot = snapshot(vec![long], vec![on]);
    let decided = |answer: &str| {
        let line = format!(
            "let job = ctx.jobs[0]; let worker = ctx.workers[0]; let device = ctx.pools[0].devices[0];\n{answer}"
        );
        decide(&snapshot, &body(&line))
    };
    for (answer, why) in [
        (
            "[dispatch(job, worker)]",
            "the job needs a context of 732 tokens, but the worker has 512",
        ),
        (
            "[start_worker(device, \"a\")]",
            "no waiting job could use it",
        ),
        (
            "[start_worker(device, \"a\", 9000)]",
            "the context is 9000 tokens, but the file allows 1 to 8192",
        ),
        (
            "[start_worker(device, \"b\", 600)]",
            "the pool does not report which contexts the file allows",
        ),
        (
            "[start_worker(device, \"a\", -1)]",
            "not a valid number of tokens",
        ),
    ] {
        let error = decided(answer).error.unwrap();
        assert!(error.message.contains(why), "{answer}: {error}");
    }
    for (answer, tokens) in [
        // Room for the whole answer, in steps of 256 tokens.
        ("[start_worker(device, job)]", Some(1024)),
        ("[start_worker(device, \"a\", 732)]", Some(732)),
        (
            "if fits(job, worker) || !fits(job, device) || best_worker(ctx, job) != () { throw \"wrong\"; }; [start_worker(best_device(ctx, job), \"a\", job.context_needed + worker.context_length)]",
            Some(1244),
        ),
    ] {
        let decision = decided(answer);
        assert_eq!(decision.error, None, "{answer}");
        let start = Action::StartWorker {
            pool: "p".into(),
            model: "a".parse().unwrap(),
            device: Device::CPU,
            context_length: tokens,
        };
        assert_eq!(decision.plan.actions, [start], "{answer}");
    }
}

// [ORCHCORE-145] [P21] Each answer breaks one rule. None of its actions takes effect; the built-in plan replaces it.
#[test]
fn one_invalid_action_leaves_the_pass_to_the_built_in_policy() {
    let mut jobs = vec![job("a", 10), job("a", 20), job("b", 30), job("a", 40)];
    jobs[1].placement.pool = Some("q".into());
    let mut draining = pool("q", 4 << 30, vec![worker("w", "a", 0)]);
    draining.draining = true;
    let mut new = worker("new", "b", 0);
    new.ready_at = Some(Timestamp::from_second(999).unwrap());
    let mut refusing = pool("r", 1, vec![]);
    refusing.models.truncate(1);
    let mut elsewhere = worker("elsewhere", "b", 0);
    elsewhere.full = true;
    let snapshot = snapshot(
        jobs,
        vec![
            pool(
                "p",
                1 << 30,
                vec![worker("free", "a", 1), worker("full", "a", 2), new],
            ),
            draining,
            refusing,
            pool("s", 1 << 30, vec![elsewhere]),
        ],
    );
    let built_in = schedule(&snapshot, &LeastLoaded);
    let cases = [
        (
            "[dispatch(jobs[0], workers[0]), dispatch(jobs[0], workers[0])]",
            "already has an action",
        ),
        (
            "[dispatch(jobs[0], workers[0]), wait(jobs[0])]",
            "already has an action",
        ),
        (
            "[dispatch(jobs[0], workers[0]), dispatch(jobs[2], workers[0])]",
            "all 2 slots of the worker are in use",
        ),
        (
            "[dispatch(jobs[0], workers[1])]",
            "all 2 slots of the worker are in use",
        ),
        ("[dispatch(jobs[0], workers[2])]", "the worker runs `b`"),
        ("[dispatch(jobs[0], workers[3])]", "the pool is draining"),
        (
            "[start_worker(ctx.pools[2].devices[0], jobs[0])]",
            "it needs 1 GiB, but only 1 B is free",
        ),
        (
            "[start_worker(ctx.pools[2].devices[0], \"b\")]",
            "does not have the model",
        ),
        (
            "[start_worker(ctx.pools[0].devices[0], \"a\"), start_worker(ctx.pools[0].devices[0], \"a\")]",
            "0 B is free",
        ),
        (
            "[start_worker(ctx.pools[0].devices[0], \"c\")]",
            "does not have the model",
        ),
        ("[evict_worker(workers[0], jobs[0])]", "it is not idle"),
        ("[evict_worker(workers[2], jobs[0])]", "it stays for 1m"),
        ("[evict_worker(workers[4], jobs[0])]", "it is not idle"),
    ];
    for (answer, why) in cases {
        let source = body(&format!(
            "let jobs = ctx.jobs; let workers = ctx.workers;\n{answer}"
        ));
        let decision = decide(&snapshot, &source);
        let error = decision.error.unwrap();
        assert_eq!(
            decision.by,
            By::Fallback(ScriptErrorKind::Action),
            "{answer}"
        );
        assert!(error.message.contains(why), "{answer}: {error}");
        assert_eq!(error.line, Some(2), "{answer}: {error}");
        assert_eq!(decision.plan, built_in, "{answer}");
    }
    let many = decide(
        &snapshot,
        &body("let a = dispatch(ctx.jobs[0], ctx.workers[0]); let l = []; l.pad(2000, a); l"),
    );
    assert!(many.error.unwrap().message.contains("at most 1024"));
}

// [ORCHCORE-146]
#[test]
fn a_scripts_plan_is_done_and_every_other_job_has_its_reason() {
    let jobs = vec![job("a", 10), job("a", 20), job("b", 30), job("nowhere", 1)];
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    let mut idle = worker("idle", "a", 0);
    idle.idle_since = Some(Timestamp::UNIX_EPOCH);
    let snapshot = snapshot(
        jobs,
        vec![pool("p", 4 << 30, vec![worker("w", "a", 0), idle])],
    );
    let decision = decide(
        &snapshot,
        &body("[dispatch(ctx.jobs[1], ctx.workers[0]), wait(ctx.jobs[0], \"not\\nyet\", 5000)]"),
    );
    assert_eq!(decision.by, By::Script);
    // The idle worker has been idle for longer than `idle_ttl`. Stopping it is not up to the script.
    assert_eq!(
        decision.plan.actions[0],
        Action::Dispatch {
            job: ids[1],
            pool: "p".into(),
            worker: "w".into()
        }
    );
    assert!(
        decision.plan.actions[1..].iter().all(
            |action| matches!(action, Action::UnloadWorker { worker, .. } if worker == "idle")
        ),
        "{:?}",
        decision.plan.actions
    );
    let why = |index: usize| &decision.plan.waiting[&ids[index]];
    assert_eq!(why(0).reason, WaitReason::PolicyHeld);
    assert!(
        why(0).message.ends_with("holds the job back: not yet"),
        "{:?}",
        why(0)
    );
    assert_eq!(why(2).reason, WaitReason::PolicyHeld);
    assert_eq!(why(3).reason, WaitReason::ModelMissing);
    assert_eq!(decision.plan.waiting.len(), 3);
    let again = snapshot.now + jiff::SignedDuration::from_secs(5);
    assert!(decision.plan.wake.unwrap() <= again);
}

// [ORCHCORE-147]
#[test]
fn a_thousand_jobs_of_one_model_hide_none_of_another() {
    let mut jobs: Vec<_> = (0..1000).map(|_| job("a", 1)).collect();
    jobs.push(job("b", 2));
    jobs.push(job("nowhere", 3));
    let snapshot = snapshot(jobs, vec![pool("p", 4 << 30, vec![worker("w", "a", 0)])]);
    let offered = pass(&snapshot).candidates.clone();
    assert_eq!(offered.len(), adopt::MAX_CANDIDATES);
    assert!(offered.is_sorted() && offered.contains(&1000) && !offered.contains(&1001));
    let mut beyond = snapshot.jobs[500].as_ref().clone();
    beyond.placement.pool = Some("p".into());
    let refused = adopt::adopt(
        &snapshot,
        &LeastLoaded,
        &schedule(&snapshot, &LeastLoaded),
        &offered,
        &[Proposal::Wait {
            job: 999,
            reason: String::new(),
            again: None,
        }],
    );
    assert!(
        refused.is_err(),
        "a job that was not offered can't be acted on"
    );
}

// [ORCHCORE-148]
#[test]
fn a_check_says_what_a_script_does_on_the_sample() {
    let good = check(include_bytes!(
        "../../../../bin/orchestratord/policies/shortest-job-first.rhai"
    ));
    assert!(good.ok, "{good:?}");
    assert!(
        good.actions
            .iter()
            .any(|action| matches!(action, Action::Dispatch { .. })),
        "{good:?}"
    );
    assert_eq!(good.sha256.len(), 64);
    assert_eq!(
        check(b"fn schedule(ctx) { print(1 + 1); [] }").printed,
        ["2"]
    );
    let bad = check(b"fn schedule(ctx) {\n  ctx.jobs[0].nope\n}");
    let error = bad.error.unwrap();
    assert!(!bad.ok);
    assert_eq!(
        (error.kind, error.line),
        (ScriptErrorKind::Runtime, Some(2))
    );
    assert!(bad.actions.is_empty());
}
