//! Recordings: whoever reads `GET /v2/scheduler/trace` gets a trace of what the scheduler sees and decides, for as long as
//! it reads. Nothing is kept here: a recording leaves no file on this host, and costs nothing while nobody reads.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use orchestrator_core::decide::Decision;
use orchestrator_core::scheduler::Snapshot;
use orchestrator_core::trace::{End, EndReason, Header, Lease, Line, Recorder};
use tokio::sync::mpsc;

/// Passes that may wait for a reader before it counts as too slow.
const BEHIND: usize = 1024;
/// Most recordings at once.
const MOST: usize = 4;

/// The recordings under way.
#[derive(Debug, Default)]
pub struct Recordings {
    tapes: Mutex<Vec<Running>>,
}

#[derive(Debug)]
struct Running {
    recorder: Recorder,
    lines: mpsc::Sender<Bytes>,
}

/// What a reader gets.
#[derive(Debug)]
pub struct Tape {
    lines: mpsc::Receiver<Bytes>,
    passes: u64,
}

impl Recordings {
    fn lock(&self) -> MutexGuard<'_, Vec<Running>> {
        self.tapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are under way.
    pub fn count(&self) -> usize {
        let mut tapes = self.lock();
        tapes.retain(|tape| !tape.lines.is_closed());
        tapes.len()
    }

    /// Begins a recording; `None` where there are as many as there may be.
    pub fn begin(&self, header: Header) -> Option<Tape> {
        let mut tapes = self.lock();
        tapes.retain(|tape| !tape.lines.is_closed());
        if tapes.len() >= MOST {
            return None;
        }
        let (lines, reader) = mpsc::channel(BEHIND);
        lines.try_send(text(&[Line::Trace(header)])?).ok()?;
        tapes.push(Running {
            recorder: Recorder::default(),
            lines,
        });
        Some(Tape {
            lines: reader,
            passes: 0,
        })
    }

    /// Records a pass. A reader that can't keep up loses its recording, and is told.
    pub fn pass(&self, snapshot: &Snapshot, leases: &[Lease], decision: &Decision) {
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
    /// The next piece; `None` where the reader was too slow.
    pub async fn next(&mut self) -> Option<Bytes> {
        let piece = self.lines.recv().await?;
        self.passes += 1;
        Some(piece)
    }

    /// The last line.
    pub fn end(&self, reason: EndReason) -> Option<Bytes> {
        // The first piece was the header.
        let passes = self.passes.saturating_sub(1);
        text(&[Line::End(End { passes, reason })])
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
