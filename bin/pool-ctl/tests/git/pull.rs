//! `git pull`: a fast-forward or nothing, and its obstacles.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use pool_core::kit::process::Signal;
use serde_json::Value;

use crate::World;
use crate::support::{Ran, Running};

#[test] // [POOLCTL-044]
fn pull_goes_forward() {
    let world = World::new();
    let before = world.head("host");
    let ran = world.run(&["pull"]).exits(0);
    assert!(
        ran.out.starts_with("main has all of origin/main"),
        "{}",
        ran.out
    );
    world.write("author/README", "two\n");
    world.write("author/more", "x");
    world.commit("author", "second");
    world.write("host/untracked", "stays");
    let pulled = world.json(&["pull"]);
    assert_eq!(
        (&pulled["commits"], &pulled["files"]),
        (&1.into(), &2.into())
    );
    assert_eq!(
        (&pulled["from"], &pulled["to"]),
        (&before.into(), &world.head("author").into())
    );
    assert_eq!(world.read("host/README"), "two\n");
    assert_eq!(world.read("host/untracked"), "stays");
}

#[test] // [POOLCTL-044]
fn pull_refuses_on_local_changes_and_says_which() {
    let world = World::new();
    world.write("author/other", "two\n");
    world.commit("author", "second");
    let before = world.head("host");
    world.write("host/README", "mine\n");
    world.write("host/added", "mine\n");
    world.git("host", &["add", "added"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["2 files with local changes: README, added", "git stash"]);
    assert_eq!(
        (world.head("host"), world.read("host/README")),
        (before.clone(), "mine\n".into())
    );

    // A file unknown to git in the place of a new one. Ignored files are treated alike.
    world.git("host", &["reset", "-q", "--hard"]);
    world.write("host/other", "precious");
    world
        .run(&["pull"])
        .exits(4)
        .says(&["1 file not known to git would be overwritten: other"]);
    world.write("host/.git/info/exclude", "other\n");
    world.run(&["pull"]).exits(4).says(&["overwritten: other"]);
    assert_eq!(
        (world.head("host"), world.read("host/other")),
        (before, "precious".into())
    );
}

#[test] // [POOLCTL-044]
fn pull_refuses_where_there_is_no_way_forward() {
    let world = World::new();
    world.write("author/README", "two\n");
    world.commit("author", "second");
    world.write("author/README", "three\n");
    world.commit("author", "third");
    world.write("host/own", "x");
    world.git("host", &["add", "own"]);
    world.git("host", &["commit", "-q", "-m", "own"]);
    let before = world.head("host");
    world.run(&["pull"]).exits(4).says(&[
        "main and origin/main have diverged: 1 commit only here, 2 commits only there",
        "git rebase",
    ]);
    assert_eq!(world.head("host"), before);

    world.git("host", &["checkout", "-q", "--detach"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["HEAD is detached", "git switch"]);
    world
        .run(&["sync", "--yes"])
        .exits(4)
        .says(&["HEAD is detached"]);
    world.git("host", &["switch", "-q", "-c", "alone"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["has no upstream branch", "--set-upstream-to"]);

    world.git("", &["init", "-q", "unborn"]);
    let unborn = |args: &[&str]| -> Ran {
        let at = world.path("unborn").display().to_string();
        world.run(&[args, &["--repo", &at]].concat())
    };
    assert!(
        unborn(&["status"])
            .exits(0)
            .out
            .contains("main without commits")
    );
    unborn(&["pull"]).exits(4).says(&["has no upstream branch"]);
    let remote = world.path("remote.git").display().to_string();
    world.git("unborn", &["remote", "add", "origin", &remote]);
    world.git("unborn", &["config", "branch.main.remote", "origin"]);
    world.git(
        "unborn",
        &["config", "branch.main.merge", "refs/heads/main"],
    );
    unborn(&["pull"])
        .exits(4)
        .says(&["no commit yet", "llorch-pool git sync"]);
    world.write("unborn/README", "in the way");
    unborn(&["sync"])
        .exits(4)
        .says(&["to be overwritten: README"]);
    unborn(&["sync", "--yes"]).exits(0);
    assert_eq!(world.read("unborn/README"), "three\n");
}

#[test] // [POOLCTL-042]
fn a_remote_that_is_away_or_dies_half_way_changes_nothing() {
    let world = World::new();
    let before = world.head("host");
    world.write("author/README", "two\n");
    world.commit("author", "second");
    let url = |url: &str| world.git("host", &["config", "remote.origin.url", url]);
    let gone = world.path("gone.git").display().to_string();
    url(&gone);
    world
        .run(&["pull"])
        .exits(5)
        .says(&["does not appear to be a git repository", "git remote -v"]);
    // No process listens at the address.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    url(&format!("http://{free}/x.git"));
    world.run(&["pull"]).exits(5);
    url(&format!("git://{free}/x.git"));
    world.run(&["sync", "--yes"]).exits(5);
    // A server that begins an answer and then breaks the connection.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    url(&format!("git://{}/x.git", listener.local_addr().unwrap()));
    let dying = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        let _ = stream.write_all(b"004895dcfa3633004da0049d3d0fa03f80589cbcaf31 HEAD\0multi");
    });
    world.run(&["pull"]).exits(5);
    dying.join().unwrap();
    // A server that asks for a password: no user is prompted.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    url(&format!("http://{}/x.git", listener.local_addr().unwrap()));
    let asking = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    });
    world
        .run(&["pull"])
        .exits(5)
        .says(&["no password prompt is shown"]);
    asking.join().unwrap();
    assert_eq!(
        (world.head("host"), world.read("host/README")),
        (before, "one\n".into())
    );
    // The branch is gone on the remote.
    url(world.path("remote.git").to_str().unwrap());
    world.git("remote.git", &["update-ref", "-d", "refs/heads/main"]);
    world
        .run(&["pull"])
        .exits(3)
        .says(&["couldn't find remote ref"]);
}

