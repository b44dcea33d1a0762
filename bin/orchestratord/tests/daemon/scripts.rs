//! Scheduler scripts in a running daemon.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use orchestrator_core::api::scheduler::{
    CheckAnswer, SchedulerView, ScriptErrorKind, SimulateAnswer,
};
use orchestrator_core::api::tasks::TaskExplanation;
use orchestrator_core::scheduler::{Action, WaitReason};
use orchestrator_core::script::Script;
use orchestrator_core::simulate;
use orchestrator_core::trace::{By, EndReason, Trace};
use orchestrator_core::{JobId, JobStatus};
use pool_core::kit::client::Method;
use pool_core::worker::CacheRoom;
use serde_json::json;

use crate::support::{FakePool, FakeWorker, MODEL, Orchestrator, eventually, soon};

/// A daemon with a scheduler script, and one worker with one slot.
struct Scripted {
    orchestrator: Orchestrator,
    worker: FakeWorker,
    path: PathBuf,
    _pool: FakePool,
    _folder: tempfile::TempDir,
}

impl Scripted {
    /// Tests of anything but the limit choose a long one, because the machine may be busy.
    async fn start(source: &[u8], limit_ms: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.rhai");
        std::fs::write(&path, source).unwrap();
        let orchestrator = Orchestrator::start_with(|config| {
            config.scheduler.script = Some(path.clone());
            config.scheduler.script_limit_ms = limit_ms;
        })
        .await;
        let worker = FakeWorker::start("worker-cpu-0").await;
        let pool = FakePool::start("pool-a").await.has(&worker);
        pool.register(&orchestrator).await;
        Self {
            orchestrator,
            worker,
            path,
            _pool: pool,
            _folder: folder,
        }
    }

    /// Saves a new version the way editors do, by a rename.
    fn save(&self, source: &str) {
        let new = self.path.with_extension("new");
        std::fs::write(&new, source).unwrap();
        std::fs::rename(&new, &self.path).unwrap();
    }

    async fn view(&self) -> SchedulerView {
        self.orchestrator.client.get("/v2/scheduler").await.unwrap()
    }

    async fn job(&self, max_tokens: u32) -> JobId {
        let body = json!({"model": MODEL, "prompt": "hi", "seed": 1, "max_tokens": max_tokens});
        self.orchestrator.submit(body).await.unwrap().job_id
    }

    /// Runs the worker's `count`th job to its end.
    async fn finish(&self, count: usize) -> JobId {
        let job: JobId = self.worker.request(count).await.job_id.parse().unwrap();
        self.worker.started(job);
        self.worker.tokens(job, 0..1);
        self.worker.end(job, 1);
        self.orchestrator.until(job, JobStatus::Completed).await;
        job
    }

    async fn metric(&self, name: &str) -> f64 {
        orchestrator_metric(&self.orchestrator, name).await
    }
}

const SHORTEST_FIRST: &[u8] = include_bytes!("../../policies/shortest-job-first.rhai");

// [ORCHD-140]
#[tokio::test(flavor = "multi_thread")]
async fn a_script_decides_in_place_of_the_built_in_policy() {
    let scripted = Scripted::start(SHORTEST_FIRST, 1000).await;
    let first = scripted.job(100).await;
    scripted.worker.request(1).await;
    let (long, short) = (scripted.job(2000).await, scripted.job(10).await);
    assert_eq!(scripted.finish(1).await, first);
    assert_eq!(scripted.finish(2).await, short);
    assert_eq!(scripted.finish(3).await, long);
    let script = scripted.view().await.script.unwrap();
    assert!(script.runs > 0, "{script:?}");
    assert_eq!((script.fallbacks, script.last_error), (0, None));
    assert_eq!(script.sha256.unwrap().len(), 64);
}

