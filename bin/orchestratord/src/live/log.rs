//! The one way to add to a job's event log.
//!
//! Every event gets its id, is committed to the database and shown to readers under the job's gate, so readers and the
//! database agree on one order. Only tokens are shown before their commit: they are too many to wait for the disk, and a crash
//! of the daemon loses none, because the worker sends them again under the same ids.

use std::sync::{Arc, OnceLock};

use orchestrator_core::JobStatus;
use orchestrator_core::api::events::{EventId, TaskEvent, Token};
use pool_core::api::worker::Origin;
use tokio::sync::{Mutex, MutexGuard, watch};

use super::stream_log::{Read, StreamLog};
use crate::state::{LogEntry, StoreError};

/// The event log of a job that is not over, or ended a moment ago.
#[derive(Debug)]
pub struct JobLog {
    stream: StreamLog,
    /// Held across the commit of each change.
    gate: Mutex<()>,
    ended: OnceLock<JobStatus>,
}

impl JobLog {
    /// Returns the log that ends at `last`. `seen_more` says whether readers may have seen tokens before a restart of the daemon
    /// that the database lacks.
    pub fn new(last: EventId, seen_more: bool) -> Self {
        Self {
            stream: StreamLog::new(last, seen_more),
            gate: Mutex::new(()),
            ended: OnceLock::new(),
        }
    }

    /// Waits for the right to change the job and its log.
    ///
    /// # Errors
    ///
    /// Returns the final state of a job that has ended: its log is complete.
    pub async fn lock(&self) -> Result<LogGuard<'_>, JobStatus> {
        let guard = LogGuard {
            log: self,
            _gate: self.gate.lock().await,
        };
        self.ended().map_or(Ok(guard), Err)
    }

    /// Returns the final state of the job; `None` while it is live.
    pub fn ended(&self) -> Option<JobStatus> {
        self.ended.get().copied()
    }

    /// Commits the relayed events that the database lacks by `write`. Needs no [`LogGuard`]: to commit an event twice changes
    /// nothing.
    ///
    /// # Errors
    ///
    /// Returns the error of `write`.
    pub async fn commit_relayed<E, W>(
        &self,
        write: impl FnOnce(Vec<Arc<LogEntry>>) -> W,
    ) -> Result<(), E>
    where
        W: Future<Output = Result<(), E>>,
    {
        let events = self.stream.unlogged();
        let Some(last) = events.last().map(|entry| entry.id.seq) else {
            return Ok(());
        };
        write(events).await?;
        self.stream.mark_logged(last);
        Ok(())
    }

    /// Shows readers an event that is never replayed. The newest of each kind replaces earlier ones.
    pub fn show_momentary(&self, event: TaskEvent) {
        self.stream.publish_momentary(event);
    }

    /// Returns the newest attempt announced to readers.
    pub fn announced_attempt(&self) -> u32 {
        self.stream.announced_attempt()
    }

    /// Records whether readers may have seen tokens before a restart of the daemon that have not come again.
    pub fn set_seen_more(&self, seen_more: bool) {
        self.stream.set_seen_more(seen_more);
    }

    /// Returns whether readers may have seen tokens that the log lacks. Until those have come again, an attempt that continues
    /// the text can't be announced.
    pub fn has_seen_more(&self) -> bool {
        self.stream.has_seen_more()
    }

    /// Returns the id of the job's last event; `None` while the job is live.
    pub fn end(&self) -> Option<EventId> {
        self.stream.end()
    }

    /// Returns all events in memory. Together with the database, they are the whole log.
    pub fn recent(&self) -> Vec<Arc<LogEntry>> {
        self.stream.recent()
    }

    /// Returns at most `limit` events after `place`, or the momentary events published after number `seen`.
    pub fn read(&self, place: EventId, seen: u64, limit: usize) -> Read {
        self.stream.read(place, seen, limit)
    }

    /// Returns a receiver that changes whenever there may be something new to read.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.stream.subscribe()
    }
}

/// The right to change a job and its log, which one caller has at a time. The job has not ended.
#[derive(Debug)]
pub struct LogGuard<'a> {
    log: &'a JobLog,
    _gate: MutexGuard<'a, ()>,
}

