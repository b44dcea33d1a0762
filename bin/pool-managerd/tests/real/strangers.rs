//! Records that name a process that is no longer the worker's.

use std::process::{Child, Command};
use std::time::Duration;

use pool_core::config::PoolConfig;
use pool_core::kit::process::{ProcessIdentity, Signal, SignalOutcome};
use pool_core::lifecycle::{Lifecycle, stop_worker};
use pool_core::registry::{TerminationCause, WorkerRecord};
use pool_core::worker::WorkerStatus;

use crate::house::{House, reserved, spawn, stop, until, until_status};

/// A process unrelated to any worker.
struct Innocent(Child);

impl Innocent {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn identity(&self) -> ProcessIdentity {
        ProcessIdentity::of(self.0.id()).unwrap().unwrap()
    }

    /// Checks that the process runs, and was not even stopped.
    fn assert_untouched(&mut self, what: &str) {
        // A signal in flight must arrive before the check.
        std::thread::sleep(Duration::from_millis(20));
        assert!(
            self.0.try_wait().unwrap().is_none(),
            "{what}: it was killed"
        );
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let state = stat.rsplit_once(") ").unwrap().1.chars().next();
        // A process that has just started may not be asleep yet.
        assert!(!matches!(state, Some('T' | 't' | 'Z')), "{what}: {state:?}");
    }

