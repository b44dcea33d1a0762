//! Stops with open work.

use super::*;

#[tokio::test] // [POOLCORE-065] [POOLCORE-066] [P20]
async fn connections_too_many_that_are_silent_do_not_hold_up_a_stop() {
    let one = ServiceOptions {
        max_connections: 1,
        ..options()
    };
    let server = Server::with_grace(one, Duration::from_secs(1)).await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    assert_ne!(idle.read(&mut [0; 1024]).await.unwrap(), 0);
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    // Connections are accepted in order: after this answer, all earlier ones have been accepted.
    assert_eq!(server.send("GET /who", "").await.status, 503);
    server.shutdown.trigger();
    let stopped = timeout(Duration::from_secs(20), server.stopped).await;
    assert_eq!(stopped.expect("in time").unwrap(), Stopped { cut: 0 });
}

#[tokio::test] // [POOLCORE-065] [POOLCORE-066] [P20]
async fn a_stop_lets_one_who_is_refused_finish() {
    let one = ServiceOptions {
        max_connections: 1,
        ..options()
    };
    let server = Server::with_grace(one, Duration::from_secs(60)).await;
    let holder = TcpStream::connect(server.addr).await.unwrap();
    let mut refused = TcpStream::connect(server.addr).await.unwrap();
    let body = vec![b' '; 12_000_000];
    let head = format!(
        "POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    refused.write_all(head.as_bytes()).await.unwrap();
    let mut text = vec![0; 12];
    refused.read_exact(&mut text).await.unwrap();
    assert_eq!(text, b"HTTP/1.1 503");
    server.shutdown.trigger();
    while TcpStream::connect(server.addr).await.is_ok() {}
    refused
        .write_all(&body)
        .await
        .expect("the body is accepted");
    refused.read_to_end(&mut text).await.expect("in order");
    drop((refused, holder));
    let stopped = timeout(Duration::from_secs(20), server.stopped).await;
    assert_eq!(stopped.expect("in time").unwrap(), Stopped { cut: 0 });
}

#[tokio::test] // [POOLCORE-066] [P20]
async fn a_stop_waits_for_the_grace_and_no_longer() {
    let server = Server::with_grace(options(), Duration::from_millis(300)).await;
    let mut open = open_stream(&server).await;
    let begun = Instant::now();
    server.shutdown.trigger();
    let stopped = timeout(Duration::from_secs(5), server.stopped)
        .await
        .expect("the daemon stops in time")
        .unwrap();
    assert_eq!(stopped, Stopped { cut: 1 });
    assert!(begun.elapsed() >= Duration::from_millis(300));
    let mut rest = Vec::new();
    let _ = timeout(Duration::from_secs(5), open.read_to_end(&mut rest))
        .await
        .expect("the stream was cut");
    assert!(
        TcpStream::connect(server.addr).await.is_err(),
        "the daemon no longer listens"
    );
}

#[tokio::test] // [POOLCORE-066] [P20]
async fn a_stop_without_open_work_is_immediate() {
    let patient = ServiceOptions {
        header_timeout: Duration::from_secs(60),
        ..options()
    };
    let server = Server::with_grace(patient, Duration::from_secs(60)).await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    assert_ne!(idle.read(&mut [0; 1024]).await.unwrap(), 0);
    let _silent = TcpStream::connect(server.addr).await.unwrap();
    let mut halfway = TcpStream::connect(server.addr).await.unwrap();
    halfway
        .write_all(b"GET /health HTTP/1.1\r\nHost: loc")
        .await
        .unwrap();
    // Connections are accepted in order: after this answer, the earlier ones are being served.
    assert_eq!(server.send("GET /health", "").await.status, 200);
    server.shutdown.trigger();
    let stopped = timeout(Duration::from_secs(20), server.stopped)
        .await
        .expect("a connection without a request does not delay the stop")
        .unwrap();
    assert_eq!(stopped, Stopped { cut: 0 });
    assert!(server.shutdown.is_requested());
    server.shutdown.requested().await;
}
