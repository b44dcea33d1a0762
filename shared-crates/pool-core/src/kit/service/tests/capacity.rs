//! Places for connections, streams and bodies.

use super::*;

#[tokio::test] // [POOLCORE-065]
async fn a_connection_too_many_is_refused_and_the_place_comes_back() {
    let server = Server::start(ServiceOptions {
        max_connections: 1,
        ..options()
    })
    .await;
    let mut first = TcpStream::connect(server.addr).await.unwrap();
    first
        .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    assert_ne!(first.read(&mut [0; 1024]).await.unwrap(), 0);

    let second = server.send("GET /who", "").await;
    assert_eq!(
        (second.status, second.headers["retry-after"].as_str()),
        (503, "1")
    );
    assert_eq!(second.refusal().1, "OVERLOADED");

    // [POOLCORE-071] [P23] Requests of the control path are still answered.
    assert_eq!(server.send("GET /health", "").await.status, 200);

    drop(first);
    let back = async { while server.send("GET /who", "").await.status != 200 {} };
    timeout(Duration::from_secs(10), back)
        .await
        .expect("the place is free again");
}

#[tokio::test] // [POOLCORE-065] [P19]
async fn a_flood_of_silent_connections_costs_nobody_who_speaks_the_answer() {
    let server = Server::start(ServiceOptions {
        max_connections: 1,
        ..options()
    })
    .await;
    let _holder = open_stream(&server).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    // More than the system's socket buffers hold.
    let body = vec![b' '; 12_000_000];
    let asking = (0..20).map(|_| async {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let head = format!(
            "POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut text = String::new();
        // Like many clients, read nothing before everything is sent.
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await?;
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(Answer::parse(&text))
    });
    let asked = timeout(
        Duration::from_secs(60),
        futures_util::future::join_all(asking),
    );
    for answer in asked.await.expect("every request is answered") {
        let answer = answer.expect("no request is cut off");
        assert_eq!(
            (answer.status, answer.headers["retry-after"].as_str()),
            (503, "1")
        );
        assert_eq!(answer.refusal().1, "OVERLOADED");
    }
    // The silent connections are closed in an orderly way, too.
    for mut stream in silent {
        let read = timeout(Duration::from_secs(60), stream.read(&mut [0])).await;
        assert_eq!(
            read.expect("the connection is closed").expect("in order"),
            0
        );
    }
}

/// Returns ample places. Each test overrides some.
fn places() -> Places {
    Places {
        connections: 100,
        streams: 100,
        spare: 10,
        calls: 10,
        body_bytes: 1 << 20,
    }
}

#[tokio::test] // [POOLCORE-071] [P23]
async fn silent_connections_do_not_keep_the_control_path_waiting() {
    let server = Server::with_places(Places {
        connections: 1,
        spare: 4,
        ..places()
    })
    .await;
    let _holder = open_stream(&server).await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    let begun = Instant::now();
    assert_eq!(server.send("GET /health", "").await.status, 200);
    // With the time limit of an uncontended connection, this would take 20 s.
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test] // [POOLCORE-074] [P23]
async fn streams_leave_room_for_other_requests() {
    let server = Server::with_places(Places {
        streams: 1,
        ..places()
    })
    .await;
    let reader = open_stream(&server).await;
    let refused = server.send("GET /events", "").await;
    assert_eq!(
        (refused.status, refused.headers["retry-after"].as_str()),
        (503, "1")
    );
    assert_eq!(refused.refusal().1, "OVERLOADED");
    let asks = server
        .send("GET /who\nAccept: text/html, text/event-stream", "")
        .await;
    assert_eq!(asks.status, 503, "the answer may become a stream");
    assert_eq!(server.send("GET /who", "").await.status, 200);
    drop(reader);
    let back = async {
        while server
            .send("GET /who\nAccept: text/event-stream", "")
            .await
            .status
            != 200
        {}
    };
    timeout(Duration::from_secs(10), back)
        .await
        .expect("the place is free again");
}

#[tokio::test] // [POOLCORE-072] [P19] [P23]
async fn bodies_take_no_more_memory_than_there_is_for_them() {
    let server = Server::with_places(Places {
        body_bytes: 120,
        ..places()
    })
    .await;
    let head = "POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: 90\r\n\r\n";
    let body = format!("{:90}", r#"{"a":1,"b":2}"#);
    let mut slow = TcpStream::connect(server.addr).await.unwrap();
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.write_all(&body.as_bytes()[..80]).await.unwrap();
    let json = "POST /sum\nContent-Type: application/json";
    let refused = async {
        loop {
            let answer = server.send(json, &body).await;
            if answer.status != 200 {
                return answer;
            }
        }
    };
    let refused = timeout(Duration::from_secs(10), refused).await.unwrap();
    assert_eq!(
        (refused.status, refused.headers["retry-after"].as_str()),
        (503, "1")
    );
    assert_eq!(refused.refusal().1, "OVERLOADED");
    slow.write_all(&body.as_bytes()[80..]).await.unwrap();
    let mut text = String::new();
    slow.read_to_string(&mut text).await.unwrap();
    assert_eq!(Answer::parse(&text).body, "3");
    assert_eq!(server.send(json, &body).await.body, "3");
}
