//! The newest part of one job's event log, in memory, where readers wait for what comes.
//!
//! Readers pull: each has a place in the log and takes what follows it. A reader who does not pull costs nothing and holds
//! up nobody; when the events at its place have left the memory it is told that it lags.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use orchestrator_core::api::events::{EventId, TaskEvent};
use pool_core::api::worker::Origin;
use tokio::sync::watch;

use crate::state::LogEntry;

/// Events that stay in memory after they were written down: how far a live reader may fall behind.
const KEPT: usize = 1024;

/// The live end of a job's log.
#[derive(Debug)]
pub struct Hub {
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Inner {
    /// Contiguous, up to the newest event. Holds everything that is not written down yet.
    recent: VecDeque<Arc<LogEntry>>,
    /// The newest event that is not in `recent` any more.
    evicted: EventId,
    /// The newest event.
    last: EventId,
    /// Whether readers may have seen more tokens than the log has, before the daemon was restarted. Until they have come
    /// again, under the same ids, nothing else may take these.
    seen_more: bool,
    /// The newest event that is written down.
    durable: u64,
    /// The newest event of each momentary kind, with the number of its publication.
    momentary: Vec<(u64, TaskEvent)>,
    published: u64,
    ended: bool,
    /// Whether nothing more comes although the job did not end.
    closed: bool,
}

/// What a reader gets.
#[derive(Debug)]
pub enum Read {
    /// Events that follow its place, in order.
    Events(Vec<Arc<LogEntry>>),
    /// Nothing new in the log; these momentary events, and the number to come back with.
    Momentary(Vec<TaskEvent>, u64),
    /// What follows its place is not in memory: so many events left it.
    Behind(u64),
    /// Nothing follows. With the job's last event, for a reader whose place is ahead of the log.
    Over(Option<Arc<LogEntry>>),
}

impl Hub {
    /// The hub of a job whose log ends at `last`.
    pub fn new(last: EventId) -> Self {
        let inner = Inner {
            recent: VecDeque::new(),
            evicted: last,
            last,
            seen_more: false,
            durable: last.seq,
            momentary: Vec::new(),
            published: 0,
            ended: false,
            closed: false,
        };
        Self {
            inner: Mutex::new(inner),
            changed: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every change is complete before anything could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets why the job waited: it does no more.
    pub fn forget_momentary(&self) {
        self.lock().momentary.clear();
    }

    /// The newest attempt that readers were told of. What is not told of an attempt carries its number.
    pub fn attempt(&self) -> u32 {
        self.lock().last.attempt
    }

    /// Returns the id of the job's last event; `None` while the job is live.
    pub fn end(&self) -> Option<EventId> {
        let inner = self.lock();
        inner.ended.then_some(inner.last)
    }

    /// Notes whether readers may have seen tokens before the daemon was restarted that have not come since.
    pub fn set_seen_more(&self, seen_more: bool) {
        self.lock().seen_more = seen_more;
    }

    /// Whether readers may have seen tokens that the log has not. Until those have come again under the same ids only an
    /// attempt that voids them, or an end, may be told: their ids are of the next attempt, after everything that was seen.
    pub fn has_seen_more(&self) -> bool {
        self.lock().seen_more
    }

    /// The entry that `event` makes when it is published next.
    pub fn entry(
        &self,
        event: TaskEvent,
        token_ids: Vec<u32>,
        origin: Option<Origin>,
    ) -> Arc<LogEntry> {
        let inner = self.lock();
        let attempt = match &event {
            TaskEvent::Started(started) => started.attempt,
            TaskEvent::Attempt(further) => further.attempt,
            event => inner.last.attempt + u32::from(inner.seen_more && event.is_last()),
        };
        let id = EventId {
            attempt,
            seq: inner.last.seq + 1,
        };
        Arc::new(LogEntry {
            id,
            event,
            token_ids,
            origin,
        })
    }

    /// Shows readers an entry that [`Hub::entry`] made. The caller holds the job's gate, so that nothing comes between.
    pub fn publish(&self, entry: Arc<LogEntry>) {
        {
            let mut inner = self.lock();
            debug_assert_eq!(
                entry.id.seq,
                inner.last.seq + 1,
                "an event between entry and publish"
            );
            // What is told of a further attempt follows everything that was seen of the one before.
            inner.seen_more &= entry.id.attempt == inner.last.attempt;
            inner.last = entry.id;
            inner.ended |= entry.event.is_last();
            inner.recent.push_back(entry);
            inner.evict();
        }
        self.changed.send_replace(());
    }

    /// Lets the readers go, without an end.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.send_replace(());
    }

    /// Shows readers an event that is never replayed; of each kind only the newest counts.
    pub fn publish_momentary(&self, event: TaskEvent) {
        {
            let mut inner = self.lock();
            inner.published += 1;
            let number = inner.published;
            inner
                .momentary
                .retain(|(_, old)| old.name() != event.name());
            inner.momentary.push((number, event));
        }
        self.changed.send_replace(());
    }

    /// The events that are not written down yet.
    pub fn unwritten(&self) -> Vec<Arc<LogEntry>> {
        let inner = self.lock();
        let skip = inner.index_after(inner.durable);
        inner.recent.range(skip..).cloned().collect()
    }

    /// Notes that all events up to `seq` are written down.
    pub fn written(&self, seq: u64) {
        let mut inner = self.lock();
        inner.durable = inner.durable.max(seq);
        inner.evict();
    }

    /// All events in memory: with what is written down, the whole log.
    pub fn recent(&self) -> Vec<Arc<LogEntry>> {
        self.lock().recent.iter().cloned().collect()
    }

    /// What a reader at `place` gets that has seen momentary events up to `seen`, at most `limit` events.
    pub fn read(&self, place: EventId, seen: u64, limit: usize) -> Read {
        let inner = self.lock();
        if place < inner.evicted {
            return Read::Behind(inner.evicted.seq.saturating_sub(place.seq));
        }
        let start = inner.start_after(place);
        let end = inner.recent.len().min(start + limit);
        let events: Vec<_> = inner.recent.range(start..end).cloned().collect();
        if !events.is_empty() {
            return Read::Events(events);
        }
        if inner.closed {
            return Read::Over(None);
        }
        if inner.ended {
            let ahead = place > inner.last;
            return Read::Over(inner.recent.back().filter(|_| ahead).cloned());
        }
        let fresh = inner
            .momentary
            .iter()
            .filter(|(number, _)| *number > seen)
            .map(|(_, event)| event.clone());
        Read::Momentary(fresh.collect(), inner.published)
    }

    /// Wakes whenever there may be something new to read.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

impl Inner {
    /// Where the events with higher numbers than `seq` begin in `recent`, which is contiguous.
    fn index_after(&self, seq: u64) -> usize {
        let first = self.recent.front().map_or(seq + 1, |entry| entry.id.seq);
        let index = usize::try_from((seq + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        index.min(self.recent.len())
    }

    /// Where the events begin that follow `place`. A reader that keeps up stands at an event that is here; only one that saw
    /// more than the log has, or made its place up, has to be looked for.
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
            && oldest.id.seq <= self.durable
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

    fn token(hub: &Hub, i: u32) -> EventId {
        let entry = hub.entry(TaskEvent::Token(Token { t: "x".into(), i }), vec![i], None);
        hub.publish(Arc::clone(&entry));
        entry.id
    }

    // [ORCHD-021] P12
    #[test]
    fn what_is_not_written_down_stays_and_the_rest_is_bounded() {
        let hub = Hub::new(START);
        let count = u32::try_from(KEPT).unwrap() * 2;
        for i in 0..count {
            token(&hub, i);
        }
        assert_eq!(hub.unwritten().len(), KEPT * 2);
        assert!(matches!(hub.read(START, 0, 10), Read::Events(events) if events.len() == 10));
        hub.written(u64::from(count));
        assert!(hub.unwritten().is_empty());
        assert!(matches!(hub.read(START, 0, 10), Read::Behind(missed) if missed == KEPT as u64));
    }

    fn id(attempt: u32, seq: u64) -> EventId {
        EventId { attempt, seq }
    }

    fn further(hub: &Hub, attempt: u32, continues: bool) -> EventId {
        let further = orchestrator_core::api::events::FurtherAttempt {
            attempt,
            pool_id: "p".into(),
            worker_id: "w".into(),
            tokens_in: 1,
            continues,
            reason: "lost".into(),
            why: None,
        };
        let entry = hub.entry(TaskEvent::Attempt(further), Vec::new(), None);
        hub.publish(Arc::clone(&entry));
        entry.id
    }

    // [ORCHD-022] P5, P11: what was shown and lost with a crash comes again under the same ids, and whoever saw it gets what
    // follows.
    #[test]
    fn an_attempt_is_told_of_after_everything_that_was_seen() {
        let hub = Hub::new(id(1, 40));
        hub.set_seen_more(true);
        let ahead = id(1, 42);
        assert_eq!((token(&hub, 0), token(&hub, 1)), (id(1, 41), id(1, 42)));
        assert!(matches!(hub.read(ahead, 0, 10), Read::Momentary(..)));
        assert_eq!(further(&hub, 3, true), id(3, 43));
        assert_eq!((token(&hub, 2), hub.attempt()), (id(3, 44), 3));
        assert!(
            matches!(hub.read(ahead, 0, 10), Read::Events(events) if events[0].id == id(3, 43))
        );
    }

    // [ORCHD-022] P5: what voids the text, or ends the job, does not wait for that, and is after it all the same.
    #[test]
    fn a_place_in_an_interrupted_attempt_is_before_what_voids_it() {
        for ends in [true, false] {
            let hub = Hub::new(id(1, 40));
            hub.set_seen_more(true);
            let ahead = id(1, 57);
            assert!(matches!(hub.read(ahead, 0, 10), Read::Momentary(..)));
            let told = if ends {
                let error = orchestrator_core::job::JobError {
                    code: orchestrator_core::job::JobErrorCode::Cancelled,
                    message: String::new(),
                    retriable: false,
                };
                let entry = hub.entry(TaskEvent::Error(error), Vec::new(), None);
                hub.publish(Arc::clone(&entry));
                entry.id
            } else {
                further(&hub, 2, false)
            };
            assert_eq!(told, id(2, 41));
            assert!(!hub.has_seen_more());
            assert!(matches!(hub.read(ahead, 0, 10), Read::Events(events) if events[0].id == told));
        }
    }

    #[test]
    fn readers_of_a_closed_hub_are_let_go() {
        let hub = Hub::new(START);
        token(&hub, 0);
        hub.close();
        assert!(matches!(hub.read(START, 0, 10), Read::Events(_)));
        assert!(matches!(hub.read(id(0, 1), 0, 10), Read::Over(None)));
    }
}
