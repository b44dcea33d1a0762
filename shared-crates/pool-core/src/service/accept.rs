//! The accept loop: bounded connections, bounded time for headers, and an end in bounded time.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::{ServiceError, ServiceOptions, Shutdown, codes, correlation};

/// Connections that may be told "too many" at one time; beyond them a connection is closed without a word.
const REFUSALS: usize = 32;
/// How long the system is left alone after it refused a connection for want of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a service ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Connections that were still open when the grace was over, and were cut.
    pub cut: usize,
}

pub(super) async fn run(
    listener: TcpListener,
    app: Router,
    options: ServiceOptions,
    shutdown: Shutdown,
    grace: Duration,
) -> Stopped {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_buf_size(options.header_limit);
    let places = Arc::new(Semaphore::new(options.max_connections));
    let refusals = Arc::new(Semaphore::new(REFUSALS));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut requested = pin!(shutdown.requested());

    loop {
        let accepted = tokio::select! {
            () = &mut requested => break,
            accepted = listener.accept() => accepted,
            // Keeps the set as small as the number of open connections.
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_about_one_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Events are small and must leave at once.
        let _ = stream.set_nodelay(true);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            let app = app.clone();
            let asked = Arc::new(AtomicBool::new(false));
            let service = service_fn({
                let asked = Arc::clone(&asked);
                move |request: hyper::Request<Incoming>| {
                    asked.store(true, Ordering::Relaxed);
                    app.clone().oneshot(request)
                }
            });
            let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
            let shutdown = shutdown.clone();
            connections.spawn(async move {
                let nothing_asked_yet = async {
                    shutdown.requested().await;
                    if asked.load(Ordering::Relaxed) {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    // What has arrived whole counts as asked.
                    biased;
                    outcome = connection => if let Err(error) = outcome {
                        tracing::debug!(%error, "a connection ended with an error");
                    },
                    () = nothing_asked_yet => {}
                }
                drop(place);
            });
        } else if let Ok(place) = Arc::clone(&refusals).try_acquire_owned() {
            tracing::warn!(limit = options.max_connections, "too many connections");
            connections.spawn(refuse(http.clone(), stream, place));
        }
    }

    // Nobody new may queue up behind a daemon that is about to go.
    drop(listener);
    let finished = tokio::time::timeout(grace, graceful.shutdown())
        .await
        .is_ok();
    let cut = if finished {
        0
    } else {
        options.max_connections - places.available_permits()
    };
    if cut > 0 {
        tracing::warn!(connections = cut, "the grace is over, cutting connections");
    }
    connections.shutdown().await;
    Stopped { cut }
}

/// Answers one request of a connection that is one too many.
async fn refuse(mut http: http1::Builder, stream: TcpStream, _place: OwnedSemaphorePermit) {
    let service = service_fn(|_: hyper::Request<Incoming>| async {
        let envelope = ServiceError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            codes::OVERLOADED,
            "this daemon has too many connections open",
        )
        .retry_after(Duration::from_secs(1))
        .envelope();
        let body = serde_json::to_vec(&envelope).unwrap_or_default();
        let response = hyper::Response::builder()
            .status(StatusCode::SERVICE_UNAVAILABLE)
            .header("content-type", "application/json")
            .header("retry-after", "1")
            .header(correlation::HEADER, &envelope.error.correlation_id)
            .body(Full::new(Bytes::from(body)));
        Ok::<_, Infallible>(response.unwrap_or_default())
    });
    let _ = http
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Whether the error says something about the one connection that failed, rather than about the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}
