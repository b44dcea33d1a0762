//! Recordings: a reader of `GET /v2/scheduler/trace` gets a trace of the scheduler's input and decisions for as long as it
//! reads. Nothing is stored: a recording leaves no file on this host, and costs nothing without readers.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use orchestrator_core::decide::Decision;
use orchestrator_core::scheduler::Snapshot;
use orchestrator_core::trace::{EndReason, Header, HeldSlot, Line, Recorder, TraceEnd};
use tokio::sync::mpsc;

/// Number of passes buffered for a reader. A reader further behind is too slow.
const BEHIND: usize = 1024;
/// Maximum number of recordings at once.
const MOST: usize = 4;

/// The open recordings, at most `MOST`.
#[derive(Debug, Default)]
pub struct Recordings {
    tapes: Mutex<Vec<ActiveRecording>>,
}

#[derive(Debug)]
struct ActiveRecording {
    recorder: Recorder,
    lines: mpsc::Sender<Bytes>,
}

/// A reader's end of a recording.
#[derive(Debug)]
pub struct Tape {
    lines: mpsc::Receiver<Bytes>,
    passes: u64,
}

impl Recordings {
    fn lock(&self) -> MutexGuard<'_, Vec<ActiveRecording>> {
        self.tapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the number of open recordings.
    pub fn count(&self) -> usize {
        let mut tapes = self.lock();
        tapes.retain(|tape| !tape.lines.is_closed());
        tapes.len()
    }

    /// Begins a recording. Returns `None` at the limit.
    pub fn begin(&self, header: Header) -> Option<Tape> {
        let mut tapes = self.lock();
        tapes.retain(|tape| !tape.lines.is_closed());
        if tapes.len() >= MOST {
            return None;
        }
        let (lines, reader) = mpsc::channel(BEHIND);
        lines.try_send(text(&[Line::Trace(header)])?).ok()?;
        tapes.push(ActiveRecording {
            recorder: Recorder::default(),
            lines,
        });
        Some(Tape {
            lines: reader,
            passes: 0,
        })
    }

    /// Records a pass. A reader that can't keep up loses its recording, and its trace says so.
    pub fn pass(&self, snapshot: &Snapshot, leases: &[HeldSlot], decision: &Decision) {
        let mut tapes = self.lock();
        tapes.retain(|tape| !tape.lines.is_closed());
        if tapes.is_empty() {
            return;
        }
        tapes.retain_mut(|tape| {
            let lines = tape.recorder.pass(
                snapshot,
                leases,
                &decision.plan,
                decision.by,
                decision.script.as_deref(),
            );
            let lines = lines.ok().and_then(|lines| text(&lines));
            lines.is_some_and(|lines| tape.lines.try_send(lines).is_ok())
        });
    }
}

impl Tape {
    /// Returns the next piece of the trace; `None` if the reader was too slow.
    pub async fn next(&mut self) -> Option<Bytes> {
        let piece = self.lines.recv().await?;
        self.passes += 1;
        Some(piece)
    }

    /// Returns the trace's last line.
    pub fn end(&self, reason: EndReason) -> Option<Bytes> {
        // The first piece was the header.
        let passes = self.passes.saturating_sub(1);
        text(&[Line::End(TraceEnd { passes, reason })])
    }
}

fn text(lines: &[Line]) -> Option<Bytes> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line).ok()?;
        text.push(b'\n');
    }
    Some(text.into())
}
