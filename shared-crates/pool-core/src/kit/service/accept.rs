//! The accept loop, with limits on the number of connections, the time for headers and the time to stop.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, StatusCode};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::capacity::{Load, Want};
use super::linger::{Lingering, Unread};
use super::{ServiceError, ServiceOptions, Shutdown, codes, correlation};

/// Time limit for the headers on a spare connection, so that silent connections hold their places only briefly.
const SPARE_HEAD: Duration = Duration::from_secs(2);
/// The same limit while other connections wait. An active client sends its request right after connecting.
const PRESSED_HEAD: Duration = Duration::from_millis(250);
/// Interval at which a silent connection checks whether others are waiting for its place.
const LOOK: Duration = Duration::from_millis(50);
/// Pause after the system failed to accept a connection, for example for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Outcome of a service's stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Number of connections cut at the end of the grace period.
    pub cut: usize,
}

pub(super) async fn run(
    listener: TcpListener,
    app: Router,
    options: ServiceOptions,
    load: Load,
    shutdown: Shutdown,
    grace: Duration,
) -> Stopped {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_buf_size(options.header_limit);
    let mut brief = http.clone();
    brief
        .keep_alive(false)
        .header_read_timeout(options.header_timeout.min(SPARE_HEAD));
    let spare = Spare {
        http: brief,
        app: app.clone(),
        is_control: options.is_control,
        load: load.clone(),
        shutdown: shutdown.clone(),
    };
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut requested = pin!(shutdown.requested());
    let mut failing = false;

    loop {
        let accepted = tokio::select! {
            () = &mut requested => break,
            // Only this loop takes places, so a place that is free now is still free when a connection arrives.
            accepted = async {
                load.a_place().await;
                listener.accept().await
            } => accepted,
            // Reap finished tasks, so that the set does not outgrow the open connections.
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_about_one_connection(&error) => continue,
            Err(error) => {
                // Log only the first of consecutive failures.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "could not accept a connection");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        failing = false;
        // Events are small and must be sent immediately.
        let _ = stream.set_nodelay(true);
        if let Some(place) = load.connection() {
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
                    // A request that has arrived completely is answered, so poll the connection first.
                    biased;
                    outcome = connection => if let Err(error) = outcome {
                        tracing::debug!(%error, "a connection ended with an error");
                    },
                    () = stop_before(&shutdown, &asked) => {}
                }
                drop(place);
            });
        } else if let Some(place) = load.spare() {
            connections.spawn(spare.clone().serve(stream, place));
        }
    }

    // New connections must not queue up for a daemon that is about to end.
    drop(listener);
    let ended = async {
        graceful.shutdown().await;
        // Let refused clients read their answers.
        load.spare_empty().await;
    };
    let finished = tokio::time::timeout(grace, ended).await.is_ok();
    let cut = if finished { 0 } else { load.connections() };
    if cut > 0 {
        tracing::warn!(connections = cut, "grace period over; cutting connections");
    }
    connections.shutdown().await;
    Stopped { cut }
}

/// Returns at the stop if no request has arrived on the connection by then; otherwise never returns.
async fn stop_before(shutdown: &Shutdown, asked: &AtomicBool) {
    shutdown.requested().await;
    if asked.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

/// Server for connections beyond the limit, which take the spare places.
#[derive(Clone)]
struct Spare {
    http: http1::Builder,
    app: Router,
    is_control: fn(&Method, &str) -> bool,
    load: Load,
    shutdown: Shutdown,
}

impl Spare {
    /// Serves one request if it belongs to the control path, otherwise refuses it.
    async fn serve(self, stream: TcpStream, _place: OwnedSemaphorePermit) {
        let asked = AtomicBool::new(false);
        let unread = Unread::default();
        let service = service_fn(|mut request: hyper::Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            let is_control = (self.is_control)(request.method(), request.uri().path());
            let has_body = !request.body().is_end_stream();
            let (app, load, unread) = (self.app.clone(), self.load.clone(), unread.clone());
            async move {
                if is_control {
                    request.extensions_mut().insert(unread);
                    return app.oneshot(request).await;
                }
                if has_body {
                    // The body is not read and may still be arriving.
                    unread.expect();
                }
                load.refuse(Want::Connections);
                Ok::<_, Infallible>(refusal())
            }
        });
        let lingering = TokioIo::new(Lingering::new(stream, unread.clone()));
        let connection = self.http.serve_connection(lingering, service);
        tokio::select! {
            biased;
            _ = connection => {}
            () = stop_before(&self.shutdown, &asked) => {}
            () = pressed(&self.load, &asked) => {}
        }
    }
}

/// Returns when a connection without a request keeps others waiting; never returns once a request has arrived.
async fn pressed(load: &Load, asked: &AtomicBool) {
    tokio::time::sleep(PRESSED_HEAD).await;
    while !asked.load(Ordering::Relaxed) {
        if load.is_pressed() {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
    std::future::pending::<()>().await;
}

fn refusal() -> hyper::Response<Body> {
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
        .body(Body::from(body));
    response.unwrap_or_default()
}

/// Returns whether the error concerns only the failed connection rather than the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}
