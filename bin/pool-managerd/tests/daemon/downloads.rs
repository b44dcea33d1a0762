//! `POST /models/download`, with a fake `llorch-pool` that is controlled by files.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use pool_core::api::models::ModelDownloadRequest;
use pool_core::kit::client::{ClientError, EventStream, Method};
use pool_core::kit::process::ProcessIdentity;
use serde_json::{Value, json};

use crate::program::write_program;
use crate::support::{Daemon, Host, refusal, until};

/// Fake downloader: writes its pid and arguments, prints its first events, waits for the file `go`, prints `last`, and ends. On
/// SIGTERM it ends as an interrupted download does.
const DOWNLOADER: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/args"
echo "$LLORCH_MODELS_DIR" > "$here/models_dir"
trap 'echo "{\"event\":\"error\",\"code\":\"INTERRUPTED\",\"message\":\"interrupted\",\"retriable\":true}"; exit 130' TERM
echo '{"event":"progress","phase":"downloading","done_bytes":5,"total_bytes":9,"bytes_per_s":2}'
echo "a remark" >&2
echo $$ > "$here/pid"
until [ -e "$here/go" ]; do sleep 0.02; done
cat "$here/last"
"#;

fn downloader(host: &Host) -> PathBuf {
    let folder = host.config.workers.programs_dir.clone().unwrap();
    let program = folder.join("llorch-pool");
    write_program(&program, DOWNLOADER);
    let end = json!({"event": "end", "model_ref": "smollm2-135m", "path": "/m", "size_bytes": 9, "sha256": "ab", "already_there": false});
    fs::write(folder.join("last"), format!("{end}\n")).unwrap();
    folder
}

async fn download(daemon: &Daemon, model: &str) -> Result<EventStream, ClientError> {
    let request = ModelDownloadRequest {
        model: model.parse().unwrap(),
    };
    let request = daemon
        .client
        .request(Method::POST, "/models/download")
        .json(&request);
    daemon.client.events(request).await
}

/// Returns the next event's name and data.
async fn next(stream: &mut EventStream) -> Option<(String, Value)> {
    let event = stream.next().await?.unwrap();
    Some((event.event, serde_json::from_str(&event.data).unwrap()))
}

async fn pid_of(folder: &std::path::Path) -> ProcessIdentity {
    until("the downloader runs", async || {
        let text = fs::read_to_string(folder.join("pid")).ok()?;
        let pid = text.strip_suffix('\n')?.parse().ok()?;
        ProcessIdentity::of(pid).unwrap()
    })
    .await
}