#[test] // [POOLCTL-042]
fn a_lock_of_another_git_is_named() {
    let world = World::new();
    world.write("author/README", "two\n");
    world.commit("author", "second");
    let before = world.head("host");
    world.write("host/.git/index.lock", "");
    world.run(&["pull"]).exits(4).says(&[
        "index.lock",
        "wait for the other git to finish",
        ": rm /",
    ]);
    world.run(&["sync", "--yes"]).exits(4).says(&["index.lock"]);
    assert_eq!(world.head("host"), before);
    // A read-only command needs no lock.
    world.run(&["status"]).exits(0);
    fs::remove_file(world.path("host/.git/index.lock")).unwrap();
    world.run(&["pull"]).exits(0);
}

#[test] // [POOLCTL-042]
fn an_interruption_ends_git_and_says_what_is_left() {
    let world = World::new();
    let before = world.head("host");
    // A remote that accepts the connection and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("git://{}/x.git", listener.local_addr().unwrap());
    world.git("host", &["config", "remote.origin.url", &url]);
    for signal in [Signal::INT, Signal::TERM] {
        let mut command = world.pool(&["pull"]);
        let pool = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let held = listener.accept().unwrap();
        pool.signal(signal);
        pool.ended()
            .exits(130)
            .says(&["interrupted: nothing was changed; main is still at"]);
        // git was ended as well: its end of the connection is closed.
        let (mut stream, _) = held;
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let ended = stream.read_to_end(&mut Vec::new());
        assert!(
            !ended.is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
            "git still holds it"
        );
    }
    assert_eq!(world.head("host"), before);
    assert!(!world.path("host/.git/index.lock").exists());
}

#[test] // [POOLCTL-044]
fn a_merge_that_was_begun_is_named() {
    let world = World::new();
    world.git("host", &["switch", "-q", "-c", "side"]);
    world.write("host/README", "side\n");
    world.git("host", &["commit", "-q", "-am", "side"]);
    world.git("host", &["switch", "-q", "main"]);
    world.write("host/README", "main\n");
    world.git("host", &["commit", "-q", "-am", "main"]);
    let merge = Command::new("git")
        .args(["merge", "-q", "side"])
        .current_dir(world.path("host"))
        .output()
        .unwrap();
    assert!(!merge.status.success());
    let status = world.json(&["status"]);
    assert_eq!(
        (&status["operation"], &status["conflicted"]),
        (&"merge".into(), &serde_json::json!(["README"]))
    );
    world
        .run(&["pull"])
        .exits(4)
        .says(&["a merge is in progress", "git merge --abort"]);
    world.run(&["sync", "--yes"]).exits(0);
    assert_eq!(world.json(&["status"])["operation"], Value::Null);
    assert_eq!(world.read("host/README"), "one\n");
}
