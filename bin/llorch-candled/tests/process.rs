//! The worker as a process: its exit codes and the last line of its log, from which the pool learns the cause.

mod support;

use std::io::{BufRead, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pool_core::api::worker::{
    CancelRequest, CancelResponse, ExecuteRequest, HealthState, WorkerHealth,
};
use pool_core::kit::client::{ApiClient, Method};
use pool_core::kit::secret::Secret;
use pool_core::worker::Backend;
use pool_core::worker_args::{EXIT_MODEL_INVALID, EXIT_PORT_TAKEN, SECRET_VAR, WorkerArgs};
use support::process::{RunningWorker, SECRET, args, command, free_port, prepared};
use support::tiny_model::TinyModel;
use support::{PATIENCE, greedy, until};

/// Returns [`command`], run under `limit`, a shell command.
fn limited(args: &WorkerArgs, limit: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell
        .arg("-c")
        .arg(format!("{limit} && exec \"$0\" \"$@\""))
        .arg(env!("CARGO_BIN_EXE_llorch-candled"));
    prepared(shell, args)
}

/// Returns the exit code and the last line of standard error.
fn ended(output: &Output) -> (Option<i32>, String) {
    let text = String::from_utf8_lossy(&output.stderr);
    (
        output.status.code(),
        text.lines().last().unwrap_or_default().to_owned(),
    )
}

fn tiny_file(folder: &Path, model: &TinyModel) -> std::path::PathBuf {
    let path = folder.join("tiny.gguf");
    model.write(&path).expect("the model is written");
    path
}

// [CAND-071]
#[test]
fn a_taken_port_has_an_exit_code_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let model = tiny_file(folder.path(), &TinyModel::default());
    let output = command(&args(&model, taken.local_addr().unwrap().port()))
        .output()
        .unwrap();
    let (code, line) = ended(&output);
    assert_eq!(code, Some(EXIT_PORT_TAKEN), "{line}");
    assert!(line.starts_with("error: "), "{line}");
}

// [CAND-072] [P18]
#[test]
fn a_bad_model_is_refused_with_its_reason_in_the_last_line() {
    let folder = tempfile::tempdir().unwrap();
    let whole = TinyModel::default().bytes();
    let nan = {
        let mut bytes = whole.clone();
        let at = bytes.len() - 32;
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        bytes
    };
    let truncated = whole[..whole.len() / 2].to_vec();
    let foreign = TinyModel {
        architecture: "mamba",
        ..TinyModel::default()
    }
    .bytes();
    for (name, bytes, says) in [
        ("truncated", truncated, "bytes are needed, the file has"),
        ("empty", Vec::new(), "not a GGUF file"),
        ("foreign", foreign, "architecture `mamba` is not supported"),
        ("nan", nan, "not finite"),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let (code, line) = ended(&command(&args(&path, 0)).output().unwrap());
        assert_eq!(code, Some(EXIT_MODEL_INVALID), "{name}: {line}");
        assert!(
            line.starts_with("error: ") && line.contains(says),
            "{name}: {line}"
        );
    }
    // The file may appear later, so its absence must not count as a bad model.
    let (code, line) = ended(
        &command(&args(&folder.path().join("missing"), 0))
            .output()
            .unwrap(),
    );
    assert_eq!(code, Some(1), "{line}");
    assert!(line.contains("could not read the file"), "{line}");
}

// [CAND-003] [CAND-073]
#[test]
fn wrong_usage_is_reported_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_file(folder.path(), &TinyModel::default());
    let output = command(&args(&model, 0))
        .env_remove(SECRET_VAR)
        .output()
        .unwrap();
    let (code, line) = ended(&output);
    assert_eq!(code, Some(2));
    assert!(line.contains(SECRET_VAR), "{line}");
    for (flag, value) in [
        ("--slots", "65"),
        ("--threads", "0"),
        ("--threads", "20000"),
        ("--stop-grace-s", "18446744073709551615"),
        ("--execution-ttl-s", "18446744073709551615"),
        ("--buffer-mib", "0"),
        ("--buffer-mib", "4294967295"),
    ] {
        // `args` has some of these flags already.
        let mut given = args(&model, 0).to_args();
        if let Some(place) = given.iter().position(|given| given == flag) {
            given.drain(place..place + 2);
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_llorch-candled"));
        let output = command.args(given).args([flag, value]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flag} {value}: {message}");
        let expected = format!("invalid value '{value}' for '{flag} ");
        assert!(message.contains(&expected), "{message}");
    }
    let output = command(&WorkerArgs {
        context_length: Some(1 << 20),
        ..args(&model, 0)
    })
    .output()
    .unwrap();
    let (code, line) = ended(&output);
    assert_eq!(code, Some(2));
    assert!(
        line.contains("the requested context of 1048576 tokens"),
        "{line}"
    );
    let output = command(&WorkerArgs {
        backend: Backend::Cuda,
        ..args(&model, 0)
    })
    .output()
    .unwrap();
    let (code, line) = ended(&output);
    assert_eq!(code, Some(1));
    assert!(line.contains("`cuda`"), "{line}");
}