// [ORCHD-141] A job that a script holds back says so, and is reconsidered at the time that the script gave.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_a_script_lets_wait_says_so_and_is_looked_at_again() {
    let source = "fn schedule(ctx) {
        let out = [];
        for j in ctx.jobs {
            out.push(if j.age_ms < 5000 { wait(j, \"not yet\", 200) } else { dispatch(j, best_worker(ctx, j)) });
        }
        out
    }";
    let scripted = Scripted::start(source.as_bytes(), 1000).await;
    let job = scripted.job(10).await;
    // Until the script has run, there is no explanation from it.
    let waiting = eventually("the script's word", async || {
        let waiting = scripted.orchestrator.show(job).await.waiting;
        waiting.filter(|waiting| waiting.explanation.message.ends_with("not yet"))
    })
    .await;
    assert_eq!(waiting.explanation.reason, WaitReason::PolicyHeld);
    let explain = format!("/v2/tasks/{job}/explain");
    let explained: TaskExplanation = scripted.orchestrator.client.get(&explain).await.unwrap();
    assert_eq!(
        explained.waiting.unwrap().explanation.message,
        waiting.explanation.message
    );
    assert_eq!(scripted.finish(1).await, job);
}

// [ORCHD-142] [P21] Whatever the script does, jobs flow: a pass costs at most the limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_script_costs_its_limit_and_the_built_in_policy_decides() {
    let body = |statements: &str| format!("fn schedule(ctx) {{ {statements} }}");
    let slow = "let a = []; a.pad(4000, 0); let n = 0; while n < 1900000 { a.sort(); n += 1; } []";
    let cases = [
        ("an endless loop", body("loop {}")),
        ("a slow one", body(slow)),
        (
            "recursion",
            "fn f() { f() } fn schedule(ctx) { f() }".to_owned(),
        ),
        ("a huge string", body("let s = \"x\"; loop { s += s; }")),
        ("a huge array", body("let a = [1]; loop { a += a; }")),
        ("a throw", body("throw 1")),
        ("nothing", body("")),
        ("a number", body("1")),
        ("views", body("ctx.jobs")),
        (
            "an invalid action",
            body(
                "[evict_worker(ctx.workers[0], ctx.jobs[0]), dispatch(ctx.jobs[0], ctx.workers[0]), dispatch(ctx.jobs[0], ctx.workers[0])]",
            ),
        ),
    ];
    for (what, source) in cases {
        let scripted = Scripted::start(source.as_bytes(), 50).await;
        for count in 1..=3 {
            let begun = Instant::now();
            let job = scripted.job(10).await;
            scripted.worker.request(count).await;
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(10), "{what}: {took:?}");
            assert_eq!(scripted.finish(count).await, job, "{what}");
        }
        let script = scripted.view().await.script.unwrap();
        assert!(script.fallbacks >= 3, "{what}: {script:?}");
        assert_eq!(script.fallbacks, script.runs, "{what}: {script:?}");
        let counted = scripted.metric("orchd_script_errors_total").await;
        assert!(counted >= 3.0, "{what}: {counted}");
    }
}

// [ORCHD-143] [P21] A script that can't be loaded does not prevent a start.
#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_does_not_load_leaves_the_built_in_policy_in_force() {
    let big = format!("fn schedule(ctx) {{ [] }}{}", " ".repeat(10 << 20));
    let cases: [(&[u8], &str); 5] = [
        (b"fn schedule(ctx) { import \"os\" as os; [] }", "import"),
        (b"fn schedule(ctx) { eval(\"loop {}\") }", "eval"),
        (b"fn schedule(ctx) {", "line 1"),
        (b"\xff\xfe", "UTF-8"),
        (big.as_bytes(), "at most 65536"),
    ];
    for (source, expected) in cases {
        let scripted = Scripted::start(source, 1000).await;
        let job = scripted.job(10).await;
        assert_eq!(scripted.finish(1).await, job);
        let script = scripted.view().await.script.unwrap();
        let refused = script.refused.unwrap();
        assert!(
            format!(
                "{} {}",
                refused.error,
                refused
                    .error
                    .line
                    .map_or(String::new(), |l| format!("line {l}"))
            )
            .contains(expected),
            "{refused:?}"
        );
        assert_eq!((script.sha256, script.runs), (None, 0));
        assert_eq!(scripted.metric("orchd_script_refused").await, 1.0);
    }
}

