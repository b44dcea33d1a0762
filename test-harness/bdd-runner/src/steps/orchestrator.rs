//! Steps about the orchestrator's process and its job database.

use cucumber::{given, then, when};

use super::durability::{orchestrator_pid, wait_for_end};
use crate::house::House;
use crate::process;

#[given("a running orchestrator with a job that waits")]
async fn with_a_waiting_job(house: &mut House) {
    house.succeed("llorch orchestrator start").await;
    // The job waits because no pool runs.
    let submit = "llorch jobs submit --detach --model smollm2-135m --prompt hi";
    let job = house.succeed(submit).await.stdout.trim().to_owned();
    house.job = Some(job);
}

#[when(expr = "its jobs are lost and replaced by {string}")]
async fn jobs_replaced(house: &mut House, copy: String) {
    let state = house.home().join("state/orchestratord");
    for entry in std::fs::read_dir(&state).expect("the state folder is there") {
        let path = entry.expect("it can be read").path();
        let name = path.file_name().expect("a file has a name");
        if name.as_encoded_bytes().starts_with(b"jobs.db") {
            std::fs::remove_file(&path).expect("it can be removed");
        }
    }
    std::fs::rename(house.home().join(copy), state.join("jobs.db")).expect("it can be moved");
}

#[when("the orchestrator is frozen")]
async fn freeze(house: &mut House) {
    let pid = orchestrator_pid(house);
    process::signal(pid, "-STOP");
    house.frozen = Some(pid);
}

#[when("the frozen orchestrator wakes up")]
async fn wake(house: &mut House) {
    process::signal(house.frozen.expect("one was frozen"), "-CONT");
}

#[then("it ends by itself")]
async fn ends(house: &mut House) {
    wait_for_end(house, house.frozen.expect("one was frozen")).await;
}
