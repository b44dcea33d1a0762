//! The worker as a process: what its exit codes and last words tell the pool.

mod support;

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pool_core::worker::Backend;
use pool_core::worker_args::{
    EXIT_MODEL_INVALID, EXIT_PORT_TAKEN, NONCE_VAR, SECRET_VAR, WorkerArgs,
};
use support::tiny_model::TinyModel;

fn args(model: &Path, port: u16) -> WorkerArgs {
    WorkerArgs {
        worker_id: "worker-cpu-0".into(),
        model: model.into(),
        model_ref: None,
        sha256: None,
        backend: Backend::Cpu,
        gpu: 0,
        bind: Ipv4Addr::LOCALHOST.into(),
        port,
        pool_url: None,
        context_length: None,
        slots: 1,
        threads: Some(1),
        stop_grace_s: 10,
    }
}

fn command(args: &WorkerArgs) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llorch-candled"));
    command
        .args(args.to_args())
        .env(SECRET_VAR, "s3cret")
        .env(NONCE_VAR, "n")
        .env_remove("LLORCH_LOG");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The exit code and the last line of standard error.
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
fn a_bad_model_is_refused_with_its_reason_as_last_words() {
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
    // That there is no file now says nothing about the one that may be there later.
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
fn wrong_usage_is_said_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_file(folder.path(), &TinyModel::default());
    let output = command(&args(&model, 0))
        .env_remove(SECRET_VAR)
        .output()
        .unwrap();
    let (code, line) = ended(&output);
    assert_eq!(code, Some(2));
    assert!(line.contains(SECRET_VAR), "{line}");
    let output = command(&WorkerArgs {
        slots: 2,
        ..args(&model, 0)
    })
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--slots"));
    let output = command(&WorkerArgs {
        context_length: Some(1 << 20),
        ..args(&model, 0)
    })
    .output()
    .unwrap();
    let (code, line) = ended(&output);
    assert_eq!(code, Some(2));
    assert!(
        line.contains("a context of 1048576 tokens was asked for"),
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
    assert!(begun.elapsed() < Duration::from_secs(5));
}
