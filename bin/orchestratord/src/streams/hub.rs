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
    /// The attempt that new events belong to.
    attempt: u32,
    /// Whether readers may have seen more tokens of the attempt than the log has, before the daemon was restarted. Until
    /// they have come again, under the same ids, nothing else may take these.
    seen_more: bool,
    /// The newest event that is written down.
    durable: u64,
    /// The newest event of each momentary kind, with the number of its publication.
    momentary: Vec<(u64, TaskEvent)>,
    published: u64,
    ended: bool,
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
    /// The job is over and nothing follows. With its last event, for a reader whose place is ahead of the log.
    Over(Option<Arc<LogEntry>>),
}

impl Hub {
    /// The hub of a job whose log ends at `last`.
    pub fn new(last: EventId, attempt: u32) -> Self {
        let inner = Inner {
            recent: VecDeque::new(),
            evicted: last,
            last,
            attempt,
            seen_more: false,
            durable: last.seq,
            momentary: Vec::new(),
            published: 0,
            ended: false,
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

    /// Lets further events belong to this attempt. Why the job waited is of no interest any more.
    pub fn begin_attempt(&self, attempt: u32) {
        let mut inner = self.lock();
        inner.attempt = attempt;
        inner.seen_more = false;
        inner.momentary.clear();
    }

    /// Notes whether readers may have seen tokens of the attempt that have not come since the daemon was restarted.
    pub fn set_seen_more(&self, seen_more: bool) {
        self.lock().seen_more = seen_more;
    }

    /// The entry that `event` makes when it is published next. What ends the job while readers may have seen more of its
    /// attempt gets the number of the next one, and so comes after everything that they saw.
    pub fn entry(
        &self,
        event: TaskEvent,
        token_ids: Vec<u32>,
        origin: Option<Origin>,
    ) -> Arc<LogEntry> {
        let inner = self.lock();
        let id = EventId {
            attempt: inner.attempt + u32::from(inner.seen_more && event.is_last()),
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
            inner.last = entry.id;
            inner.ended |= entry.event.is_last();
            inner.recent.push_back(entry);
            inner.evict();
        }
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
        let hub = Hub::new(START, 1);
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

    // [ORCHD-022] P5: what was relayed and lost with a crash stands before the attempt that voids it.
    #[test]
    fn a_place_in_an_interrupted_attempt_is_before_the_next_one() {
        let hub = Hub::new(
            EventId {
                attempt: 1,
                seq: 40,
            },
            1,
        );
        let ahead = EventId {
            attempt: 1,
            seq: 57,
        };
        assert!(matches!(hub.read(ahead, 0, 10), Read::Momentary(..)));
        hub.begin_attempt(2);
        let id = token(&hub, 0);
        assert_eq!(
            id,
            EventId {
                attempt: 2,
                seq: 41
            }
        );
        assert!(matches!(hub.read(ahead, 0, 10), Read::Events(events) if events[0].id == id));
    }
}
