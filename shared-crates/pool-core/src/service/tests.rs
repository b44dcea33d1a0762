//! Tests of a service from the client's side: over a socket, with handwritten requests.

use std::collections::HashMap;
use std::convert::Infallible;

use axum::Extension;
use axum::body::Body;
use axum::http::{Method, StatusCode};
use axum::routing::post;
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::service::state_files::{ClaimError, RunFiles};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sum {
    a: u8,
    b: u8,
}

#[derive(Deserialize)]
struct Page {
    limit: u8,
}

fn router() -> Router {
    Router::new()
        .route("/health", get(async || "well"))
        .route(
            "/sum",
            post(async |Json(sum): Json<Sum>| Json(u16::from(sum.a) + u16::from(sum.b))),
        )
        .route(
            "/optional",
            post(async |sum: Option<Json<Sum>>| Json(sum.is_some())),
        )
        .route(
            "/page",
            get(async |Query(page): Query<Page>| Json(page.limit)),
        )
        .route("/item/{n}", get(async |Path(n): Path<u8>| Json(n)))
        .route(
            "/who",
            get(async |Extension(caller): Extension<Caller>| format!("{caller:?}")),
        )
        .route("/full", get(async || full()))
        .route("/panic", get(async || -> String { panic!("as planned") }))
        .route(
            "/events",
            get(async || {
                let first = stream::once(async { Ok::<_, Infallible>("data: first\n\n") });
                let body = Body::from_stream(first.chain(stream::pending()));
                ([("content-type", "text/event-stream")], body)
            }),
        )
}

fn full() -> ServiceError {
    ServiceError::new(
        StatusCode::TOO_MANY_REQUESTS,
        "QUEUE_FULL",
        "the queue is full",
    )
    .hint("wait")
    .retry_after(Duration::from_millis(1500))
}

fn options() -> ServiceOptions {
    ServiceOptions {
        body_limit: 100,
        ..ServiceOptions::new("testd", "1.2.3", 7)
    }
}

struct Server {
    addr: SocketAddr,
    shutdown: Shutdown,
    stopped: JoinHandle<Stopped>,
}

impl Server {
    async fn start(options: ServiceOptions) -> Self {
        Self::with_grace(options, Duration::from_secs(5)).await
    }

    async fn with_grace(options: ServiceOptions, grace: Duration) -> Self {
        let service = Service::bind("127.0.0.1:0".parse().unwrap(), options)
            .await
            .unwrap();
        Self::of(service, grace)
    }

    async fn with_places(places: Places) -> Self {
        let service = Service::bind("127.0.0.1:0".parse().unwrap(), options()).await;
        let service = Service {
            load: Load::new(places),
            ..service.unwrap()
        };
        Self::of(service, Duration::from_secs(5))
    }

    fn of(service: Service, grace: Duration) -> Self {
        let addr = service.local_addr();
        let shutdown = Shutdown::manual();
        let stopped = tokio::spawn(service.serve(router(), shutdown.clone(), grace));
        Self {
            addr,
            shutdown,
            stopped,
        }
    }

    /// Sends one request and reads the answer to its end. Adds the right `Host` unless `head` has one.
    async fn send(&self, head: impl AsRef<str>, body: &str) -> Answer {
        let head = head.as_ref();
        let host = if head.to_lowercase().contains("\nhost:") {
            String::new()
        } else {
            format!("Host: {}\r\n", self.addr)
        };
        let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
        let headers: String = headers
            .lines()
            .map(|header| format!("{header}\r\n"))
            .collect();
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        self.raw(&format!(
            "{line} HTTP/1.1\r\n{host}{headers}{length}Connection: close\r\n\r\n{body}"
        ))
        .await
    }

    async fn raw(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        // The daemon may reset the connection while bytes of the request are unread. The answer before that counts.
        let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut text))
            .await
            .expect("the answer ends");
        Answer::parse(&String::from_utf8(text).unwrap())
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
        let mut lines = head.lines();
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .and_then(|code| code.parse().ok())
            .unwrap_or(0);
        let headers = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        Self {
            status,
            headers: headers.collect(),
            body: body.to_owned(),
        }
    }

    /// Returns the error from the envelope, whose correlation id must match the header.
    fn error(&self) -> Value {
        let envelope: Value = serde_json::from_str(&self.body)
            .unwrap_or_else(|_| panic!("not an envelope: {self:?}"));
        let error = envelope["error"].clone();
        assert_eq!(
            error["correlation_id"].as_str(),
            self.headers.get("x-correlation-id").map(String::as_str),
            "{self:?}"
        );
        error
    }

    fn refusal(&self) -> (u16, String, String) {
        let error = self.error();
        (
            self.status,
            error["code"].as_str().unwrap().to_owned(),
            error["message"].as_str().unwrap().to_owned(),
        )
    }
}

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

