#[path = "../../tests/support/program.rs"]
mod program;

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};

use program::write_program;

use super::start::identified;
use super::*;
use crate::kit::process::SignalOutcome;
use crate::kit::secret::Secret;
use crate::registry::Moments;
use crate::worker::{CacheType, ExitReason, WorkerMemory};
use crate::worker_args::{EXIT_PORT_TAKEN, MAX_SLOTS, WorkerArgs};

/// Returns the record of a worker that was just started.
pub(crate) fn record(number: u64) -> WorkerRecord {
    let id = format!("worker-cpu-{number}");
    let model_ref: ModelRef = "smollm2-135m".parse().unwrap();
    WorkerRecord {
        info: WorkerInfo {
            id: id.clone(),
            model_ref: model_ref.clone(),
            model_file: crate::worker::ModelFile {
                size_bytes: 1,
                modified_ns: 2,
                sha256: None,
            },
            device: Device::CPU,
            status: WorkerStatus::Starting,
            pid: None,
            port: 8001,
            context_length: None,
            slots: 2,
            active: 0,
            cache: None,
            load_percent: 0,
            memory: WorkerMemory::default(),
            created_at: Timestamp::UNIX_EPOCH,
            ready_at: None,
            idle_since: None,
            ending: None,
            exit: None,
        },
        identity: None,
        nonce: "nonce".into(),
        secret: Secret::new("secret"),
        program: "/bin/false".into(),
        args: WorkerArgs {
            worker_id: id,
            model: "/models/a.gguf".into(),
            model_ref: Some(model_ref),
            sha256: None,
            backend: Backend::Cpu,
            gpu: 0,
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8001,
            pool_url: None,
            context_length: None,
            cache_tokens: None,
            cache_type: CacheType::F16,
            slots: 2,
            threads: None,
            stop_grace_s: 10,
        },
        port_fixed: false,
        ports_tried: Vec::new(),
        stop_requested: false,
        verdict: None,
        oom_mark: None,
        starter: None,
        launched_at: None,
        moments: Moments::default(),
        log_start: 0,
    }
}

/// A spawner that starts nothing: every process it returns is the test itself.
struct FakeSpawner;

impl Spawner for FakeSpawner {
    fn spawn(&self, _: WorkerCommand) -> io::Result<Launched> {
        Ok(Launched {
            pid: std::process::id(),
            child: None,
        })
    }
}

struct FailingSpawner;

impl Spawner for FailingSpawner {
    fn spawn(&self, _: WorkerCommand) -> io::Result<Launched> {
        Err(io::Error::other("out of processes"))
    }
}

/// A home with a worker program and a fake model file.
struct Host {
    dir: tempfile::TempDir,
    config: PoolConfig,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.ensure().unwrap();
        let program = dir.path().join(program_name(Backend::Cpu));
        write_program(&program, "#!/bin/sh\nexec sleep 60\n");
        fs::write(home.models_dir().join("a.gguf"), "not a model").unwrap();
        let mut config = PoolConfig::default();
        config.workers.programs_dir = Some(dir.path().to_path_buf());
        Self { dir, config }
    }

    fn lifecycle(&self) -> Lifecycle {
        Lifecycle::new(Home::at(self.dir.path()), self.config.clone()).unwrap()
    }

    fn request(&self) -> WorkerSpawnRequest {
        WorkerSpawnRequest {
            model: format!("file:{}", self.dir.path().join("models/a.gguf").display())
                .parse()
                .unwrap(),
            backend: Backend::Cpu,
            gpu: None,
            context_length: None,
            cache_tokens: None,
            cache_type: CacheType::F16,
            slots: None,
            port: None,
        }
    }
}