// [ORCHD-144]
#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_is_loaded_and_a_bad_one_leaves_the_old_in_force() {
    let scripted = Scripted::start(SHORTEST_FIRST, 1000).await;
    let good = scripted.view().await.script.unwrap().sha256.unwrap();

    scripted.save("fn schedule(ctx) {\n  let x = ;\n}");
    let script = eventually("the refusal", async || {
        scripted.view().await.script.filter(|s| s.refused.is_some())
    })
    .await;
    let refused = script.refused.unwrap();
    assert_eq!(script.sha256.as_ref(), Some(&good));
    assert_eq!(
        (refused.error.kind, refused.error.line),
        (ScriptErrorKind::Compile, Some(2))
    );
    assert_eq!(script.errors[&ScriptErrorKind::Compile], 1);
    assert_eq!(scripted.metric("orchd_script_refused").await, 1.0);
    assert_eq!(
        scripted
            .metric("orchd_script_errors_total{kind=\"compile\"}")
            .await,
        1.0
    );
    scripted.job(10).await;
    scripted.finish(1).await;
    let script = scripted.view().await.script.unwrap();
    assert!(script.runs > 0 && script.fallbacks == 0, "{script:?}");

    scripted.save("fn schedule(ctx) { ctx.nothing }");
    let script = eventually("the new version", async || {
        let script = scripted.view().await.script?;
        (script.sha256.as_ref() != Some(&good)).then_some(script)
    })
    .await;
    assert_eq!(script.refused, None);
    assert_eq!(scripted.metric("orchd_script_refused").await, 0.0);
    scripted.job(10).await;
    scripted.finish(2).await;
    let script = scripted.view().await.script.unwrap();
    assert_eq!(
        script.last_error.unwrap().error.kind,
        ScriptErrorKind::Runtime
    );

    std::fs::remove_file(&scripted.path).unwrap();
    let script = eventually("the missing file", async || {
        scripted.view().await.script.filter(|s| s.refused.is_some())
    })
    .await;
    assert!(script.sha256.is_some(), "{script:?}");
}

// [ORCHD-145]
#[tokio::test(flavor = "multi_thread")]
async fn a_script_can_be_checked_before_it_is_used() {
    let orchestrator = Orchestrator::start().await;
    let check = async |script: &str| {
        orchestrator
            .client
            .post::<_, CheckAnswer>("/v2/scheduler/check", &json!({"script": script}))
            .await
    };
    let good = check(std::str::from_utf8(SHORTEST_FIRST).unwrap())
        .await
        .unwrap();
    assert!(good.ok && !good.actions.is_empty(), "{good:?}");
    let bad = check("fn schedule(ctx) { loop {} }").await.unwrap();
    assert!(!bad.ok);
    let error = bad.error.unwrap();
    assert!(
        matches!(
            error.kind,
            ScriptErrorKind::Limit | ScriptErrorKind::Timeout
        ),
        "{error:?}"
    );
    let unknown = orchestrator
        .client
        .post::<_, CheckAnswer>("/v2/scheduler/check", &json!({"source": ""}))
        .await
        .unwrap_err();
    assert_eq!(unknown.status(), Some(400));
    let view: SchedulerView = orchestrator.client.get("/v2/scheduler").await.unwrap();
    assert_eq!((view.policy.as_str(), view.script), ("least-loaded", None));
}

/// Number of jobs in a live trace.
const JOBS: usize = 1000;

