//! Remarks on a batch in which no job runs: the progress bar does not move, and a remark says why.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use orchestrator_core::api::events::TaskEvent;
use pool_core::kit::terminal::sanitize;

use super::super::situation::Reasons;
use crate::http_client::Item;

/// Pause between two readings of the board.
pub const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Time after which a standstill is reported.
const WORTH_A_REMARK: Duration = Duration::from_secs(1);

/// The lines of the file with unfinished jobs, each with the reason why its job does not run.
#[derive(Debug, Default)]
pub struct Board(Mutex<BTreeMap<usize, Option<Wait>>>);

#[derive(Debug, Clone)]
struct Wait {
    reason: String,
    text: String,
}

impl Board {
    /// Returns the place of a line, held until it is dropped.
    pub fn place(&self, line: usize) -> Place<'_> {
        self.lock().insert(line, None);
        Place { board: self, line }
    }

    /// Returns the reason of the first line, if none of the lines runs.
    fn standstill(&self) -> Option<Wait> {
        let places = self.lock();
        let waits: Option<Vec<_>> = places.values().map(Option::as_ref).collect();
        waits?.first().map(|wait| (*wait).clone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Option<Wait>>> {
        // A panic leaves the board consistent: every change is a single call.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one line on the board.
#[derive(Debug)]
pub struct Place<'a> {
    board: &'a Board,
    line: usize,
}

impl Place<'_> {
    /// Records why the line's job does not run.
    pub fn waits(&self, reason: &str, text: String) {
        let wait = Wait {
            reason: reason.to_owned(),
            text,
        };
        self.board.lock().insert(self.line, Some(wait));
    }

    /// Updates the reason from an item of the job's feed.
    pub fn take(&self, item: &Item) {
        match item {
            Item::Event(_, TaskEvent::Waiting(waiting)) => {
                let explanation = &waiting.explanation;
                let text = format!("{} ({})", explanation.message, explanation.hint);
                self.waits(&format!("{:?}", explanation.reason), text);
            }
            Item::Event(
                _,
                TaskEvent::Started(_)
                | TaskEvent::Attempt(_)
                | TaskEvent::Token(_)
                | TaskEvent::Metrics(_)
                | TaskEvent::End(_)
                | TaskEvent::Error(_),
            )
            | Item::Back => {
                self.board.lock().insert(self.line, None);
            }
            Item::Lost(why) => self.waits("lost", format!("{why}; waiting for the orchestrator")),
            Item::Event(
                _,
                TaskEvent::Queued(_) | TaskEvent::Lagged(_) | TaskEvent::Shutdown(_),
            ) => {}
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.board.lock().remove(&self.line);
    }
}

/// The remarks about a standstill: one for each change of the reason.
#[derive(Debug, Default)]
pub struct Standstill(Reasons);

impl Standstill {
    /// Returns the remark that is due.
    pub fn look(&mut self, board: &Board, now: Instant) -> Option<String> {
        match board.standstill() {
            Some(wait) => {
                let text = format!("nothing runs: {}", sanitize::clean(&wait.text));
                self.0.note(&wait.reason, text, WORTH_A_REMARK, now);
                self.0.take_due(now)
            }
            None => {
                self.0.forget();
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // [LLORCH-075]
    #[test]
    fn a_standstill_is_told_once_and_a_batch_that_runs_is_not() {
        let board = Board::default();
        let mut standstill = Standstill::default();
        let start = Instant::now();
        let mut look = |ms| standstill.look(&board, start + Duration::from_millis(ms));
        assert_eq!(look(0), None);
        let (first, second) = (board.place(1), board.place(2));
        first.waits("NoPool", "no pool".into());
        assert_eq!((look(0), look(2_000)), (None, None), "the second runs");
        second.waits("NoPool", "no pool".into());
        assert_eq!((look(3_000), look(3_900)), (None, None));
        assert_eq!(look(4_000), Some("nothing runs: no pool".into()));
        assert_eq!(look(5_000), None);
        first.waits("MemoryShort", "no memory".into());
        assert_eq!(look(6_000), None);
        assert_eq!(look(7_000), Some("nothing runs: no memory".into()));
        drop(second);
        drop(first);
        assert_eq!(look(9_000), None);
    }
}
