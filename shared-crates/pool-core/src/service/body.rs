//! Bounds on a request's body: one that trickles holds its connection no longer than its time, and what is left of one
//! that nobody wants is read and thrown away, so that its sender gets to the answer.

use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::runtime::Handle;

use super::linger::Unread;
use crate::clock::Patience;

/// How much of a body is thrown away at most, and for how long. A connection that is closed while its sender still writes
/// is reset, and the answer that says why is lost on the way; one that sends without end is reset all the same.
const DISCARD: (usize, Duration) = (64 * 1024 * 1024, Duration::from_secs(5));

/// The body was not whole in time.
#[derive(Debug, thiserror::Error)]
#[error("the body did not arrive within {} s", .0.as_secs_f32())]
pub(super) struct BodyTimeout(pub(super) Duration);

impl BodyTimeout {
    /// Finds it among the causes of what a reader of the body was told.
    pub(super) fn among<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        std::iter::successors(Some(error), |cause| (*cause).source())
            .find_map(|cause| cause.downcast_ref())
    }
}

/// Gives the request's body at most `limit` from now on. Answers, event streams among them, are not concerned.
pub(super) async fn limit_time(
    State(limit): State<Duration>,
    request: Request,
    next: Next,
) -> Response {
    // Who asks before it sends has sent nothing, and sends nothing after a refusal. To read the body would be to ask for
    // it; so what comes of it unasked is taken when the connection is closed.
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
                limit,
                over: Patience::new(limit),
            })
        }
    });
    next.run(request).await
}

/// What becomes of a body that nobody read to its end.
enum Rest {
    /// It is read and thrown away.
    Discarded,
    /// Nothing of it should be here yet.
    ToCome(Unread),
}

struct Timed {
    /// `None` once it has come to its end.
    inner: Option<Body>,
    if_refused: Rest,
    limit: Duration,
    over: Patience,
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // The clock is looked at first: bytes that keep coming must not put it off.
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

/// Reads what is left of a body that was refused, beside the answer.
async fn discard(mut body: Body) {
    let (limit, time) = DISCARD;
    let all = async {
        let mut left = limit;
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(bytes) else {
                break;
            };
            left = rest;
        }
    };
    let _ = tokio::time::timeout(time, all).await;
}