/// Runs [`JOBS`] jobs on two pools, and returns the daemon's recording of them. Now and then a worker's cache has less room
/// than the longer jobs may need.
async fn record_a_thousand(script: Option<PathBuf>) -> String {
    let orchestrator = Orchestrator::start_with(|config| {
        config.queue.capacity = -1;
        config.scheduler.script = script;
        config.scheduler.script_limit_ms = 1000;
    })
    .await;
    let trace = orchestrator
        .client
        .request(Method::GET, "/v2/scheduler/trace");
    let mut trace = orchestrator.client.relay(trace).await.unwrap();
    assert!(trace.status().is_success());
    let recorded = tokio::spawn(async move {
        let mut text = Vec::new();
        while let Some(piece) = trace.chunk().await.unwrap() {
            text.extend_from_slice(&piece);
        }
        String::from_utf8(text).unwrap()
    });
    let mut pools = Vec::new();
    let mut workers = Vec::new();
    for (number, id) in ["pool-a", "pool-b"].into_iter().enumerate() {
        let worker = FakeWorker::start(&format!("worker-cpu-{number}")).await;
        worker.be_fluent();
        let mut pool = FakePool::start(id).await.has(&worker);
        pool.workers[0].slots = 4;
        pool.workers[0].cache = left_of_cache(8192);
        pool.register(&orchestrator).await;
        pools.push(pool);
        workers.push(worker);
    }
    let submit = |number: usize| {
        orchestrator.submit(json!({
            "model": MODEL, "prompt": "whisper-this-to-nobody", "seed": 1,
            "max_tokens": 1 + number * 37 % 500, "session_id": format!("session-{}", number % 7),
            "priority": if number.is_multiple_of(3) { "batch" } else { "interactive" },
        }))
    };
    let end = Instant::now() + Duration::from_secs(300);
    let until = async |figure: &str, reached: &dyn Fn(f64) -> bool| {
        while !reached(orchestrator_metric(&orchestrator, figure).await) {
            assert!(Instant::now() < end, "the jobs take too long");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // A few jobs at once, so that some wait, but never so many that a pass takes long.
    for first in (0..JOBS).step_by(20) {
        let scarce = first % 100 == 0;
        if scarce {
            workers[0].has_left(Some(300));
        }
        for accepted in join_all((first..first + 20).map(submit)).await {
            accepted.unwrap();
        }
        if scarce {
            for free_tokens in [300, 8192] {
                pools[0].workers[0].cache = left_of_cache(free_tokens);
                pools[0].beat(&orchestrator).await;
            }
            workers[0].has_left(None);
        }
        until("orchd_queue_depth", &|waiting| waiting < 20.0).await;
    }
    let completed = "orchd_tasks_finished_total{outcome=\"completed\"}";
    until(completed, &|jobs| jobs >= JOBS as f64).await;
    orchestrator.stop().await;
    let text = recorded.await.unwrap();
    let secrets = workers.iter().map(|worker| worker.secret.as_str());
    for secret in secrets.chain(["whisper", "<0>", "http://"]) {
        assert!(!text.contains(secret), "the trace holds `{secret}`");
    }
    text
}

fn left_of_cache(free_tokens: u32) -> Option<CacheRoom> {
    Some(CacheRoom {
        tokens: 8192,
        free_tokens,
        executions: None,
    })
}

/// Replays a live trace: each pass must be decided to the same bytes again, and the workload must run under either policy.
fn replay_a_thousand(text: &str, scripts: &[(String, Script)]) -> Trace {
    let trace = Trace::read(text).unwrap();
    let end = trace.end.clone().unwrap();
    assert_eq!(
        (end.reason, end.passes),
        (EndReason::Shutdown, trace.passes.len() as u64)
    );
    let actions = trace.passes.iter().flat_map(|pass| &pass.decided.actions);
    let dispatched: HashSet<_> = actions
        .filter_map(|action| match action {
            Action::Dispatch { job, .. } => Some(*job),
            _ => None,
        })
        .collect();
    assert_eq!(dispatched.len(), JOBS);
    let needs = text.matches("\"cache_needed\"").count();
    assert!(needs > 0, "no job has found a cache too full");
    let answer = simulate::compare(&trace, scripts, &[], None).unwrap();
    let replay = answer.replay.unwrap();
    assert_eq!(replay.first_difference, None, "{replay:?}");
    assert_eq!((replay.equal, replay.skipped), (replay.passes, 0));
    assert_eq!(replay.passes, trace.passes.len() as u64);
    for report in &answer.reports {
        assert_eq!(report.dispatched, JOBS as u64, "{report:?}");
        assert_eq!((report.starved, report.fallbacks), (0, 0), "{report:?}");
    }
    trace
}

// [ORCHD-146] [ORCHD-147] A daemon records a thousand jobs while it runs them. The simulator decides every pass again, to the
// same bytes. The trace contains neither prompts nor secrets.
#[tokio::test(flavor = "multi_thread")]
async fn a_trace_of_a_thousand_jobs_is_decided_again_byte_for_byte() {
    let trace = replay_a_thousand(&record_a_thousand(None).await, &[]);
    assert!(
        trace
            .passes
            .iter()
            .all(|pass| pass.decided.by == By::BuiltIn)
    );
}

// [ORCHD-146] The same holds with a script in force.
#[tokio::test(flavor = "multi_thread")]
async fn a_trace_of_a_thousand_jobs_under_a_script_is_decided_again_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policy.rhai");
    std::fs::write(&path, SHORTEST_FIRST).unwrap();
    let text = record_a_thousand(Some(path)).await;
    let script = Script::compile(SHORTEST_FIRST).unwrap();
    let trace = replay_a_thousand(&text, &[("script".to_owned(), script)]);
    let passes = trace.passes.iter();
    let by_script = passes.filter(|pass| pass.decided.by == By::Script).count();
    assert!(by_script > JOBS / 10, "{by_script}");
}

// [ORCHD-148]
#[tokio::test(flavor = "multi_thread")]
async fn a_recording_lasts_as_long_as_it_is_read_and_can_be_simulated_through_the_api() {
    let scripted = Scripted::start(SHORTEST_FIRST, 1000).await;
    let client = &scripted.orchestrator.client;
    let open = async || {
        let request = client.request(Method::GET, "/v2/scheduler/trace");
        client.relay(request).await.unwrap()
    };
    let mut trace = open().await;
    let mut others = vec![open().await, open().await, open().await];
    assert_eq!(scripted.view().await.recordings, 4);
    let fifth = open().await;
    assert_eq!(fifth.status().as_u16(), 429);
    assert!(fifth.headers().contains_key("retry-after"));
    others.clear();
    eventually("the others' end", async || {
        (scripted.view().await.recordings == 1).then_some(())
    })
    .await;

    scripted.job(10).await;
    scripted.finish(1).await;
    let mut text = String::new();
    soon("the job's end in the trace", async {
        while !text.contains("\"freed\"") {
            let piece = trace.chunk().await.unwrap().unwrap();
            text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    })
    .await;
    drop(trace);
    let whole = text.rsplit_once('\n').unwrap().0.to_owned() + "\n";
    let short = client
        .get_text("/v2/scheduler/trace?for_ms=50")
        .await
        .unwrap();
    let ended = Trace::read(&short).unwrap().end.unwrap();
    assert_eq!(ended.reason, EndReason::Done);
    for wrong in ["for_ms=0", "for_ms=86400001", "for=1"] {
        let path = format!("/v2/scheduler/trace?{wrong}");
        let error = client.get_text(&path).await.unwrap_err();
        assert_eq!(error.status(), Some(400), "{wrong}");
    }
    let simulate = async |body: serde_json::Value| {
        client
            .post::<_, SimulateAnswer>("/v2/scheduler/simulate", &body)
            .await
    };
    let source = std::str::from_utf8(SHORTEST_FIRST).unwrap();
    let answer = simulate(json!({"trace": whole, "script": source}))
        .await
        .unwrap();
    let policies: Vec<_> = answer.reports.iter().map(|r| r.policy.as_str()).collect();
    assert_eq!(policies, ["least-loaded", "script"]);
    assert_eq!(answer.replay.unwrap().first_difference, None);
    for wrong in [
        json!({"trace": ""}),
        json!({"trace": "{}"}),
        json!({"trace": whole, "script": "fn"}),
        json!({"trace": whole, "policies": ["fastest"]}),
        json!({"script": source}),
    ] {
        let error = simulate(wrong.clone()).await.unwrap_err();
        assert_eq!(error.status(), Some(400), "{wrong}");
        assert!(error.api().unwrap().hint.is_some(), "{wrong}");
    }
}

async fn orchestrator_metric(orchestrator: &Orchestrator, name: &str) -> f64 {
    let text = orchestrator.client.get_text("/metrics").await.unwrap();
    let values = text.lines().filter(|line| line.starts_with(name));
    values
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
