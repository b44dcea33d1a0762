//! Numbers that every JSON reader keeps exactly.

use pool_core::kit::client::Method;
use pool_core::worker::{Backend, WorkerStatus};
use serde_json::{Value, json};

use crate::exact_numbers::assert_exact;
use crate::support::Host;

#[tokio::test] // [POOLD-048]
async fn every_reader_of_json_keeps_every_number() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    let mut texts = Vec::new();
    for path in [
        "/workers",
        "/workers/worker-cpu-0",
        "/status",
        "/models",
        "/version",
    ] {
        texts.push((path.to_owned(), daemon.client.get_text(path).await.unwrap()));
    }
    // The model's file was written today, so its time has more than 53 bits.
    let file = &serde_json::from_str::<Value>(&texts[1].1).unwrap()["model_file"];
    let modified: u64 = file["modified_ns"].as_str().unwrap().parse().unwrap();
    assert_eq!(modified, worker.model_file.modified_ns);
    assert!(modified > 1 << 53);
    // A memory need beyond any capacity.
    let mut request = host.request("serve");
    (request.context_length, request.slots) = (Some(u32::MAX), Some(256));
    if let Err(refused) = daemon.spawn(&request).await {
        let refused = serde_json::to_string(refused.api().unwrap()).unwrap();
        texts.push(("a refusal".to_owned(), refused));
    }
    let record = host.home().pool_state().join("workers/worker-cpu-0.json");
    texts.push((
        "the record".to_owned(),
        std::fs::read_to_string(record).unwrap(),
    ));
    assert_exact(&texts);
    daemon.shut_down().await;
}

/// Records of an earlier version, which wrote the file's time as a number, are still read, so their workers are adopted after
/// an update.
#[tokio::test] // [POOLD-048]
async fn a_record_of_an_earlier_version_is_read() {
    let host = Host::new();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    daemon.shut_down().await;
    let path = host
        .home()
        .pool_state()
        .join(format!("workers/{}.json", worker.id));
    let record = std::fs::read_to_string(&path).unwrap();
    let modified = worker.model_file.modified_ns.to_string();
    let earlier = record.replace(&format!("\"{modified}\""), &modified);
    assert_ne!(earlier, record);
    std::fs::write(&path, earlier).unwrap();
    let daemon = host.start().await;
    let adopted = daemon.until_status(&worker.id, WorkerStatus::Ready).await;
    assert_eq!(adopted.pid, worker.pid);
    assert_eq!(adopted.model_file, worker.model_file);
    assert_eq!(adopted.device.backend, Backend::Cpu);
    let request = daemon
        .client
        .request(Method::POST, "/workers/worker-cpu-0/stop");
    let _: Value = daemon
        .client
        .fetch(request.json(&json!({"force": true})))
        .await
        .unwrap();
    daemon.shut_down().await;
}
