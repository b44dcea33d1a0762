//! Limits on request bodies. A body that trickles in is cut off after a time limit. The rest of a body that no handler
//! reads is discarded, so that its sender receives the answer. All bodies together stay within a memory limit.

use std::error::Error;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::Method;
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

use super::capacity::{Load, Want};
use super::linger::Unread;
use crate::kit::clock::Patience;
use crate::kit::units::human_duration;

/// Most bytes of a refused body that are read and discarded. Closing a connection while its client still sends resets it, and the
/// client loses the answer. A client that sends more is reset anyway.
const DISCARD_BYTES: usize = 64 * 1024 * 1024;
/// Time limit for reading them.
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Most bytes of a control-path body that is accepted regardless of the memory that other bodies hold.
const SMALL: u64 = 256 << 10;

/// A body that was not complete within this time limit.
#[derive(Debug, thiserror::Error)]
#[error("the body did not arrive within {}", human_duration(*.0))]
pub(super) struct BodyTimeout(pub(super) Duration);

impl BodyTimeout {
    /// Returns this error if it is `error` or among its causes.
    pub(super) fn among<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        std::iter::successors(Some(error), |cause| (*cause).source())
            .find_map(|cause| cause.downcast_ref())
    }
}

/// A body for which no memory is left, because other bodies hold it.
#[derive(Debug, thiserror::Error)]
#[error("this daemon holds too many request bodies at once")]
pub(super) struct BodiesFull;

impl BodiesFull {
    /// Returns whether this error is `error` or among its causes.
    pub(super) fn is_among(error: &(dyn Error + 'static)) -> bool {
        std::iter::successors(Some(error), |cause| (*cause).source())
            .any(|cause| cause.is::<Self>())
    }
}

/// Limits of a service on bodies.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    /// Time limit for a body.
    pub time: Duration,
    /// The memory shared by all bodies.
    pub load: Load,
    /// Test for requests whose small bodies take none of that memory: heartbeats must get through.
    pub is_control: fn(&Method, &str) -> bool,
}

/// Memory reserved for one body, released when the request is answered.
#[derive(Debug, Clone)]
struct Room {
    /// `None` for a body that is exempt from the limit.
    load: Option<Load>,
    taken: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

impl Room {
    fn take(&self, bytes: usize) -> Result<(), BodiesFull> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Some(load) = &self.load else {
            return Ok(());
        };
        let Some(more) = load.body(bytes) else {
            load.refuse(Want::Bodies);
            return Err(BodiesFull);
        };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *taken {
            Some(permit) => permit.merge(more),
            None => *taken = Some(more),
        }
        Ok(())
    }
}

/// Applies the time limit to the request's body, starting now, and the memory limit. Answers, including event streams, are
/// not limited.
pub(super) async fn limit(State(bound): State<Bound>, request: Request, next: Next) -> Response {
    let Bound {
        time,
        load,
        is_control,
    } = bound;
    let small = request
        .body()
        .size_hint()
        .upper()
        .is_some_and(|bytes| bytes <= SMALL);
    let exempt = small && is_control(request.method(), request.uri().path());
    let room = Room {
        load: (!exempt).then_some(load),
        taken: Arc::default(),
    };
    // A client that sends `Expect: 100-continue` waits for permission, so a refused body should never arrive, and reading
    // it would grant the permission. A client that sends the body anyway is dealt with when the connection closes.
    let waits = request.headers().contains_key(EXPECT);
    let unread = request.extensions().get::<Unread>().cloned();
    let request = request.map(|body| {
        if body.is_end_stream() {
            body
        } else {
            Body::new(Timed {
                inner: Some(body),
                if_refused: match (waits, unread) {
                    (true, Some(unread)) => Rest::ToCome(unread),
                    _ => Rest::Discarded,
                },
                limit: time,
                over: Patience::new(time),
                room: room.clone(),
            })
        }
    });
    let response = next.run(request).await;
    // The handler may hold the bytes until it has answered.
    drop(room);
    response
}

/// Treatment of a body that was not read to its end.
enum Rest {
    /// Read and discard the rest.
    Discarded,
    /// Leave the rest to the connection's end: the client was not asked to send it.
    ToCome(Unread),
}

struct Timed {
    /// `None` once the body has ended.
    inner: Option<Body>,
    if_refused: Rest,
    limit: Duration,
    over: Patience,
    room: Room,
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // Check the time limit first, because bytes that keep coming must not postpone it.
        if Pin::new(&mut self.over).poll(context).is_ready() {
            self.inner = None;
            return Poll::Ready(Some(Err(BodyTimeout(self.limit).into())));
        }
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(inner).poll_frame(context));
        if !matches!(frame, Some(Ok(_))) {
            self.inner = None;
        }
        let bytes = match &frame {
            Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
            _ => 0,
        };
        if let Err(full) = self.room.take(bytes) {
            return Poll::Ready(Some(Err(full.into())));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let ended = || SizeHint::with_exact(0);
        self.inner.as_ref().map_or_else(ended, HttpBody::size_hint)
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        let rest = self.inner.take().filter(|rest| !rest.is_end_stream());
        match (rest, &self.if_refused, Handle::try_current()) {
            (Some(_), Rest::ToCome(unread), _) => unread.expect(),
            (Some(rest), Rest::Discarded, Ok(runtime)) => {
                runtime.spawn(discard(rest));
            }
            _ => {}
        }
    }
}

/// Reads and discards the rest of a refused body, concurrently with the answer.
async fn discard(mut body: Body) {
    let all = async {
        let mut left = DISCARD_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(bytes) else {
                break;
            };
            left = rest;
        }
    };
    let _ = tokio::time::timeout(DISCARD_TIME, all).await;
}
