//! Steps about a demo that is disturbed midway.

use std::process::Stdio;
use std::time::Duration;

use cucumber::{then, when};
use orchestrator_core::api::tasks::{TaskList, TaskView};
use tokio::io::AsyncReadExt as _;

use crate::house::{House, WAIT_LIMIT};
use crate::process::{self, Finished};

#[when(expr = "I run `{}` and kill the {word} after the first words")]
async fn kill_in_the_middle(house: &mut House, line: String, victim: String) {
    let name = match victim.as_str() {
        "worker" => "llorch-candled",
        "pool" => "pool-managerd",
        other => panic!("unknown part `{other}`"),
    };
    let mut command = house.command(&line);
    // The demo's own home is made in this folder, so that the scenario finds its processes and cleans up after it.
    command
        .env("TMPDIR", house.home())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().expect("the demo starts");
    let mut stdout = child.stdout.take().expect("piped");
    let mut stderr = child.stderr.take().expect("piped");
    let errors = tokio::spawn(async move {
        let mut text = String::new();
        stderr.read_to_string(&mut text).await.map(|_| text)
    });
    let mut printed = vec![0; 1];
    let first =
        tokio::time::timeout(Duration::from_secs(300), stdout.read_exact(&mut printed)).await;
    first
        .expect("words within five minutes")
        .expect("the demo prints words");
    let processes = process::left_running(house.home());
    let (pid, _) = processes
        .iter()
        .find(|(_, found)| found == name)
        .expect("the victim runs");
    let killed = std::process::Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(killed.expect("kill runs").success());
    let rest = tokio::time::timeout(WAIT_LIMIT, stdout.read_to_end(&mut printed)).await;
    rest.expect("the demo notices within a minute")
        .expect("its output can be read");
    let status = child.wait().await.expect("the demo ends");
    let stderr = errors
        .await
        .expect("the reader lives")
        .expect("its messages can be read");
    house.finished = Some(Finished {
        status,
        stdout: String::from_utf8_lossy(&printed).into_owned(),
        stderr,
    });
}

#[then(
    expr = "the API still shows one job of one attempt on {string} whose text is what was printed"
)]
async fn kept(house: &mut House, worker: String) {
    let stage = house.demo_home();
    let address = std::fs::read_to_string(stage.join("state/orchestratord/addr"));
    let url = address.expect("`--keep` leaves the orchestrator running");
    let url = url.trim();
    let list: TaskList = get(&format!("{url}/v2/tasks")).await;
    let [job] = &list.jobs[..] else {
        panic!("one job: {list:#?}");
    };
    let task: TaskView = get(&format!("{url}/v2/tasks/{}", job.id)).await;
    assert!(task.status.is_terminal(), "{task:#?}");
    assert_eq!(task.attempts.len(), 1, "{task:#?}");
    assert_eq!(task.attempts[0].worker_id, worker);
    let printed = house.last().stdout.trim_end_matches('\n');
    assert_eq!(task.text.trim_end_matches('\n'), printed);
    house.stop_all(&stage).await;
}

async fn get<T: serde::de::DeserializeOwned>(url: &str) -> T {
    let response = reqwest::get(url).await.expect("the orchestrator answers");
    response.json().await.expect("an answer of the contract")
}

#[then("it fails")]
fn fails(house: &mut House) {
    let last = house.last();
    assert!(last.status.code().is_some_and(|code| code != 0), "{last:?}");
    assert!(last.stderr.contains("error:"), "{last:?}");
}

/// Variables that direct commands away from the demo.
const ELSEWHERE: [(&str, &str); 3] = [
    ("LLORCH_ORCHESTRATOR_URL", "http://127.0.0.1:1"),
    ("LLORCH_POOL_URL", "http://127.0.0.1:1"),
    ("LLORCH_API_TOKEN", "of-another-orchestrator"),
];

#[when(expr = "I run `{}` where the variables name other daemons")]
async fn run_with_other_daemons(house: &mut House, line: String) {
    let mut command = house.command(&line);
    command.env("TMPDIR", house.home()).envs(ELSEWHERE);
    house.finished = Some(process::run(command, WAIT_LIMIT * 5).await);
}

#[then("the commands that it prints work when pasted there")]
async fn pasted(house: &mut House) {
    let last = house.last();
    assert!(last.status.success(), "{last:?}");
    let advice = last.stderr.lines();
    let lines: Vec<&str> = advice
        .skip_while(|line| !line.starts_with("everything was left running"))
        .filter_map(|line| line.strip_prefix("  "))
        .collect();
    assert!(lines.len() >= 4, "{last:?}");
    let mut command = tokio::process::Command::new("sh");
    command
        .args(["-e", "-c", &lines.join("\n")])
        .envs(ELSEWHERE);
    let ran = process::run(command, WAIT_LIMIT).await;
    assert!(ran.status.success(), "{ran:?}");
    for done in ["orchestratord stopped", "pool-managerd stopped"] {
        assert!(ran.stdout.contains(done), "{ran:?}");
    }
}