#[tokio::test] // [POOLD-100] [POOLD-101]
async fn one_download_serves_all_who_ask_and_outlives_them() {
    let host = Host::new();
    let folder = downloader(&host);
    let daemon = host.start().await;
    let mut first = download(&daemon, "smollm2-135m").await.unwrap();
    let (name, data) = next(&mut first).await.unwrap();
    assert_eq!(name, "progress");
    assert_eq!(
        data,
        json!({"phase": "downloading", "done_bytes": 5, "total_bytes": 9, "bytes_per_s": 2})
    );
    // A client that disconnects ends nothing.
    drop(first);
    let process = pid_of(&folder).await;
    let mut second = download(&daemon, "smollm2-135m").await.unwrap();
    let mut third = download(&daemon, "smollm2-135m").await.unwrap();
    assert!(process.is_alive());
    fs::write(folder.join("go"), "").unwrap();
    for stream in [&mut second, &mut third] {
        let mut names = Vec::new();
        while let Some((name, data)) = next(stream).await {
            if name == "end" {
                assert_eq!(
                    (&data["model_ref"], &data["sha256"]),
                    (&"smollm2-135m".into(), &"ab".into())
                );
                assert!(data.get("event").is_none());
            }
            names.push(name);
        }
        assert_eq!(names.last().unwrap(), "end");
        assert_eq!(names.iter().filter(|name| *name != "progress").count(), 1);
    }
    assert_eq!(
        fs::read_to_string(folder.join("args")).unwrap(),
        "models download --progress json -- smollm2-135m\n",
        "it ran once"
    );
    assert_eq!(
        fs::read_to_string(folder.join("models_dir"))
            .unwrap()
            .trim(),
        host.home().models_dir().display().to_string()
    );
    let metrics = daemon.client.get_text("/metrics").await.unwrap();
    assert!(
        metrics.contains("pool_mgr_model_downloads_total{outcome=\"completed\"} 1"),
        "{metrics}"
    );
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-102]
async fn a_downloader_that_fails_or_dies_is_an_error_event() {
    let host = Host::new();
    let folder = downloader(&host);
    let daemon = host.start().await;
    fs::write(folder.join("go"), "").unwrap();
    let last = async || {
        let mut stream = download(&daemon, "smollm2-135m").await.unwrap();
        let mut last = None;
        while let Some(event) = next(&mut stream).await {
            last = Some(event);
        }
        last.unwrap()
    };
    let failure = json!({"event": "error", "code": "NO_SPACE", "message": "full", "hint": "delete", "retriable": false});
    fs::write(folder.join("last"), format!("{failure}\n")).unwrap();
    assert_eq!(
        last().await,
        (
            "error".to_owned(),
            json!({"code": "NO_SPACE", "message": "full", "hint": "delete", "retriable": false})
        )
    );
    fs::write(folder.join("last"), "no event\n").unwrap();
    let (name, data) = last().await;
    assert_eq!(
        (name.as_str(), &data["code"]),
        ("error", &"DOWNLOAD_FAILED".into())
    );
    assert!(
        data["message"].as_str().unwrap().contains("a remark"),
        "{data}"
    );
    let metrics = daemon.client.get_text("/metrics").await.unwrap();
    for outcome in ["no_space", "failed"] {
        let line = format!("pool_mgr_model_downloads_total{{outcome=\"{outcome}\"}} 1");
        assert!(metrics.contains(&line), "{metrics}");
    }
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-103]
async fn a_daemon_that_ends_takes_its_downloads_with_it() {
    let host = Host::new();
    let folder = downloader(&host);
    let daemon = host.start().await;
    let mut stream = download(&daemon, "smollm2-135m").await.unwrap();
    let process = pid_of(&folder).await;
    let told = tokio::spawn(async move {
        let mut last = None;
        while let Some(event) = next(&mut stream).await {
            last = Some(event);
        }
        last.unwrap()
    });
    let took = daemon.shut_down().await;
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(!process.is_alive());
    let (name, data) = told.await.unwrap();
    assert_eq!(
        (name.as_str(), &data["code"]),
        ("error", &"INTERRUPTED".into())
    );
}

#[tokio::test] // [POOLD-104]
async fn what_may_not_be_downloaded_is_refused_before_anything_runs() {
    let mut host = Host::new();
    let folder = downloader(&host);
    let own = "[[models]]\nid = \"mamba\"\narchitecture = \"mamba\"\n\
               [[models.sources]]\nkind = \"hf\"\nrepo = \"a/b\"\nfile = \"mamba.gguf\"\n";
    fs::write(host.home().config_file("catalog.toml"), own).unwrap();
    let daemon = host.start().await;
    for (model, status, code) in [
        ("smollm-135m", 404, "MODEL_NOT_FOUND"),
        ("hf:some/where::file=x.gguf", 400, "MODEL_NOT_ALLOWED"),
        ("file:/etc/passwd", 400, "INVALID_REQUEST"),
        ("mamba", 422, "MODEL_UNSUPPORTED"),
    ] {
        let refused = download(&daemon, model).await.map(drop);
        assert_eq!(refusal(refused), (status, code.to_owned()), "{model}");
    }
    daemon.shut_down().await;
    assert!(!folder.join("args").exists());

    host.config.models.allow_hub = true;
    let daemon = host.start().await;
    let _stream = download(&daemon, "hf:some/where::file=x.gguf")
        .await
        .unwrap();
    pid_of(&folder).await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-106] P24
async fn a_model_on_its_way_is_not_called_missing() {
    let host = Host::new();
    let folder = downloader(&host);
    let daemon = host.start().await;
    let spawn = async || {
        let request = json!({"model": "smollm2-135m", "backend": "cpu"});
        refusal(
            daemon
                .client
                .post::<_, Value>("/workers/spawn", &request)
                .await,
        )
    };
    let missing = (404, "MODEL_NOT_DOWNLOADED".to_owned());
    assert_eq!(spawn().await, missing);
    let mut stream = download(&daemon, "smollm2-135m").await.unwrap();
    pid_of(&folder).await;
    assert_eq!(spawn().await, (503, "MODEL_NOT_DOWNLOADED".to_owned()));
    let downloads = async || {
        let status: Value = daemon.client.get("/status").await.unwrap();
        status["downloads"].clone()
    };
    assert_eq!(downloads().await, json!(["smollm2-135m"]));
    fs::write(folder.join("go"), "").unwrap();
    while next(&mut stream).await.is_some() {}
    assert_eq!(downloads().await, Value::Null);
    assert_eq!(spawn().await, missing);
    daemon.shut_down().await;
}