#[test] // [POOLD-014] P14
fn spawns_at_once_never_promise_the_same_memory_port_or_id() {
    let mut host = Host::new();
    let each = host.lifecycle().estimator().estimate(
        &host.lifecycle().resolve(&host.request().model).unwrap(),
        WorkerSizes::default(),
    );
    host.config.memory.cpu_limit_bytes = Some(each.needed_bytes * 3 + 1);
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        // Each thread has its own lifecycle, like a daemon and several command lines.
        let spawn = || {
            host.lifecycle()
                .with_spawner(FakeSpawner)
                .spawn(&host.request())
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(spawn)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let started: Vec<_> = outcomes
        .iter()
        .filter_map(|outcome| outcome.as_ref().ok())
        .map(|started| &started.info)
        .collect();
    assert_eq!(started.len(), 3);
    let refused = |error: &SpawnError| matches!(error, SpawnError::MemoryShort(_));
    assert!(
        outcomes
            .iter()
            .filter_map(|outcome| outcome.as_ref().err())
            .all(refused)
    );
    assert_eq!(
        started
            .iter()
            .map(|info| info.port)
            .collect::<HashSet<_>>()
            .len(),
        3
    );
    assert_eq!(
        started
            .iter()
            .map(|info| &info.id)
            .collect::<HashSet<_>>()
            .len(),
        3
    );
}

#[test] // [POOLD-010]
fn numbers_are_never_used_again_and_old_records_go() {
    let mut host = Host::new();
    host.config.workers.keep_ended = 1;
    let lifecycle = host.lifecycle().with_spawner(FailingSpawner);
    for _ in 0..4 {
        let error = lifecycle.spawn(&host.request()).unwrap_err();
        assert!(matches!(error, SpawnError::Exec { .. }), "{error}");
    }
    let records = lifecycle.registry().load().unwrap().records;
    let ids: Vec<_> = records
        .iter()
        .map(|record| record.info.id.as_str())
        .collect();
    // One ended worker is kept when a new one is started, which then fails as well.
    assert_eq!(ids, ["worker-cpu-2", "worker-cpu-3"]);
    let exit = records[1].info.exit.as_ref().unwrap();
    assert_eq!(
        (records[1].info.status, exit.reason.to_string().as_str()),
        (WorkerStatus::Failed, "spawn_failed")
    );
    assert!(
        exit.message.contains("out of processes"),
        "{}",
        exit.message
    );
    assert!(!lifecycle.log_file("worker-cpu-0").exists());
}

#[test] // [POOLD-012] [POOLD-022]
fn a_port_that_was_taken_is_followed_by_the_next_unless_it_was_asked_for() {
    let host = Host::new();
    let lifecycle = host.lifecycle().with_spawner(FakeSpawner);
    let first = lifecycle.spawn(&host.request()).unwrap().info;
    let second = lifecycle.spawn(&host.request()).unwrap().info;
    assert_eq!((first.port, second.port), (8001, 8002));
    let watched = lifecycle.registry().get(&first.id).unwrap();
    let log = lifecycle.log_file(&first.id);
    std::fs::write(&log, "error: another program already listens\n").unwrap();
    let Some(Ended::Restarted(again)) = lifecycle
        .process_ended(&watched, ExitFacts::Exited(EXIT_PORT_TAKEN))
        .unwrap()
    else {
        panic!("the worker was not restarted")
    };
    assert_eq!(
        (&again.info.id, again.info.port, again.info.status),
        (&first.id, 8003, WorkerStatus::Starting)
    );
    // A second watcher of the first process is late. Its report does not apply to the second process.
    let late = lifecycle
        .process_ended(&watched, ExitFacts::Unknown)
        .unwrap();
    assert!(matches!(late, Some(Ended::Replaced(_))), "{late:?}");
    let process = ProcessIdentity::current().unwrap();
    let restored = lifecycle.restore_process(&first.id, &watched.nonce, &process);
    assert!(restored.unwrap().is_none());
    let record = lifecycle.registry().get(&first.id).unwrap();
    assert_eq!(record.info, again.info);
    // The output of the first process does not explain the end of the second.
    let over = lifecycle.process_ended(&record, ExitFacts::Unknown);
    let Some(Ended::Over(over)) = over.unwrap() else {
        panic!("the worker did not end")
    };
    let exit = over.exit.unwrap();
    assert!(exit.message.starts_with("its process is gone"), "{exit:?}");
    assert!(exit.log_tail.is_empty(), "{exit:?}");
    let fixed = WorkerSpawnRequest {
        port: Some(8500),
        ..host.request()
    };
    let third = lifecycle.spawn(&fixed).unwrap().info;
    assert!(matches!(
        lifecycle.spawn(&fixed),
        Err(SpawnError::PortTaken { port: 8500, .. })
    ));
    let third = lifecycle.registry().get(&third.id).unwrap();
    let Some(Ended::Over(over)) = lifecycle
        .process_ended(&third, ExitFacts::Exited(EXIT_PORT_TAKEN))
        .unwrap()
    else {
        panic!("the worker was restarted on another port")
    };
    assert_eq!(over.status, WorkerStatus::Failed);
}

#[test] // [POOLD-016]
fn a_process_that_cannot_be_recognised_later_does_not_stay() {
    let child = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let pid = child.id();
    let launched = Launched {
        pid,
        child: Some(child),
    };
    let error = identified(launched, |_| Err(io::Error::other("no /proc"))).unwrap_err();
    assert_eq!(error.to_string(), "no /proc");
    // The process was also reaped, so not even a zombie has the pid.
    assert_eq!(ProcessIdentity::of(pid).unwrap(), None);
}

#[test] // [POOLD-034]
fn a_worker_gets_the_address_and_the_grace_of_the_settings() {
    let mut host = Host::new();
    host.config.workers.bind = "0.0.0.0".parse().unwrap();
    host.config.workers.stop_timeout_s = 7;
    let lifecycle = host.lifecycle().with_spawner(FakeSpawner);
    let id = lifecycle.spawn(&host.request()).unwrap().info.id;
    let record = lifecycle.registry().get(&id).unwrap();
    let args = record.args.to_args();
    for pair in [["--bind", "0.0.0.0"], ["--stop-grace-s", "7"]] {
        assert!(args.windows(2).any(|found| found == pair), "{args:?}");
    }
    assert_eq!(
        record.url(),
        format!("http://127.0.0.1:{}", record.info.port)
    );
    // The worker ends gracefully before it is considered stuck.
    let orderly = record.args.stop_grace() + crate::worker_args::STOP_FLUSH;
    assert!(record.args.stop_timeout() > orderly);
}

#[test] // [POOLD-016] P15
fn a_stranger_with_the_recorded_pid_is_not_signalled() {
    let host = Host::new();
    let lifecycle = host.lifecycle().with_spawner(FakeSpawner);
    // The record names the test's own process, which was not started with the worker's nonce.
    let started = lifecycle.spawn(&host.request()).unwrap();
    let record = lifecycle.request_stop(&started.info.id, true).unwrap();
    assert_eq!(record.info.status, WorkerStatus::Draining);
    assert_eq!(
        lifecycle.signal(&record, Signal::KILL).unwrap(),
        SignalOutcome::Gone
    );
}

#[cfg(target_os = "linux")]
#[test] // [POOLD-015] [POOLD-016]
fn a_process_whose_starter_was_killed_is_found_again_and_can_be_stopped() {
    let host = Host::new();
    let lifecycle = host.lifecycle();
    let mut started = lifecycle.spawn(&host.request()).unwrap();
    let id = started.info.id.clone();
    // As if the starter had been killed between starting the process and recording it.
    lifecycle
        .registry()
        .update(&id, |record| {
            (record.identity, record.info.pid) = (None, None);
        })
        .unwrap();
    let found = lifecycle.reconcile(&|_| false).unwrap();
    assert_eq!(found.live[0].info.pid, started.info.pid);

    // The starter is gone, so no parent reaps the child; here the test does so in place of the system.
    let mut child = started.child.take().unwrap();
    let reaper = std::thread::spawn(move || child.wait());
    let stopped = stop_worker(&id, false, &lifecycle).unwrap();
    assert_eq!(
        (
            stopped.status,
            stopped.exit.unwrap().reason.to_string().as_str()
        ),
        (WorkerStatus::Stopped, "stopped")
    );
    assert_eq!(
        ExitFacts::of(reaper.join().unwrap().unwrap()),
        ExitFacts::Signalled(15)
    );
    assert!(matches!(
        stop_worker("worker-cpu-99", false, &lifecycle),
        Err(StopError::Unknown { .. })
    ));
    assert!(matches!(
        stop_worker("../lock", false, &lifecycle),
        Err(StopError::Unknown { .. })
    ));
}

#[test] // [POOLD-015]
fn a_worker_that_is_gone_is_marked_so_unless_it_is_watched() {
    let host = Host::new();
    let lifecycle = host.lifecycle();
    let mut started = lifecycle.spawn(&host.request()).unwrap();
    let mut child = started.child.take().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(lifecycle.reconcile(&|_| true).unwrap().live.len(), 1);
    let found = lifecycle.reconcile(&|_| false).unwrap();
    assert_eq!(
        found.ended[0].exit.as_ref().unwrap().reason.to_string(),
        "exited(unknown)"
    );
    assert!(found.live.is_empty());
}

#[test] // [POOLD-062]
fn a_condemned_worker_says_why_it_is_being_ended_until_it_has() {
    let host = Host::new();
    let lifecycle = host.lifecycle().with_spawner(FakeSpawner);
    let id = lifecycle.spawn(&host.request()).unwrap().info.id;
    let verdict = TerminationCause::Stalled {
        message: "no token for 31 s".into(),
    };
    let condemned = lifecycle.condemn(&id, &verdict).unwrap().unwrap().info;
    let ending = condemned.ending.expect("a condemned worker has an ending");
    assert_eq!(
        (condemned.status, ending.reason, ending.message.as_str()),
        (
            WorkerStatus::Draining,
            ExitReason::Stalled,
            "no token for 31 s"
        )
    );
    // The first verdict counts.
    let later = TerminationCause::StartTimeout { after_s: 1 };
    let condemned = lifecycle.condemn(&id, &later).unwrap().unwrap().info;
    assert_eq!(condemned.ending.unwrap().reason, ExitReason::Stalled);

    let watched = lifecycle.registry().get(&id).unwrap();
    let ended = lifecycle.process_ended(&watched, ExitFacts::Signalled(15));
    let Some(Ended::Over(info)) = ended.unwrap() else {
        panic!("the worker did not end");
    };
    assert_eq!(info.ending, None);
    assert_eq!(
        info.exit.unwrap().message,
        "no token for 31 s; terminated by the pool"
    );
}

#[test] // [POOLD-019]
fn what_cannot_be_started_is_refused_with_a_hint_and_leaves_no_record() {
    let mut host = Host::new();
    host.config.memory.cpu_limit_bytes = Some(1000);
    let good = host.request();
    let refuse = |request: WorkerSpawnRequest| {
        let error = host
            .lifecycle()
            .with_spawner(FakeSpawner)
            .spawn(&request)
            .unwrap_err();
        (error.to_string(), error.hint().unwrap_or_default())
    };
    for (request, message, hint) in [
        (
            WorkerSpawnRequest {
                model: "unknown".parse().unwrap(),
                ..good.clone()
            },
            "no model",
            "models catalog",
        ),
        (
            WorkerSpawnRequest {
                model: "tinyllama".parse().unwrap(),
                ..good.clone()
            },
            "not downloaded",
            "models download",
        ),
        (
            WorkerSpawnRequest {
                model: "file:/etc/passwd".parse().unwrap(),
                ..good.clone()
            },
            "outside the folders",
            "allow_paths",
        ),
        (
            WorkerSpawnRequest {
                backend: Backend::Cuda,
                ..good.clone()
            },
            "no device cuda:0",
            "cpu",
        ),
        (
            WorkerSpawnRequest {
                gpu: Some(0),
                ..good.clone()
            },
            "`gpu`",
            "leave",
        ),
        (
            WorkerSpawnRequest {
                slots: Some(0),
                ..good.clone()
            },
            "`slots` is 0",
            "leave",
        ),
        (
            WorkerSpawnRequest {
                slots: Some(MAX_SLOTS + 1),
                ..good.clone()
            },
            "1 to 64",
            "leave",
        ),
        (good, "0 B free", "never fits"),
    ] {
        let (said, hinted) = refuse(request);
        assert!(
            said.contains(message) && hinted.contains(hint),
            "{said} / {hinted}"
        );
    }
    assert!(
        host.lifecycle()
            .registry()
            .load()
            .unwrap()
            .records
            .is_empty()
    );
}
