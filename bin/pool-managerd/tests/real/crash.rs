//! The daemon, killed at each point where a crash matters, and started again.

use pool_core::api::pool::WorkerStopRequest;
use pool_core::kit::client::ApiClient;
use pool_core::worker::{WorkerInfo, WorkerStatus};

use crate::house::{House, reserved, spawn, stop, until, until_status, workers};

const CRASH_AT: &str = "LLORCH_CRASH_AT";
/// Enough for two workers: a file that is not GGUF counts as 96 MiB of working memory.
const LIMIT: u64 = 250 << 20;

fn house(behaviour: &str, point: &str) -> House {
    let mut house = House::fake(behaviour);
    house.set("LLORCH_MEMORY_CPU_LIMIT_BYTES", LIMIT);
    house.set("LLORCH_WORKERS_STOP_TIMEOUT_S", 1);
    house.set(CRASH_AT, point);
    house
}

/// Starts the daemon again and checks its state.
async fn recovered(house: &mut House) -> ApiClient {
    house.unset(CRASH_AT);
    let client = house.start().await;
    house.check(LIMIT);
    client
}

/// Checks that a new worker starts and serves, and that nothing is left of any worker after its stop.
async fn goes_on(house: &House, client: &ApiClient) {
    let worker = spawn(client, house).await;
    until_status(client, &worker.id, WorkerStatus::Ready).await;
    house.check(LIMIT);
    for worker in workers(client)
        .await
        .iter()
        .filter(|worker| worker.status.is_live())
    {
        stop(client, &worker.id, true).await;
        until_status(client, &worker.id, WorkerStatus::Stopped).await;
    }
    assert_eq!(reserved(client).await, 0);
    assert!(house.worker_processes().is_empty());
}

async fn crash_in_spawn(point: &str) -> (House, ApiClient) {
    let mut house = house("serve", point);
    let client = house.start().await;
    let answer = client
        .post::<_, WorkerInfo>("/workers/spawn", &house.request())
        .await;
    assert!(answer.is_err(), "{answer:?}");
    house.crashed().await;
    let client = recovered(&mut house).await;
    (house, client)
}

#[tokio::test] // [POOLD-065] P14
async fn spawn_received() {
    let (house, client) = crash_in_spawn("spawn.received").await;
    assert_eq!(workers(&client).await, []);
    goes_on(&house, &client).await;
}

#[tokio::test] // [POOLD-065] P14
async fn intent_written_before_the_process_exists() {
    let (house, client) = crash_in_spawn("spawn.intended").await;
    let listed = workers(&client).await;
    assert_eq!((listed.len(), listed[0].status), (1, WorkerStatus::Failed));
    assert_eq!(
        listed[0].exit.as_ref().unwrap().reason.to_string(),
        "exited(unknown)"
    );
    assert_eq!(reserved(&client).await, 0);
    goes_on(&house, &client).await;
}

#[tokio::test] // [POOLD-065] [POOLD-015] P14
async fn process_exists_before_its_pid_is_recorded() {
    let (house, client) = crash_in_spawn("spawn.started").await;
    let listed = workers(&client).await;
    assert_eq!((listed.len(), house.worker_processes().len()), (1, 1));
    let adopted = until_status(&client, &listed[0].id, WorkerStatus::Ready).await;
    assert_eq!(house.worker_processes(), [adopted.pid.unwrap()]);
    goes_on(&house, &client).await;
}

#[tokio::test] // [POOLD-065]
async fn recorded_before_the_spawn_is_answered() {
    let (house, client) = crash_in_spawn("spawn.recorded").await;
    let listed = workers(&client).await;
    until_status(&client, &listed[0].id, WorkerStatus::Ready).await;
    goes_on(&house, &client).await;
}

