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

use super::linger::{Lingering, Unread};
use super::{ServiceError, ServiceOptions, Shutdown, codes, correlation};

/// Connections that may be told "too many" at one time. Those beyond them wait in the system's queue, untouched: who
/// speaks gets an answer when a place is free, and a connection that is taken and dropped would be reset.
const REFUSALS: u32 = 128;
/// How long a connection that is one too many may take to ask for something: silent ones hold their places briefly.
const REFUSAL_HEAD: Duration = Duration::from_secs(2);
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
    let mut refusing = http.clone();
    refusing
        .keep_alive(false)
        .header_read_timeout(options.header_timeout.min(REFUSAL_HEAD));
    let places = Arc::new(Semaphore::new(options.max_connections));
    let refusals = Arc::new(Semaphore::new(REFUSALS as usize));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut requested = pin!(shutdown.requested());

    loop {
        let accepted = tokio::select! {
            () = &mut requested => break,
            // Only here are places taken, so one that was free is free still when somebody comes.
            accepted = async {
                a_place(&places, &refusals).await;
                listener.accept().await
            } => accepted,
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
            let unread = Unread::default();
            let service = service_fn({
                let (asked, unread) = (Arc::clone(&asked), unread.clone());
                move |mut request: hyper::Request<Incoming>| {
                    asked.store(true, Ordering::Relaxed);
                    request.extensions_mut().insert(unread.clone());
                    app.clone().oneshot(request)
                }
            });
            let stream = TokioIo::new(Lingering::new(stream, unread));
            let connection = graceful.watch(http.serve_connection(stream, service));
            let shutdown = shutdown.clone();
            connections.spawn(async move {
                tokio::select! {
                    // What has arrived whole counts as asked.
                    biased;
                    outcome = connection => if let Err(error) = outcome {
                        tracing::debug!(%error, "a connection ended with an error");
                    },
                    () = stop_before(&shutdown, &asked) => {}
                }
                drop(place);
            });
        } else if let Ok(place) = Arc::clone(&refusals).try_acquire_owned() {
            // Once for a flood, and not for each of its connections.
            if refusals.available_permits() + 1 == REFUSALS as usize {
                tracing::warn!(limit = options.max_connections, "too many connections");
            }
            connections.spawn(refuse(refusing.clone(), stream, shutdown.clone(), place));
        }
    }

    // Nobody new may queue up behind a daemon that is about to go.
    drop(listener);
    let ended = async {
        graceful.shutdown().await;
        // Who is being refused gets to read it.
        let _ = refusals.acquire_many(REFUSALS).await;
    };
    let finished = tokio::time::timeout(grace, ended).await.is_ok();
    let cut = if finished {
        0
    } else {
        let seats = options.max_connections + REFUSALS as usize;
        seats - places.available_permits() - refusals.available_permits()
    };
    if cut > 0 {
        tracing::warn!(connections = cut, "the grace is over, cutting connections");
    }
    connections.shutdown().await;
    Stopped { cut }
}

/// Returns when somebody who comes can be served, or at least refused.
async fn a_place(places: &Semaphore, refusals: &Semaphore) {
    tokio::select! {
        biased;
        _ = places.acquire() => {}
        _ = refusals.acquire() => {}
    }
}

/// Returns at the stop, if nothing was asked on a connection by then.
async fn stop_before(shutdown: &Shutdown, asked: &AtomicBool) {
    shutdown.requested().await;
    if asked.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

/// Answers one request of a connection that is one too many.
async fn refuse(
    http: http1::Builder,
    stream: TcpStream,
    shutdown: Shutdown,
    _place: OwnedSemaphorePermit,
) {
    let asked = AtomicBool::new(false);
    let service = service_fn(|_: hyper::Request<Incoming>| async {
        asked.store(true, Ordering::Relaxed);
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
    // Its body is not read, and may be on its way.
    let unread = Unread::default();
    unread.expect();
    let stream = TokioIo::new(Lingering::new(stream, unread));
    let connection = http.serve_connection(stream, service);
    tokio::select! {
        biased;
        _ = connection => {}
        () = stop_before(&shutdown, &asked) => {}
    }
}

/// Whether the error says something about the one connection that failed, rather than about the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}
