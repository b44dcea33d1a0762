//! A connection whose close lets the client read the last answer.
//!
//! The system resets a connection that is closed while bytes from the client are unread. A reset discards everything that
//! the client has not read yet, including the answer that explains the refusal.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// Most bytes read and discarded after the last answer. A client that sends more is reset.
const LINGER_BYTES: usize = 16 * 1024 * 1024;
/// Time limit for reading them. A client that takes longer is reset.
const LINGER_TIME: Duration = Duration::from_secs(2);

/// A mark that more bytes may arrive on a connection than are read. An extension of the connection's requests.
#[derive(Debug, Clone, Default)]
pub(super) struct Unread(Arc<AtomicBool>);

impl Unread {
    /// Marks that bytes may be unread when the connection is closed.
    pub(super) fn expect(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A connection that, if [`Unread`] is set, reads and discards what the client still sends after the last answer, until the
/// client closes its side too.
#[derive(Debug)]
pub(super) struct Lingering {
    stream: TcpStream,
    unread: Unread,
    left: usize,
    /// Time limit, which starts after the last answer.
    over: Option<Pin<Box<Sleep>>>,
}

impl Lingering {
    pub(super) fn new(stream: TcpStream, unread: Unread) -> Self {
        Self {
            stream,
            unread,
            left: LINGER_BYTES,
            over: None,
        }
    }
}

impl AsyncRead for Lingering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let over = match &mut this.over {
            Some(over) => over,
            None => {
                ready!(Pin::new(&mut this.stream).poll_shutdown(context))?;
                if !this.unread.0.load(Ordering::Relaxed) {
                    return Poll::Ready(Ok(()));
                }
                this.over.insert(Box::pin(tokio::time::sleep(LINGER_TIME)))
            }
        };
        let mut space = [0; 8 * 1024];
        while over.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut space);
            let read = ready!(Pin::new(&mut this.stream).poll_read(context, &mut buffer));
            let bytes = buffer.filled().len();
            match this.left.checked_sub(bytes) {
                Some(left) if read.is_ok() && bytes > 0 => this.left = left,
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