    /// Returns the identities that a record may hold once the worker's pid belongs to this process. The last one is the whole
    /// identity of this process, which lacks the worker's nonce in its environment.
    fn mistaken_for(&self) -> [(&'static str, ProcessIdentity); 3] {
        let real = self.identity();
        let earlier = ProcessIdentity {
            start_time: real.start_time - 1,
            ..real.clone()
        };
        let before_reboot = ProcessIdentity {
            boot_id: "another-boot".into(),
            ..real.clone()
        };
        [
            ("another start", earlier),
            ("another boot", before_reboot),
            ("no nonce", real),
        ]
    }
}

impl Drop for Innocent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes the record of a worker that ended long ago and whose pid now belongs to another process.
fn forge(house: &House, template: &WorkerRecord, id: u32, identity: &ProcessIdentity) -> String {
    let mut record = template.clone();
    record.info.id = format!("worker-cpu-{id}");
    record.args.worker_id.clone_from(&record.info.id);
    // No two workers share a nonce.
    record.nonce = format!("{id}-{}", record.nonce);
    record.info.status = WorkerStatus::Starting;
    (record.info.exit, record.info.ready_at) = (None, None);
    (record.stop_requested, record.verdict, record.starter) = (false, None, None);
    record.info.pid = Some(identity.pid);
    record.identity = Some(identity.clone());
    // Its start timeout passed long ago.
    record.launched_at = Some(Duration::ZERO);
    house.registry().lock().unwrap().save(&record).unwrap();
    record.info.id
}

/// Makes the record of a live worker name another process.
fn lie_about(house: &House, id: &str, identity: &ProcessIdentity) {
    let lie = |record: &mut WorkerRecord| {
        record.identity = Some(identity.clone());
        record.info.pid = Some(identity.pid);
    };
    house.registry().update(id, lie).unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [POOLD-016] [POOLD-021] P15
async fn an_innocent_process_is_never_signalled() {
    let mut house = House::fake("serve");
    house.set("LLORCH_WORKERS_STALL_TIMEOUT_S", 4);
    let client = house.start().await;
    let worker = spawn(&client, &house).await;
    until_status(&client, &worker.id, WorkerStatus::Ready).await;
    let template = house.record(&worker.id);
    let mut innocent = Innocent::start();

    // First through the functions that the command line uses without a daemon, so the daemon is stopped.
    house.kill_daemon();
    let config = PoolConfig::load_with(&house.home(), None, &|name| {
        (name == "LLORCH_WORKERS_START_TIMEOUT_S").then(|| "1".to_owned())
    })
    .unwrap();
    let lifecycle = Lifecycle::new(house.home(), config).unwrap();
    for (number, (lie, identity)) in innocent.mistaken_for().into_iter().enumerate() {
        let mut number = 100 + 10 * number as u32;
        let mut forged = || {
            number += 1;
            forge(&house, &template, number, &identity)
        };
        let id = forged();
        let record = house.record(&id);
        for signal in [Signal::TERM, Signal::KILL] {
            assert_eq!(
                lifecycle.signal(&record, signal).unwrap(),
                SignalOutcome::Gone,
                "{lie}"
            );
        }
        for force in [false, true] {
            lifecycle.request_stop(&forged(), force).unwrap();
            innocent.assert_untouched(&format!("{lie}, stop, force {force}"));
        }
        let verdict = TerminationCause::Stalled {
            message: "no token".into(),
        };
        let condemned = lifecycle.condemn(&forged(), &verdict).unwrap().unwrap();
        for signal in [Signal::TERM, Signal::KILL] {
            assert_eq!(
                lifecycle.signal(&condemned, signal).unwrap(),
                SignalOutcome::Gone,
                "{lie}"
            );
        }
        // Overdue, condemned and asked to stop: cleaned up without a signal, and the memory of each is released.
        let found = lifecycle.tend().unwrap();
        assert_eq!(found.ended.len(), 4, "{lie}: {found:#?}");
        assert_eq!(found.live.len(), 1, "{lie}: the worker itself");
        innocent.assert_untouched(&format!("{lie}, clean-up"));
        // The daemon adopts none of them either, but adopts the worker whose own record is wrong.
        forged();
        lie_about(&house, &worker.id, &identity);
        let client = house.start().await;
        assert_eq!(reserved(&client).await, template.reserved_bytes(), "{lie}");
        let adopted = house.record(&worker.id);
        assert_eq!(
            (&adopted.identity, adopted.info.pid),
            (&template.identity, template.info.pid),
            "{lie}"
        );
        innocent.assert_untouched(&format!("{lie}, adoption"));
        house.kill_daemon();
    }
    // A stop waits for no process but the worker's, and ends the worker even if its record names another process.
    for (number, (lie, identity)) in innocent.mistaken_for().into_iter().enumerate() {
        for force in [false, true] {
            let id = forge(&house, &template, 200 + number as u32, &identity);
            let stopped =
                tokio::task::block_in_place(|| stop_worker(&id, force, &lifecycle)).unwrap();
            assert_eq!(stopped.status, WorkerStatus::Stopped, "{lie}");
            innocent.assert_untouched(&format!("{lie}, stop_worker, force {force}"));
        }
    }
    let (_, identity) = innocent.mistaken_for().into_iter().last().unwrap();
    lie_about(&house, &worker.id, &identity);
    let stopped = tokio::task::block_in_place(|| stop_worker(&worker.id, false, &lifecycle));
    assert_eq!(stopped.unwrap().status, WorkerStatus::Stopped);
    innocent.assert_untouched("stop_worker of the worker");
    assert!(!template.identity.unwrap().is_alive());

    // Finally through a daemon that watches the worker while its record begins to lie: neither a verdict nor a stop hits the
    // process in the record. The worker ends, and its memory is released.
    for (lie, identity) in innocent.mistaken_for() {
        for end in ["stall", "stop", "forced stop"] {
            let client = house.start().await;
            let before = reserved(&client).await;
            let worker = spawn(&client, &house).await;
            until_status(&client, &worker.id, WorkerStatus::Ready).await;
            let real = house.record(&worker.id).identity.unwrap();
            lie_about(&house, &worker.id, &identity);
            match end {
                "stall" => drop(real.signal(Signal::STOP).unwrap()),
                end => drop(stop(&client, &worker.id, end == "forced stop").await),
            }
            until(&client, &worker.id, |info| !info.status.is_live()).await;
            innocent.assert_untouched(&format!("{lie}, {end}"));
            assert!(!real.is_alive(), "{lie}, {end}: the worker goes on");
            assert_eq!(reserved(&client).await, before, "{lie}, {end}");
            assert_eq!(
                house.record(&worker.id).identity,
                Some(real),
                "{lie}, {end}"
            );
            house.kill_daemon();
        }
    }
}
