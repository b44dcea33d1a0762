//! `scheduler check`: compiles a script and runs it on a sample.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::api::pool::ContextMemory;
use pool_core::worker::{Backend, Device, ModelFile, WorkerStatus};

use crate::api::scheduler::{CheckAnswer, SampleWait};
use crate::decide::{Costs, offer, settle};
use crate::job::{JobId, Placement, Priority};
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;
use crate::scheduler::{
    DeviceState, LeastLoaded, ModelState, PoolState, Settings, Snapshot, WorkerState, schedule,
};
use crate::script::{Runner, Script, ScriptError, ScriptErrorKind, source_hash};

/// Time limit for the sample: longer than that of a pass, because no jobs are waiting.
const LIMIT: Duration = Duration::from_secs(1);
const GIB: u64 = 1 << 30;

/// Compiles a script and runs it on [`sample`]. Takes a second at most.
pub fn check(source: &[u8]) -> CheckAnswer {
    let mut answer = CheckAnswer {
        ok: false,
        sha256: source_hash(source),
        error: None,
        actions: Vec::new(),
        waits: Vec::new(),
        printed: Vec::new(),
    };
    let script = match Script::compile(source) {
        Ok(script) => script,
        Err(error) => {
            answer.error = Some(error);
            return answer;
        }
    };
    let runner = match Runner::start() {
        Ok(runner) => runner,
        Err(error) => {
            let message = format!("can't start a thread for the script: {error}");
            answer.error = Some(ScriptError::new(ScriptErrorKind::Busy, message));
            return answer;
        }
    };
    let snapshot = Arc::new(sample());
    let built_in = schedule(&snapshot, &LeastLoaded);
    let Some(pass) = offer(&snapshot, &built_in, &Costs::default()) else {
        return answer;
    };
    let ran = runner.run(&script, Arc::clone(&pass), LIMIT, true);
    let decision = settle(&LeastLoaded, built_in, &pass, ran.result);
    answer.printed = ran.printed;
    answer.error = decision.error;
    answer.ok = answer.error.is_none();
    if answer.ok {
        answer.actions = decision.plan.actions;
        let waits = snapshot.jobs.iter().filter_map(|job| {
            let why = decision.plan.waiting.get(&job.id)?;
            Some(SampleWait {
                job: job.id,
                reason: why.reason,
                message: why.message.clone(),
            })
        });
        answer.waits = waits.collect();
    }
    answer
}

/// Returns a small fleet with a bit of everything: two pools, a worker with a free slot, a busy one, one that is loading, one
/// that could be evicted, and jobs of every kind.
pub fn sample() -> Snapshot {
    let now = Timestamp::from_second(1_800_000_000).unwrap_or_default();
    let ago = |seconds: i64| now - SignedDuration::from_secs(seconds);
    let gpu = Device {
        backend: Backend::Cuda,
        index: 0,
    };
    let model = |name: &str, gib: u64| ModelState {
        model: ModelRef::Alias(name.to_owned()),
        file: ModelFile {
            size_bytes: gib * GIB,
            modified_ns: 1,
            sha256: None,
        },
        needed_bytes: gib * GIB,
        context: Some(ContextMemory {
            max_tokens: 32_768,
            default_tokens: 8192,
            base_bytes: gib * GIB / 2,
            token_bytes: gib * GIB / 2 / 8192,
            floor_bytes: 0,
        }),
    };
    let (small, large) = (model("small", 1), model("large", 20));
    let worker = |id: &str, model: &ModelState, device, slots, active| WorkerState {
        id: id.to_owned(),
        status: WorkerStatus::Ready,
        slots,
        active,
        unanswered: 0,
        full: false,
        ready_at: Some(ago(600)),
        idle_since: (active == 0).then(|| ago(120)),
        ..WorkerState::asked_for(model, device, None, ago(630))
    };
    let pool = |id: &str, devices: Vec<DeviceState>, workers, models| {
        Arc::new(PoolState {
            id: id.to_owned(),
            liveness: PoolLiveness::Online,
            draining: false,
            devices,
            workers,
            models,
            disk_free_bytes: 100 * GIB,
            downloads: Vec::new(),
            refused_starts: Vec::new(),
            refused_downloads: Vec::new(),
            last_start: 0,
        })
    };
    let device = |device, free_bytes, total_bytes| DeviceState {
        device,
        free_bytes,
        total_bytes,
    };
    let cpu_box = pool(
        "cpu-box",
        vec![device(Device::CPU, 12 * GIB, 16 * GIB)],
        vec![
            worker("worker-cpu-0", &small, Device::CPU, 2, 1),
            worker("worker-cpu-1", &small, Device::CPU, 1, 1),
            WorkerState::asked_for(&small, Device::CPU, None, ago(2)),
        ],
        vec![small.clone()],
    );
    let gpu_box = pool(
        "gpu-box",
        vec![
            device(Device::CPU, 30 * GIB, 32 * GIB),
            device(gpu, 6 * GIB, 24 * GIB),
        ],
        vec![worker("worker-cuda-0", &small, gpu, 4, 0)],
        vec![small, large],
    );
    // Fixed ids, so that two checks of a script can be compared.
    let id = |number: usize| -> JobId {
        format!("job-01900000-0000-7000-8000-{number:012}")
            .parse()
            .unwrap_or_else(|_| JobId::random())
    };
    let kinds = [
        ("small", Priority::Interactive, Some("session-1"), 256, 40),
        ("small", Priority::Interactive, Some("session-1"), 32, 30),
        ("large", Priority::Interactive, None, 512, 25),
        ("small", Priority::Interactive, Some("session-2"), 1024, 20),
        ("large", Priority::Batch, None, 2048, 400),
        ("small", Priority::Batch, None, 64, 10),
    ];
    let jobs =
        kinds
            .iter()
            .enumerate()
            .map(|(number, &(model, priority, session, max_tokens, age))| {
                Arc::new(QueuedJob {
                    id: id(number + 1),
                    model: ModelRef::Alias(model.to_owned()),
                    priority,
                    session_id: session.map(str::to_owned),
                    created_at: ago(age),
                    not_before: None,
                    placement: Placement {
                        pool: (number == 5).then(|| "cpu-box".to_owned()),
                        device: None,
                    },
                    turn: Some(number as u64),
                    bytes: 600 + 10 * u64::from(max_tokens),
                    max_tokens,
                    context_needed: None,
                    cache_needed: None,
                })
            });
    Snapshot {
        now,
        started_at: ago(86_400),
        settings: Settings::default(),
        jobs: jobs.collect(),
        pools: vec![cpu_box, gpu_box],
        sessions: [("session-1".to_owned(), "cpu-box".to_owned())].into(),
        sizes: Default::default(),
        turns: 0,
    }
}
