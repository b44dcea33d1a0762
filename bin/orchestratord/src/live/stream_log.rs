//! The in-memory tail of a job's event log, where readers wait for new events.
//!
//! Readers pull: each has a place in the log and takes what follows it. A reader that doesn't pull costs nothing and delays no
//! other reader; once the events at its place have left the memory, it gets [`Read::Behind`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use orchestrator_core::api::events::{EventId, TaskEvent};
use pool_core::api::worker::Origin;
use pool_core::kit::sse::SseEvent as _;
use tokio::sync::watch;

use crate::state::LogEntry;

/// Logged events that stay in memory: how far a live reader may fall behind.
const KEPT: usize = 1024;

/// The in-memory tail of a job's event log. Only [`JobLog`](super::JobLog) adds to it.
#[derive(Debug)]
pub(super) struct StreamLog {
    state: Mutex<StreamLogState>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct StreamLogState {
    /// Contiguous, up to the newest event. Contains every event that is not in the database yet.
    recent: VecDeque<Arc<LogEntry>>,
    /// The newest event that has left `recent`.
    evicted: EventId,
    /// Id of the newest event, in memory or not.
    last: EventId,
    /// True if readers may have seen tokens before a restart of the daemon that the log lacks. Until those tokens have come
    /// again, under the same ids, no other event may take these ids.
    seen_more: bool,
    /// Sequence number of the newest event in the database.
    logged: u64,
    /// The newest event of each momentary kind, with its publication number.
    momentary: Vec<(u64, TaskEvent)>,
    published: u64,
    ended: bool,
    /// True if the log is closed without an end.
    closed: bool,
}

/// Result of a reader's look at the log.
#[derive(Debug)]
pub enum Read {
    /// Events after the reader's place, in order.
    Events(Vec<Arc<LogEntry>>),
    /// No logged event, only momentary ones, and the publication number to pass next time.
    Momentary(Vec<TaskEvent>, u64),
    /// The events after the reader's place have left the memory; holds their number.
    Behind(u64),
    /// The end of the log, with the job's last event for a reader whose place is ahead of the log.
    Over(Option<Arc<LogEntry>>),
}

impl StreamLog {
    /// Returns the tail of a log that ends at `last`.
    pub(super) fn new(last: EventId, seen_more: bool) -> Self {
        let state = StreamLogState {
            recent: VecDeque::new(),
            evicted: last,
            last,
            seen_more,
            logged: last.seq,
            momentary: Vec::new(),
            published: 0,
            ended: false,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            changed: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, StreamLogState> {
        // Every change is complete before anything could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the momentary events, which say why the job waited.
    pub(super) fn forget_momentary(&self) {
        self.lock().momentary.clear();
    }

    /// Returns the newest attempt announced to readers. Events that announce no attempt carry its number.
    pub(super) fn announced_attempt(&self) -> u32 {
        self.lock().last.attempt
    }

    /// Returns the id of the job's last event; `None` while the job is live.
    pub(super) fn end(&self) -> Option<EventId> {
        let state = self.lock();
        state.ended.then_some(state.last)
    }

    /// Records whether readers may have seen tokens before a restart of the daemon that have not come again.
    pub(super) fn set_seen_more(&self, seen_more: bool) {
        self.lock().seen_more = seen_more;
    }

    /// Returns whether readers may have seen tokens that the log lacks. Until those have come again under the same ids, only an
    /// attempt that voids them or an end may be published: its id is of the next attempt, after every token seen.
    pub(super) fn has_seen_more(&self) -> bool {
        self.lock().seen_more
    }

    /// Returns the entry for `event` if it is published next.
    pub(super) fn entry(
        &self,
        event: TaskEvent,
        token_ids: Vec<u32>,
        origin: Option<Origin>,
    ) -> Arc<LogEntry> {
        let state = self.lock();
        let attempt = match &event {
            TaskEvent::Started(started) => started.attempt,
            TaskEvent::Attempt(further) => further.attempt,
            event => state.last.attempt + u32::from(state.seen_more && event.is_last()),
        };
        let id = EventId {
            attempt,
            seq: state.last.seq + 1,
        };
        Arc::new(LogEntry {
            id,
            event,
            token_ids,
            origin,
        })
    }

    /// Shows readers an entry of [`StreamLog::entry`]. The caller holds the job's gate, so that no event comes between the two.
    pub(super) fn publish(&self, entry: Arc<LogEntry>) {
        {
            let mut state = self.lock();
            debug_assert_eq!(
                entry.id.seq,
                state.last.seq + 1,
                "an event between entry and publish"
            );
            // The announcement of a further attempt follows everything that readers saw of the earlier one.
            state.seen_more &= entry.id.attempt == state.last.attempt;
            state.last = entry.id;
            state.ended |= entry.event.is_last();
            state.recent.push_back(entry);
            state.evict();
        }
        self.changed.send_replace(());
    }

    /// Ends all streams without a last event.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.send_replace(());
    }

    /// Shows readers an event that is never replayed. The newest of each kind replaces earlier ones.
    pub(super) fn publish_momentary(&self, event: TaskEvent) {
        {
            let mut state = self.lock();
            state.published += 1;
            let number = state.published;
            state
                .momentary
                .retain(|(_, old)| old.name() != event.name());
            state.momentary.push((number, event));
        }
        self.changed.send_replace(());
    }

    /// Returns the events that are not in the database yet.
    pub(super) fn unlogged(&self) -> Vec<Arc<LogEntry>> {
        let state = self.lock();
        let skip = state.index_after(state.logged);
        state.recent.range(skip..).cloned().collect()
    }

    /// Records that the database has all events up to `seq`.
    pub(super) fn mark_logged(&self, seq: u64) {
        let mut state = self.lock();
        state.logged = state.logged.max(seq);
        state.evict();
    }

    /// Returns all events in memory. Together with the database, they are the whole log.
    pub(super) fn recent(&self) -> Vec<Arc<LogEntry>> {
        self.lock().recent.iter().cloned().collect()
    }

    /// Returns at most `limit` events after `place`, or the momentary events published after number `seen`.
    pub(super) fn read(&self, place: EventId, seen: u64, limit: usize) -> Read {
        let state = self.lock();
        if place < state.evicted {
            return Read::Behind(state.evicted.seq.saturating_sub(place.seq));
        }
        let start = state.start_after(place);
        let end = state.recent.len().min(start + limit);
        let events: Vec<_> = state.recent.range(start..end).cloned().collect();
        if !events.is_empty() {
            return Read::Events(events);
        }
        if state.closed {
            return Read::Over(None);
        }
        if state.ended {
            let ahead = place > state.last;
            return Read::Over(state.recent.back().filter(|_| ahead).cloned());
        }
        let fresh = state
            .momentary
            .iter()
            .filter(|(number, _)| *number > seen)
            .map(|(_, event)| event.clone());
        Read::Momentary(fresh.collect(), state.published)
    }

    /// Returns a receiver that changes whenever there may be something new to read.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

impl StreamLogState {
    /// Returns the index in `recent`, which is contiguous, of the first event with a number above `seq`.
    fn index_after(&self, seq: u64) -> usize {
        let first = self.recent.front().map_or(seq + 1, |entry| entry.id.seq);
        let index = usize::try_from((seq + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        index.min(self.recent.len())
    }

    /// Returns the index of the first event after `place`. The place of a reader that keeps up is in `recent`; only a place ahead
    /// of the log, or an invented one, needs a search.
    fn start_after(&self, place: EventId) -> usize {
        let start = self.index_after(place.seq);
        let is_here = |index: usize| self.recent.get(index).is_some_and(|e| e.id == place);
        if start == 0 && place == self.evicted || start > 0 && is_here(start - 1) {
            return start;
        }
        self.recent.partition_point(|entry| entry.id <= place)
    }

    fn evict(&mut self) {
        while self.recent.len() > KEPT
            && let Some(oldest) = self.recent.front()
            && oldest.id.seq <= self.logged
        {
            self.evicted = oldest.id;
            self.recent.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orchestrator_core::api::events::Token;

    const START: EventId = EventId { attempt: 0, seq: 0 };

    fn token(log: &StreamLog, i: u32) -> EventId {
        let entry = log.entry(TaskEvent::Token(Token { t: "x".into(), i }), vec![i], None);
        log.publish(Arc::clone(&entry));
        entry.id
    }

    // [ORCHD-021] P12
    #[test]
    fn unlogged_events_stay_and_the_rest_is_bounded() {
        let log = StreamLog::new(START, false);
        let count = u32::try_from(KEPT).unwrap() * 2;
        for i in 0..count {
            token(&log, i);
        }
        assert_eq!(log.unlogged().len(), KEPT * 2);
        assert!(matches!(log.read(START, 0, 10), Read::Events(events) if events.len() == 10));
        log.mark_logged(u64::from(count));
        assert!(log.unlogged().is_empty());
        assert!(matches!(log.read(START, 0, 10), Read::Behind(missed) if missed == KEPT as u64));
    }

    fn id(attempt: u32, seq: u64) -> EventId {
        EventId { attempt, seq }
    }

    fn further(log: &StreamLog, attempt: u32, continues: bool) -> EventId {
        let further = orchestrator_core::api::events::FurtherAttempt {
            attempt,
            pool_id: "p".into(),
            worker_id: "w".into(),
            tokens_in: 1,
            continues,
            reason: "lost".into(),
            why: None,
        };
        let entry = log.entry(TaskEvent::Attempt(further), Vec::new(), None);
        log.publish(Arc::clone(&entry));
        entry.id
    }

    // [ORCHD-022] P5, P11: tokens shown and lost in a crash come again under the same ids, and a reader that saw them gets what
    // follows.
    #[test]
    fn an_attempt_is_announced_after_everything_that_was_seen() {
        let log = StreamLog::new(id(1, 40), true);
        let ahead = id(1, 42);
        assert_eq!((token(&log, 0), token(&log, 1)), (id(1, 41), id(1, 42)));
        assert!(matches!(log.read(ahead, 0, 10), Read::Momentary(..)));
        assert_eq!(further(&log, 3, true), id(3, 43));
        assert_eq!((token(&log, 2), log.announced_attempt()), (id(3, 44), 3));
        assert!(
            matches!(log.read(ahead, 0, 10), Read::Events(events) if events[0].id == id(3, 43))
        );
    }

    // [ORCHD-022] P5: what voids the text, or ends the job, does not wait for that, and is after it all the same.
    #[test]
    fn a_place_in_an_interrupted_attempt_is_before_what_voids_it() {
        for ends in [true, false] {
            let log = StreamLog::new(id(1, 40), true);
            let ahead = id(1, 57);
            assert!(matches!(log.read(ahead, 0, 10), Read::Momentary(..)));
            let told = if ends {
                let error = orchestrator_core::job::JobError {
                    code: orchestrator_core::job::JobErrorCode::Cancelled,
                    message: String::new(),
                    retriable: false,
                };
                let entry = log.entry(TaskEvent::Error(error), Vec::new(), None);
                log.publish(Arc::clone(&entry));
                entry.id
            } else {
                further(&log, 2, false)
            };
            assert_eq!(told, id(2, 41));
            assert!(!log.has_seen_more());
            assert!(matches!(log.read(ahead, 0, 10), Read::Events(events) if events[0].id == told));
        }
    }

    #[test]
    fn a_closed_log_releases_its_readers() {
        let log = StreamLog::new(START, false);
        token(&log, 0);
        log.close();
        assert!(matches!(log.read(START, 0, 10), Read::Events(_)));
        assert!(matches!(log.read(id(0, 1), 0, 10), Read::Over(None)));
    }
}