// [CAND-070]
#[test]
fn sigterm_ends_an_idle_worker_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_file(folder.path(), &TinyModel::default());
    let mut child = command(&args(&model, 0)).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains("the model is loaded")));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let begun = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(20));
}

// [CAND-076]
#[test]
fn a_hang_up_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_file(folder.path(), &TinyModel::default());
    let mut child = RunningWorker(command(&args(&model, 0)).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("the model is loaded")));
    let pid = rustix::process::Pid::from_child(&child.0);
    for signal in [rustix::process::Signal::HUP, rustix::process::Signal::TERM] {
        rustix::process::kill_process(pid, signal).unwrap();
    }
    // Unhandled, the first signal would have ended the worker.
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
}

/// Drives the worker at `port` as far as possible: load, a long job, some tokens, a cancel.
async fn drive(port: u16) -> Option<()> {
    let url = format!("http://127.0.0.1:{port}");
    let client = ApiClient::new(&url, Some(Secret::new(SECRET))).expect("the address is one");
    let ready = || async {
        let health = client.get::<WorkerHealth>("/health").await.ok()?;
        (health.state == HealthState::Ready).then_some(())
    };
    until("the worker is ready", ready).await;
    for (job_id, max_tokens) in [("short", 3), ("long", 60_000)] {
        let request = ExecuteRequest {
            job_id: job_id.into(),
            max_tokens,
            ..greedy("hello")
        };
        let request = client.request(Method::POST, "/execute").json(&request);
        let mut events = client.events(request).await.ok()?;
        let mut seen = 0;
        while seen < 5 && futures_util::StreamExt::next(&mut events).await?.is_ok() {
            seen += 1;
        }
    }
    let cancel = CancelRequest {
        job_id: "long".into(),
        fence: 1,
    };
    client
        .post::<_, CancelResponse>("/cancel", &cancel)
        .await
        .ok()?;
    Some(())
}

// [CAND-078] [P23]
#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_clients_leave_the_fleet_its_places() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyModel {
        context: 60_100,
        ..TinyModel::default()
    };
    let model = tiny_file(folder.path(), &tiny);
    for descriptors in [64, 256] {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let args = WorkerArgs {
            context_length: Some(60_100),
            ..args(&model, address.port())
        };
        let mut child = limited(&args, &format!("ulimit -n {descriptors}"));
        let _child = RunningWorker(child.stderr(Stdio::null()).spawn().unwrap());
        until("it listens", || async { TcpStream::connect(address).ok() }).await;
        // Half of these connections send a request without the secret, and stay open.
        let strangers: Vec<TcpStream> = (0..400)
            .map(|number| {
                let mut stream = TcpStream::connect(address).unwrap();
                if number % 2 == 0 {
                    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\n\r\n");
                    stream.write_all(request.as_bytes()).unwrap();
                }
                stream
            })
            .collect();
        let driven = tokio::time::timeout(PATIENCE, drive(address.port())).await;
        assert_eq!(driven.expect("it gets there"), Some(()), "{descriptors}");
        drop(strangers);
    }
}

// [CAND-075]
#[tokio::test]
async fn a_crash_anywhere_leaves_nothing_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyModel {
        context: 60_100,
        ..TinyModel::default()
    };
    let model = tiny_file(folder.path(), &tiny);
    let port = free_port();
    let args = WorkerArgs {
        context_length: Some(60_100),
        ..args(&model, port)
    };
    for point in [
        "load.step@3",
        "load.done",
        "execute.accepted",
        "execute.token@2",
        "execute.ending",
        "execute.cancelled",
    ] {
        let mut child = command(&args);
        child.env("LLORCH_CRASH_AT", point).stderr(Stdio::null());
        let mut child = RunningWorker(child.spawn().unwrap());
        let crashed = until(point, || std::future::ready(child.0.try_wait().unwrap()));
        let driven = async {
            drive(port).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            status = crashed => assert_eq!(status.signal(), Some(9), "{point}: {status}"),
            () = driven => {}
        }
    }
    // The next worker on this port completes all steps.
    let mut child = command(&args);
    let _child = RunningWorker(child.stderr(Stdio::null()).spawn().unwrap());
    let driven = tokio::time::timeout(PATIENCE, drive(port)).await;
    assert_eq!(driven.expect("it gets there"), Some(()));
}