#[tokio::test] // [POOLCORE-061]
async fn a_correlation_id_is_kept_if_it_is_one_and_made_otherwise() {
    let server = Server::start(options()).await;
    let echoed = |id: &str| server.send(format!("GET /health\nX-Correlation-Id: {id}"), "");
    assert_eq!(echoed("Run-42").await.headers["x-correlation-id"], "Run-42");
    let longest = "x".repeat(64);
    assert_eq!(echoed(&longest).await.headers["x-correlation-id"], longest);
    for bad in ["a b", "a_b", "é", &"x".repeat(65)] {
        let made = &echoed(bad).await.headers["x-correlation-id"];
        assert!(uuid::Uuid::parse_str(made).is_ok(), "{bad} became {made}");
    }
    let refused = server
        .send("GET /nowhere\nX-Correlation-Id: Run-43", "")
        .await;
    assert_eq!(refused.error()["correlation_id"], "Run-43");
}

#[tokio::test] // [POOLCORE-062]
async fn a_token_opens_what_it_is_for() {
    let scoped = ScopedToken {
        caller: "pool",
        secret: Secret::new("pool-token"),
        opens: |method, path| method == Method::GET && path == "/who",
    };
    let server = Server::start(ServiceOptions {
        token: Some(Secret::new("main-token")),
        scoped_tokens: vec![scoped.clone()],
        ..options()
    })
    .await;
    let who = |token: &str| server.send(format!("GET /who\nAuthorization: Bearer {token}"), "");
    assert_eq!(who("main-token").await.body, "Operator");
    assert_eq!(who("pool-token").await.body, "Scoped(\"pool\")");
    for wrong in ["wrong", "", "main-tokeN", &"x".repeat(5000)] {
        let answer = who(wrong).await;
        assert_eq!(
            (answer.refusal().0, answer.refusal().1.as_str()),
            (401, "UNAUTHORIZED"),
            "{wrong}"
        );
        assert!(
            answer.error()["hint"].is_string() && answer.headers["www-authenticate"] == "Bearer"
        );
    }
    assert_eq!(server.send("GET /who", "").await.status, 401);
    assert_eq!(
        server
            .send("GET /who\nAuthorization: Basic main-token", "")
            .await
            .status,
        401
    );
    // A path that needs no token, and paths that the pool's token does not open.
    assert_eq!(server.send("GET /health", "").await.status, 200);
    assert_eq!(
        server
            .send("GET /page?limit=1\nAuthorization: Bearer pool-token", "")
            .await
            .status,
        401
    );
    assert_eq!(server.send("GET /nowhere", "").await.status, 401);

    let only_scoped = Server::start(ServiceOptions {
        scoped_tokens: vec![scoped],
        ..options()
    })
    .await;
    assert_eq!(only_scoped.send("GET /who", "").await.status, 401);
    assert_eq!(only_scoped.send("GET /page?limit=1", "").await.status, 200);
}

