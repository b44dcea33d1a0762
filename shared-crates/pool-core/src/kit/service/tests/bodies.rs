//! Refusals, bodies and headers, whole, huge, slow and without end.

use super::*;

#[tokio::test] // [POOLCORE-060]
async fn every_refusal_is_an_envelope() {
    let server = Server::start(options()).await;
    let json = "POST /sum\nContent-Type: application/json";
    assert_eq!(server.send(json, r#"{"a":1,"b":2}"#).await.body, "3");

    let cases: [(&str, &str, u16, &str, &str); 13] = [
        (json, r#"{"a":1,"#, 400, "BAD_JSON", "EOF"),
        (json, "\u{1}", 400, "BAD_JSON", "expected value"),
        (
            json,
            r#"{"a":1,"b":300}"#,
            400,
            "INVALID_REQUEST",
            "b: invalid value: integer `300`",
        ),
        (
            json,
            r#"{"a":1,"b":2,"c":3}"#,
            400,
            "INVALID_REQUEST",
            "unknown field `c`",
        ),
        (
            json,
            r#"{"a":1,"a":1,"b":2}"#,
            400,
            "INVALID_REQUEST",
            "duplicate field `a`",
        ),
        (
            json,
            &format!(r#"{{"a":1,"b":{}}}"#, "1".repeat(100)),
            413,
            "TOO_LARGE",
            "larger",
        ),
        (
            "POST /sum",
            r#"{"a":1,"b":2}"#,
            415,
            "UNSUPPORTED_MEDIA_TYPE",
            "not declared as JSON",
        ),
        (
            "GET /page?limit=x",
            "",
            400,
            "INVALID_REQUEST",
            "limit: invalid digit",
        ),
        ("GET /item/x", "", 400, "INVALID_REQUEST", "`x`"),
        ("GET /nowhere", "", 404, "NO_SUCH_PATH", "/nowhere"),
        (
            "DELETE /sum",
            "",
            405,
            "METHOD_NOT_ALLOWED",
            "/sum does not support DELETE",
        ),
        ("GET /full", "", 429, "QUEUE_FULL", "full"),
        ("GET /panic", "", 500, "INTERNAL", "failed"),
    ];
    for (head, body, status, code, message) in cases {
        let answer = server.send(head, body).await;
        let refusal = answer.refusal();
        assert_eq!(
            (refusal.0, refusal.1.as_str()),
            (status, code),
            "{head} {body}: {answer:?}"
        );
        assert!(refusal.2.contains(message), "{head} {body}: {}", refusal.2);
    }
    // An error in one field names that field for programs.
    for (body, field) in [
        (r#"{"a":1,"b":300}"#, Some("b")),
        (r#"{"a":1}"#, None),
        (r#"{"a":1,"b":"#, None),
    ] {
        let error = server.send(json, body).await.error();
        assert_eq!(error["details"]["field"].as_str(), field, "{body}: {error}");
    }
    let full = server.send("GET /full", "").await;
    assert_eq!(full.headers["retry-after"], "2");
    assert_eq!(
        (
            full.error()["retriable"].clone(),
            full.error()["retry_after_ms"].clone()
        ),
        (true.into(), 1500.into())
    );
    assert_eq!(
        server.send("DELETE /sum", "").await.headers["allow"],
        "POST"
    );
    assert_eq!(server.send("POST /optional", "").await.body, "false");
    assert_eq!(
        server
            .send(
                "POST /optional\nContent-Type: application/json",
                r#"{"a":1,"b":2}"#
            )
            .await
            .body,
        "true"
    );
    // The daemon survived the panic.
    assert_eq!(
        server.send("GET /version", "").await.body,
        r#"{"name":"testd","version":"1.2.3","api_version":7}"#
    );
}

#[tokio::test] // [POOLCORE-060]
async fn a_body_without_a_length_is_bounded_as_well() {
    let server = Server::start(options()).await;
    let chunks = format!("64\r\n{}\r\n", " ".repeat(100)).repeat(3);
    let answer = server
        .raw(&format!("POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n{chunks}0\r\n\r\n"))
        .await;
    assert_eq!(answer.refusal().0, 413);
}

#[tokio::test] // [POOLCORE-060]
async fn a_client_that_is_still_sending_a_huge_body_learns_why_it_is_refused() {
    let server = Server::start(options()).await;
    for _ in 0..20 {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let (mut from, mut to) = stream.into_split();
        let sending = tokio::spawn(async move {
            let head = "POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\nConnection: close\r\n\r\n";
            to.write_all(head.as_bytes()).await?;
            to.write_all(&vec![b' '; 10_000_000]).await
        });
        let mut text = Vec::new();
        let _ = timeout(Duration::from_secs(10), from.read_to_end(&mut text))
            .await
            .expect("the answer ends");
        assert_eq!(
            Answer::parse(&String::from_utf8(text).unwrap()).refusal().1,
            "TOO_LARGE"
        );
        let _ = sending.await.unwrap();
    }
}

#[tokio::test] // [POOLCORE-060]
async fn a_client_that_sends_all_of_a_refused_body_before_it_reads_learns_why() {
    let mut options = options();
    options.token = Some(Secret::new("right"));
    let server = Server::start(options).await;
    for (token, code) in [("right", "TOO_LARGE"), ("wrong", "UNAUTHORIZED")] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let head = format!(
            "POST /sum HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: 20000000\r\nConnection: close\r\n\r\n"
        );
        let mut text = String::new();
        let exchange = async {
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&vec![b' '; 20_000_000]).await?;
            stream.read_to_string(&mut text).await
        };
        let exchanged = timeout(Duration::from_secs(10), exchange).await;
        exchanged.expect("the answer ends").expect("nothing is cut");
        assert_eq!(Answer::parse(&text).refusal().1, code);
    }
}

#[tokio::test] // [POOLCORE-060]
async fn a_body_that_is_announced_as_too_large_is_refused_before_it_comes() {
    let server = Server::start(options()).await;
    let head = |length: usize, more: &str| {
        format!(
            "POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n"
        )
    };
    for more in ["", "Expect: 100-continue\r\n"] {
        let answer = server.raw(&head(101, more)).await;
        let (status, code, message) = answer.refusal();
        assert_eq!((status, code.as_str()), (413, "TOO_LARGE"), "{more}");
        assert_eq!(
            message,
            "the body of 101 B is larger than this daemon accepts: at most 100 B"
        );
        assert_eq!(answer.headers["connection"], "close");
    }
    // A client that asks for permission but sends without waiting still gets the answer.
    let body = vec![b' '; 12_000_000];
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let mut text = String::new();
    let exchange = async {
        let head = head(body.len(), "Expect: 100-continue\r\n");
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await?;
        stream.read_to_string(&mut text).await
    };
    let exchanged = timeout(Duration::from_secs(20), exchange).await;
    exchanged.expect("the answer ends").expect("nothing is cut");
    assert_eq!(Answer::parse(&text).refusal().1, "TOO_LARGE");

    // The daemon asks for a body that fits.
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let head = head(13, "Expect: 100-continue\r\nConnection: close\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut line = [0; 25];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(br#"{"a":1,"b":2}"#).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(Answer::parse(&text).body, "3");
}

#[tokio::test] // [POOLCORE-060]
async fn a_refused_body_without_end_is_cut_off() {
    let server = Server::start(options()).await;
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let head = "POST /sum HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let endless = async {
        let chunk = vec![b' '; 1 << 20];
        while stream.write_all(&chunk).await.is_ok() {}
    };
    let cut = timeout(Duration::from_secs(30), endless).await;
    cut.expect("the daemon stops reading");
}

#[tokio::test] // [POOLCORE-064]
async fn huge_headers_are_refused() {
    let server = Server::start(options()).await;
    assert_eq!(
        server
            .send(format!("GET /health\nX-Big: {}", "x".repeat(30_000)), "")
            .await
            .status,
        200
    );
    assert_eq!(
        server
            .send(format!("GET /health\nX-Big: {}", "x".repeat(300_000)), "")
            .await
            .status,
        431
    );
}

#[tokio::test] // [POOLCORE-064]
async fn slow_headers_are_cut_off() {
    let server = Server::start(ServiceOptions {
        header_timeout: Duration::from_millis(200),
        ..options()
    })
    .await;
    let begun = Instant::now();
    let answer = server.raw("GET /health HTTP/1.1\r\nHost: loc").await;
    assert!(
        answer.status != 200 && begun.elapsed() < Duration::from_secs(5),
        "{answer:?}"
    );
}

#[tokio::test] // [POOLCORE-069]
async fn a_body_that_trickles_is_cut_off_and_an_answer_that_does_is_not() {
    let server = Server::start(ServiceOptions {
        body_timeout: Duration::from_millis(300),
        ..options()
    })
    .await;
    let mut events = open_stream(&server).await;
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let head = format!(
        "POST /sum HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n",
        server.addr
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    // Often enough that a timeout between bytes would never fire.
    let trickle = tokio::spawn(async move {
        while writing.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut text = Vec::new();
    let _ = timeout(Duration::from_secs(20), reading.read_to_end(&mut text))
        .await
        .expect("the connection is cut off");
    trickle.abort();
    let answer = Answer::parse(&String::from_utf8(text).unwrap());
    assert_eq!(
        answer.refusal(),
        (
            408,
            "REQUEST_TIMEOUT".into(),
            "the body did not arrive within 300ms".into()
        )
    );
    // The stream is older than the time limit, and still open.
    let more = timeout(Duration::from_millis(50), events.read_u8()).await;
    assert!(more.is_err(), "{more:?}");
}
