//! Tests of a service from the client's side: over a socket, with handwritten requests.

mod access;
mod bodies;
mod capacity;
mod start;
mod stop;

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
use crate::kit::service::state_files::{ClaimError, RunFiles};

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