#[tokio::test] // [POOLCORE-063]
async fn foreign_hosts_and_origins_need_a_token() {
    let server = Server::start(ServiceOptions {
        allowed_hosts: vec!["Blep.home.arpa".into()],
        ..options()
    })
    .await;
    let port = server.addr.port();
    for host in [
        "localhost",
        "LOCALHOST:9",
        "127.0.0.1",
        "[::1]:80",
        "blep.home.arpa",
    ] {
        assert_eq!(
            server
                .send(format!("GET /who\nHost: {host}"), "")
                .await
                .body,
            "Anonymous",
            "{host}"
        );
    }
    for host in [
        "evil.example",
        "localhost.evil.example",
        "10.1.2.3",
        "",
        "a b",
    ] {
        let answer = server.send(format!("GET /health\nHost: {host}"), "").await;
        assert_eq!(
            (answer.refusal().0, answer.refusal().1.as_str()),
            (403, "UNKNOWN_HOST"),
            "{host}"
        );
    }
    let from = |origin: &str| {
        server.send(
            format!("GET /who\nHost: 127.0.0.1:{port}\nOrigin: {origin}"),
            "",
        )
    };
    assert_eq!(from(&format!("http://127.0.0.1:{port}")).await.status, 200);
    for origin in [
        "http://evil.example",
        "http://127.0.0.1:1",
        "null",
        "file://",
    ] {
        let answer = from(origin).await;
        assert_eq!(
            (answer.refusal().0, answer.refusal().1.as_str()),
            (403, "FOREIGN_ORIGIN"),
            "{origin}"
        );
    }
    assert_eq!(
        server
            .send("GET /who\nSec-Fetch-Site: cross-site", "")
            .await
            .status,
        403
    );

    let server = Server::start(ServiceOptions {
        token: Some(Secret::new("t")),
        ..options()
    })
    .await;
    let answer = server.send("GET /who\nHost: tunnel.example\nOrigin: http://console.example\nAuthorization: Bearer t", "").await;
    assert_eq!(answer.body, "Operator");
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

#[tokio::test] // [POOLCORE-070]
async fn a_request_names_its_server_once() {
    let token = Secret::new("right");
    let server = Server::start(ServiceOptions {
        token: Some(token),
        ..options()
    })
    .await;
    let addr = server.addr;
    for (line, headers) in [
        ("GET /version", format!("Host: {addr}\r\nHost: {addr}")),
        (
            "GET /version",
            format!("Host: {addr}\r\nHost: evil.example"),
        ),
        ("GET http://evil.example/version", format!("Host: {addr}")),
    ] {
        let request = format!(
            "{line} HTTP/1.1\r\n{headers}\r\nAuthorization: Bearer right\r\nConnection: close\r\n\r\n"
        );
        let (status, code, _) = server.raw(&request).await.refusal();
        assert_eq!(
            (status, code.as_str()),
            (400, "INVALID_REQUEST"),
            "{request}"
        );
    }
    let same = format!("GET http://{addr}/version\nAuthorization: Bearer right");
    assert_eq!(server.send(same, "").await.status, 200);
}

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

/// Opens `/events` and reads its first event.
async fn open_stream(server: &Server) -> TcpStream {
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    stream
        .write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("data: first") {
        assert_ne!(stream.read_buf(&mut text).await.unwrap(), 0);
    }
    stream
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

#[tokio::test] // [POOLCORE-067]
async fn binding_needs_a_token_off_loopback_and_a_free_port() {
    let any = "0.0.0.0:0".parse().unwrap();
    let error = Service::bind(any, options()).await.unwrap_err();
    assert!(matches!(error, BindError::Exposed { .. }) && error.hint().unwrap().contains("token"));
    let open = Service::bind(
        any,
        ServiceOptions {
            token: Some(Secret::new("t")),
            ..options()
        },
    )
    .await
    .unwrap();
    assert_eq!(
        open.url(),
        format!("http://127.0.0.1:{}", open.local_addr().port())
    );

    let taken = Service::bind("127.0.0.1:0".parse().unwrap(), options())
        .await
        .unwrap();
    let error = Service::bind(taken.local_addr(), options())
        .await
        .unwrap_err();
    assert!(matches!(error, BindError::InUse { addr } if addr == taken.local_addr()));
}

#[test] // [POOLCORE-068] [P13]
fn a_state_folder_has_one_daemon() {
    use crate::run_files::{self, PidRecord};
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let files = RunFiles::claim(&state, "testd", "1.2.3").unwrap();
    files.write_addr("0.0.0.0:8080".parse().unwrap()).unwrap();
    assert_eq!(
        run_files::local_url(&state).unwrap(),
        "http://127.0.0.1:8080"
    );
    assert_eq!(PidRecord::read(&state).unwrap().version, "1.2.3");

    let error = RunFiles::claim(&state, "testd", "1.2.3").unwrap_err();
    assert!(
        matches!(error, ClaimError::Held { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains(&format!("(pid {})", std::process::id()))
            && error.hint().is_some()
    );

    drop(files);
    assert_eq!(run_files::local_url(&state), None);
    assert!(PidRecord::read(&state).is_none() && state.join("lock").exists());
    // A killed daemon leaves its files behind. The next daemon must ignore them.
    std::fs::write(state.join("addr"), "http://127.0.0.1:1").unwrap();
    let files = RunFiles::claim(&state, "testd", "1.2.4").unwrap();
    assert_eq!(run_files::local_url(&state), None);

    // After a takeover, the old daemon's end leaves the new daemon's files alone, and a third daemon is refused.
    let taken = RunFiles::take_over(&state, "1.2.5").unwrap();
    taken.write_addr("127.0.0.1:9".parse().unwrap()).unwrap();
    drop(files);
    assert_eq!(run_files::local_url(&state).unwrap(), "http://127.0.0.1:9");
    assert_eq!(PidRecord::read(&state).unwrap().version, "1.2.5");
    assert!(RunFiles::claim(&state, "testd", "1.2.6").is_err());
    drop(taken);
    RunFiles::claim(&state, "testd", "1.2.6").unwrap();
}