impl LogGuard<'_> {
    /// Shows readers a token at once. A later commit writes it to the database.
    pub fn relay(&self, token: Token, token_ids: Vec<u32>) {
        let stream = &self.log.stream;
        stream.publish(stream.entry(TaskEvent::Token(token), token_ids, None));
    }

    /// Commits all unlogged events and `event` by `write`, then shows readers `event`. `origin` is what the tokens after it are
    /// computed with.
    ///
    /// # Errors
    ///
    /// Returns the error of `write`. Readers then see nothing, and the id of `event` stays free.
    pub async fn commit<T, E, W>(
        &self,
        event: Option<(TaskEvent, Option<Origin>)>,
        write: impl FnOnce(Vec<Arc<LogEntry>>) -> W,
    ) -> Result<T, E>
    where
        W: Future<Output = Result<T, E>>,
    {
        let stream = &self.log.stream;
        let entry = event.map(|(event, origin)| stream.entry(event, Vec::new(), origin));
        let mut events = stream.unlogged();
        events.extend(entry.clone());
        let last = events.last().map(|entry| entry.id.seq);
        let written = write(events).await?;
        if let Some(entry) = entry {
            stream.publish(entry);
        }
        if let Some(last) = last {
            stream.mark_logged(last);
        }
        Ok(written)
    }

    /// Commits the job's last event by `write`, which returns the state that the job has in the database, then shows it to
    /// readers.
    ///
    /// # Errors
    ///
    /// Returns the error of `write`. The job then has not ended.
    pub async fn finish<W>(
        &self,
        last: TaskEvent,
        write: impl FnOnce(Vec<Arc<LogEntry>>) -> W,
    ) -> Result<JobStatus, StoreError>
    where
        W: Future<Output = Result<JobStatus, StoreError>>,
    {
        let status = self.commit(Some((last, None)), write).await?;
        let _ = self.log.ended.set(status);
        Ok(status)
    }

    /// Ends all streams without a last event, for a job whose end can't be committed.
    pub fn abandon(&self, status: JobStatus) {
        self.log.stream.close();
        let _ = self.log.ended.set(status);
    }

    /// Drops the momentary events, which say why the job waited.
    pub fn forget_wait(&self) {
        self.log.stream.forget_momentary();
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use orchestrator_core::job::{JobError, JobErrorCode};

    use super::*;

    const START: EventId = EventId { attempt: 0, seq: 0 };

    fn token(i: u32) -> (Token, Vec<u32>) {
        let t = format!("{i},");
        (Token { t, i }, vec![i])
    }

    fn cancelled() -> TaskEvent {
        TaskEvent::Error(JobError {
            code: JobErrorCode::Cancelled,
            message: String::new(),
            retriable: false,
        })
    }

    /// Returns the sequence numbers that a reader sees.
    fn seen(log: &JobLog) -> Vec<u64> {
        log.recent().iter().map(|entry| entry.id.seq).collect()
    }

    fn numbers(events: &[Arc<LogEntry>]) -> Vec<u64> {
        events.iter().map(|entry| entry.id.seq).collect()
    }

    // [ORCHD-243] P1
    #[tokio::test]
    async fn an_event_whose_commit_fails_is_not_shown_and_leaves_its_id_free() {
        let log = JobLog::new(START, false);
        let guard = log.lock().await.unwrap();
        let (first, ids) = token(0);
        guard.relay(first, ids);
        let refused = guard.finish(cancelled(), |events| async move {
            assert_eq!(numbers(&events), [1, 2]);
            Err(StoreError::Closed)
        });
        assert!(refused.await.is_err());
        assert_eq!((seen(&log), log.ended(), log.end()), (vec![1], None, None));

        // The token is in no commit yet: the next one has it again.
        let written = guard.finish(cancelled(), |events| async move {
            assert_eq!(numbers(&events), [1, 2]);
            Ok(JobStatus::Cancelled)
        });
        assert_eq!(written.await.unwrap(), JobStatus::Cancelled);
        assert_eq!(
            (seen(&log), log.ended()),
            (vec![1, 2], Some(JobStatus::Cancelled))
        );
    }

    // [ORCHD-243] P1, P5
    #[tokio::test]
    async fn nothing_is_added_after_an_end() {
        let log = JobLog::new(START, false);
        let guard = log.lock().await.unwrap();
        let end = guard.finish(cancelled(), async |_| Ok(JobStatus::Cancelled));
        end.await.unwrap();
        drop(guard);
        assert_eq!(log.lock().await.err(), Some(JobStatus::Cancelled));
    }

    #[tokio::test]
    async fn relayed_tokens_are_committed_once() {
        let log = JobLog::new(START, false);
        let guard = log.lock().await.unwrap();
        for i in 0..3 {
            let (token, ids) = token(i);
            guard.relay(token, ids);
        }
        let write = async |events: Vec<Arc<LogEntry>>| {
            assert_eq!(numbers(&events), [1, 2, 3]);
            Ok::<_, Infallible>(())
        };
        // A reader has them before the commit, and the guard is not needed for it.
        assert_eq!(seen(&log), [1, 2, 3]);
        log.commit_relayed(write).await.unwrap();
        let none_left = async |_| unreachable!("every event is committed");
        log.commit_relayed::<Infallible, _>(none_left)
            .await
            .unwrap();
    }
}