#[tokio::test] // [POOLD-065]
async fn ready_before_it_is_reported() {
    let mut house = house("serve", "ready.unreported");
    let client = house.start().await;
    let worker = spawn(&client, &house).await;
    house.crashed().await;
    let client = recovered(&mut house).await;
    until_status(&client, &worker.id, WorkerStatus::Ready).await;
    goes_on(&house, &client).await;
}

#[tokio::test] // [POOLD-065]
async fn exited_before_that_is_recorded() {
    let mut house = house("crash", "exit.unrecorded");
    let client = house.start().await;
    let worker = spawn(&client, &house).await;
    house.crashed().await;
    assert!(
        house.record(&worker.id).info.status.is_live(),
        "nobody wrote it down"
    );
    let client = recovered(&mut house).await;
    let ended = until_status(&client, &worker.id, WorkerStatus::Failed).await;
    let exit = ended.exit.unwrap();
    assert_eq!(exit.reason.to_string(), "exited(unknown)");
    assert_eq!(
        exit.message, "the engine fell over",
        "its own words are in its log"
    );
    assert_eq!(reserved(&client).await, 0);
}

async fn crash_in_stop(point: &str) {
    let mut house = house("deaf", point);
    let client = house.start().await;
    let worker = spawn(&client, &house).await;
    until_status(&client, &worker.id, WorkerStatus::Ready).await;
    // The answer may or may not arrive before the crash.
    let path = format!("/workers/{}/stop", worker.id);
    let _ = client
        .post::<_, WorkerInfo>(&path, &WorkerStopRequest { force: false })
        .await;
    house.crashed().await;
    assert_eq!(house.worker_processes().len(), 1, "it ignores SIGTERM");
    let client = recovered(&mut house).await;
    let stopped = until_status(&client, &worker.id, WorkerStatus::Stopped).await;
    assert_eq!(stopped.exit.unwrap().reason.to_string(), "stopped");
    goes_on(&house, &client).await;
}

#[tokio::test] // [POOLD-065] [POOLD-020]
async fn between_sigterm_and_sigkill() {
    crash_in_stop("stop.signalled").await;
    crash_in_stop("stop.kill").await;
}

#[tokio::test] // [POOLD-065] [POOLD-062]
async fn a_verdict_outlives_the_daemon_that_found_it() {
    let mut house = house("mule", "stop.kill");
    house.set("LLORCH_WORKERS_STALL_TIMEOUT_S", 3);
    let client = house.start().await;
    let worker = spawn(&client, &house).await;
    until_status(&client, &worker.id, WorkerStatus::Busy).await;
    let identity = house.record(&worker.id).identity.unwrap();
    house.crashed().await;
    let record = house.record(&worker.id);
    assert_eq!(record.info.status, WorkerStatus::Draining);
    assert!(record.verdict.is_some() && identity.is_alive());
    let client = recovered(&mut house).await;
    let ended = until_status(&client, &worker.id, WorkerStatus::Failed).await;
    let exit = ended.exit.unwrap();
    assert_eq!(exit.reason.to_string(), "stalled", "{}", exit.message);
    assert!(!identity.is_alive());
}

#[tokio::test] // [POOLD-065] [POOLD-015]
async fn during_adoption() {
    let mut house = house("serve", "adopt");
    house.unset(CRASH_AT);
    let client = house.start().await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(spawn(&client, &house).await.id);
    }
    for id in &ids {
        until_status(&client, id, WorkerStatus::Ready).await;
    }
    house.kill_daemon();
    for point in ["adopt@1", "adopt@2"] {
        house.set(CRASH_AT, point);
        house.launch();
        house.crashed().await;
    }
    let client = recovered(&mut house).await;
    for id in &ids {
        until(&client, id, |info| info.status == WorkerStatus::Ready).await;
    }
    assert_eq!(house.worker_processes().len(), 2);
    for id in &ids {
        stop(&client, id, false).await;
        until_status(&client, id, WorkerStatus::Stopped).await;
    }
    goes_on(&house, &client).await;
}
