//! `orchestratord backup`, with the daemon up and down.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use serde_json::json;
use tokio::process::Command;

use crate::process::{command, run, start};
use crate::support::{MODEL, eventually};

fn backup(home: &Path, goal: &Path) -> Command {
    let mut command = command(home);
    command.arg("backup").arg(goal);
    command
}

fn files(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    names
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect()
}

// [ORCHD-076]
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_busy_daemon_is_complete_and_a_daemon_runs_on_it() {
    let home = tempfile::tempdir().unwrap();
    let shelf = tempfile::tempdir().unwrap();
    let goal = shelf.path().join("jobs.backup");
    let (_status, said) = run(&mut backup(home.path(), &goal)).await;
    assert!(
        said.contains("there is no job database") && said.contains("hint:"),
        "{said}"
    );

    let (mut daemon, client) = start(home.path()).await;
    let answered = Arc::new(Mutex::new(Vec::<JobId>::new()));
    let submits = tokio::spawn({
        let (client, answered) = (client.clone(), Arc::clone(&answered));
        async move {
            loop {
                let body = json!({"model": MODEL, "prompt": "hi"});
                let Ok(job) = client.post::<_, TaskAccepted>("/v2/tasks", &body).await else {
                    return;
                };
                answered.lock().unwrap().push(job.job_id);
            }
        }
    });
    eventually("some jobs", async || {
        (answered.lock().unwrap().len() > 50).then_some(())
    })
    .await;
    let before = answered.lock().unwrap().clone();
    let (status, said) = run(&mut backup(home.path(), &goal)).await;
    assert!(status.success(), "{said}");
    let mode = std::fs::metadata(&goal).unwrap().permissions().mode();
    assert_eq!(
        (mode & 0o777, files(shelf.path())),
        (0o600, vec!["jobs.backup".to_owned()])
    );

    // A backup overwrites only with `--force`, and never the database itself.
    let first = std::fs::read(&goal).unwrap();
    let (status, said) = run(&mut backup(home.path(), &goal)).await;
    assert!(!status.success() && said.contains("--force"), "{said}");
    assert_eq!(std::fs::read(&goal).unwrap(), first);
    let state = home.path().join("state/orchestratord");
    for own in ["jobs.db", "jobs.db-wal"] {
        let (status, said) = run(backup(home.path(), &state.join(own)).arg("--force")).await;
        assert!(
            !status.success() && said.contains("belongs to the job database"),
            "{said}"
        );
    }

    // After a kill, the next backup includes what is only in the log.
    submits.abort();
    let _ = submits.await;
    daemon.kill().await.unwrap();
    let later = shelf.path().join("later");
    let (status, said) = run(&mut backup(home.path(), &later)).await;
    assert!(status.success(), "{said}");

    let all = answered.lock().unwrap().clone();
    for (goal, jobs) in [(&goal, before), (&later, all)] {
        let other = tempfile::tempdir().unwrap();
        let state = other.path().join("state/orchestratord");
        std::fs::create_dir_all(&state).unwrap();
        std::fs::copy(goal, state.join("jobs.db")).unwrap();
        let (_daemon, client) = start(other.path()).await;
        for job in jobs {
            client
                .get::<TaskView>(&format!("/v2/tasks/{job}"))
                .await
                .unwrap();
        }
        client
            .post::<_, TaskAccepted>(
                "/v2/tasks",
                &json!({"model": MODEL, "prompt": "on the copy"}),
            )
            .await
            .unwrap();
    }
    let (status, said) = run(backup(home.path(), &later).arg("--force")).await;
    assert!(status.success(), "{said}");
}

// [ORCHD-076] A backup that can't be finished leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_finds_no_room_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let shelf = tempfile::tempdir().unwrap();
    let (mut daemon, client) = start(home.path()).await;
    let body = json!({"model": MODEL, "prompt": "x".repeat(1 << 20)});
    client
        .post::<_, TaskAccepted>("/v2/tasks", &body)
        .await
        .unwrap();
    daemon.kill().await.unwrap();
    let goal = shelf.path().join("jobs.backup");
    std::fs::write(&goal, "an older one").unwrap();
    // No file may grow beyond 256 KiB.
    let mut bounded = command(home.path());
    let program = bounded.as_std().get_program().to_owned();
    bounded = {
        let mut shell = Command::new("sh");
        shell
            .env_clear()
            .env("LLORCH_HOME", home.path())
            .args(["-c", "trap '' XFSZ; ulimit -f 512; exec \"$0\" \"$@\""])
            .arg(program)
            .args(["backup", "--force"])
            .arg(&goal);
        shell
    };
    let (status, said) = run(&mut bounded).await;
    assert!(
        !status.success() && said.contains("could not copy"),
        "{said}"
    );
    assert_eq!(std::fs::read_to_string(&goal).unwrap(), "an older one");
    assert_eq!(files(shelf.path()), ["jobs.backup"]);
}
