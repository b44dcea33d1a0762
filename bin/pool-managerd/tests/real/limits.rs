//! A daemon with few descriptors that many clients hold, and a daemon that receives SIGHUP.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use pool_core::api::pool::WorkerList;
use pool_core::kit::client::ApiClient;
use pool_core::kit::process::Signal;
use pool_core::worker::WorkerInfo;
use serde_json::{Value, json};

use crate::house::House;

/// Opens a connection, sends one request and keeps the connection.
fn kept(addr: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let request = format!("GET /models HTTP/1.1\r\nHost: {addr}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

// [POOLD-052] [P23]: clients hold all the places they can get; workers can still be started, listed and stopped.
#[tokio::test(flavor = "multi_thread")]
async fn clients_leave_the_control_path_its_places() {
    for descriptors in [64, 256] {
        let mut house = House::fake("");
        house.limit = Some(format!("ulimit -n {descriptors}"));
        house.set("LLORCH_SERVICE_HEADER_TIMEOUT_MS", 60_000);
        let client = house.start().await;
        let addr = client.base_url().trim_start_matches("http://").to_owned();
        let mut clients: Vec<_> = (0..300).map(|_| kept(&addr)).collect();
        let stranger = || ApiClient::new(client.base_url(), None).unwrap();
        stranger().get::<Value>("/health").await.unwrap();
        let worker: WorkerInfo = stranger()
            .post("/workers/spawn", &house.request())
            .await
            .unwrap();
        let list: WorkerList = stranger().get("/workers").await.unwrap();
        assert_eq!(list.workers[0].id, worker.id);
        let path = format!("/workers/{}/stop", worker.id);
        stranger()
            .post::<_, Value>(&path, &json!({"force": true}))
            .await
            .unwrap();
        stranger().get_text("/metrics").await.unwrap();
        let mut answers = (0, 0);
        for stream in &mut clients {
            let mut head = [0; 12];
            stream.read_exact(&mut head).expect("an answer");
            match &head {
                b"HTTP/1.1 200" => answers.0 += 1,
                b"HTTP/1.1 503" => answers.1 += 1,
                other => panic!("{}", String::from_utf8_lossy(other)),
            }
        }
        assert!(answers.0 > 0 && answers.1 > 0, "{descriptors}: {answers:?}");
        let log = house.log();
        let said = |text: &str| log.lines().filter(|line| line.contains(text)).count();
        assert_eq!(said("\"too many connections\""), 1, "{log}");
        assert_eq!(said("Too many open files"), 0, "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")] // [POOLD-053]
async fn a_hangup_opens_the_log_again_and_ends_nothing() {
    let mut house = House::fake("");
    let log = house.home().logs_dir().join("pool-managerd.log");
    house.args = vec!["--log-file".into(), log.clone().into()];
    let client = house.start().await;
    let worker: WorkerInfo = client
        .post("/workers/spawn", &house.request())
        .await
        .unwrap();
    fs::rename(&log, log.with_extension("moved")).unwrap();
    house.signal_daemon(Signal::HUP);
    let begun = std::time::Instant::now();
    while !fs::read_to_string(&log).is_ok_and(|text| text.contains("reloaded the settings")) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no log again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let list: WorkerList = client.get("/workers").await.unwrap();
    assert_eq!(list.workers[0].id, worker.id);
}
