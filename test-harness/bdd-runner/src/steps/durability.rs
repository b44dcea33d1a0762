//! Steps about kills of the orchestrator, and the jobs that must survive them.

use std::time::{Duration, Instant};

use cucumber::{given, then, when};
use futures_util::future::join_all;
use orchestrator_core::api::tasks::TaskView;
use serde_json::json;
use tokio::sync::watch;

use crate::house::{House, WAIT_LIMIT, until};
use crate::process;

#[given("a running orchestrator without a bound on its queue and a running pool")]
async fn unbounded(house: &mut House) {
    let folder = house.home().join("config");
    std::fs::create_dir_all(&folder).expect("the configuration folder can be made");
    house.keep_port();
    std::fs::write(
        folder.join("orchestratord.toml"),
        "[queue]\ncapacity = -1\n",
    )
    .expect("it can be written");
    super::setting::both_daemons(house).await;
}

#[when(
    expr = "{int} agents submit at once and the orchestrator is killed in between, {int} time(s)"
)]
async fn submit_and_kill(house: &mut House, agents: usize, rounds: usize) {
    for round in 0..rounds {
        let url = house.url("/v2/tasks");
        let client = reqwest::Client::new();
        let answered = watch::Sender::new(0);
        let mut answers_so_far = answered.subscribe();
        let submits = (0..agents).map(|agent| {
            let body = json!({"model": "smollm2-135m", "prompt": format!("{round} {agent}"), "raw": true, "max_tokens": 1});
            let request = client.post(&url).json(&body);
            let answered = &answered;
            async move {
                let response = request.send().await;
                // Failed requests count too, so that `place` is reached in any case.
                answered.send_modify(|count| *count += 1);
                let response = response.ok()?;
                let accepted = response.status() == 202;
                let answer: serde_json::Value = response.json().await.ok()?;
                // A 202 whose body is cut off does not acknowledge the job.
                accepted.then(|| answer["job_id"].as_str().expect("a 202 names the job").to_owned())
            }
        });
        let pid = orchestrator_pid(house);
        // In the middle of the answers, at a different place each time.
        let place = 1 + random() as usize % agents;
        let kill = async {
            answers_so_far
                .wait_for(|count| *count >= place)
                .await
                .expect("the sender is open");
            process::signal(pid, "-KILL");
        };
        let (answers, ()) = tokio::join!(join_all(submits), kill);
        let acknowledged: Vec<String> = answers.into_iter().flatten().collect();
        println!(
            "round {round}: killed after {place} answers, {} of {agents} acknowledged",
            acknowledged.len()
        );
        house.acknowledged.extend(acknowledged);
        wait_for_end(house, pid).await;
        house.succeed("llorch orchestrator start").await;
    }
}

#[then("every acknowledged job completes")]
async fn all_complete(house: &mut House) {
    let mut open: Vec<String> = house.acknowledged.clone();
    let started = Instant::now();
    // On an idle machine a job takes about a fifth of a second; the restarts come on top.
    let limit = WAIT_LIMIT + Duration::from_secs(2) * u32::try_from(open.len()).expect("few jobs");
    let client = reqwest::Client::new();
    while let Some(job) = open.last() {
        let response = client
            .get(house.url(&format!("/v2/tasks/{job}")))
            .send()
            .await
            .expect("the orchestrator answers");
        assert_eq!(
            response.status(),
            200,
            "{job} was acknowledged but is missing"
        );
        let task: TaskView = response.json().await.expect("a job of the contract");
        if task.status.is_terminal() {
            assert_eq!(task.status.as_str(), "completed", "{task:#?}");
            open.pop();
        } else {
            assert!(
                started.elapsed() < limit,
                "{} jobs have not ended after {limit:?}: {task:#?}",
                open.len()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Waits until a process of the house has ended.
pub(super) async fn wait_for_end(house: &House, pid: u32) {
    let home = house.home().to_owned();
    let ended = || {
        !process::left_running(&home)
            .iter()
            .any(|(found, _)| *found == pid)
    };
    assert!(
        until(WAIT_LIMIT, ended).await,
        "the orchestrator still runs"
    );
}

pub(super) fn orchestrator_pid(house: &House) -> u32 {
    let text = std::fs::read_to_string(house.home().join("state/orchestratord/pid.json"))
        .expect("pid.json is there");
    let pid: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    pid["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok())
        .expect("a process id")
}

/// Returns a number that differs from run to run: the system provides the random keys of the standard library's hashes.
fn random() -> u32 {
    use std::hash::{BuildHasher as _, Hasher as _};
    let drawn = std::hash::RandomState::new().build_hasher().finish();
    (drawn >> 32) as u32
}
