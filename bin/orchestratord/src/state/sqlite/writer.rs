//! The only task that writes. Commands that arrive together share a transaction and one COMMIT, each in a savepoint of its own,
//! and none is answered before the commit. So a hundred submits cost about as many syncs as one.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::{Row as _, SqliteConnection};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::BUSY_TIMEOUT;
use super::error::unavailable;
use super::holder::{self, Epoch};
use crate::state::{OutageKind, StoreError};

/// Maximum number of commands in one transaction. Bounds the time that the first of them waits for the last.
const BATCH: usize = 256;
/// Maximum number of commands that wait for the writer. Further senders wait for room.
const BACKLOG: usize = 1024;
/// Interval at which an idle writer checks that this run still owns the database.
const LOOK: Duration = Duration::from_secs(2);
/// Time for which a failed transaction counts: the `Retry-After` of the refusals that it causes.
const FAILURE_COUNTS: Duration = Duration::from_secs(5);

pub(super) type Future<'a, T> = Pin<Box<dyn std::future::Future<Output = T> + Send + 'a>>;

/// A command with its answer, whose type is erased.
trait Command: Send {
    /// Runs the command. An error of the database itself ends the whole batch.
    fn run<'a>(&'a mut self, conn: &'a mut SqliteConnection) -> Future<'a, Ran>;
    /// Sends the outcome to the command's sender.
    fn answer(self: Box<Self>, broken: Option<StoreError>);
}

enum Ran {
    Keep,
    Undo,
    Broken(StoreError),
}

struct Typed<T, F> {
    work: Option<F>,
    result: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Command for Typed<T, F>
where
    T: Send,
    F: for<'c> FnOnce(&'c mut SqliteConnection) -> Future<'c, Result<T, StoreError>> + Send,
{
    fn run<'a>(&'a mut self, conn: &'a mut SqliteConnection) -> Future<'a, Ran> {
        Box::pin(async move {
            let Some(work) = self.work.take() else {
                return Ran::Undo;
            };
            match work(conn).await {
                Err(error @ StoreError::Unavailable(_)) => Ran::Broken(error),
                result => {
                    let ran = if result.is_ok() { Ran::Keep } else { Ran::Undo };
                    self.result = Some(result);
                    ran
                }
            }
        })
    }

    fn answer(self: Box<Self>, broken: Option<StoreError>) {
        let result = match broken {
            Some(error) => Err(error),
            None => self.result.unwrap_or(Err(StoreError::Closed)),
        };
        // The command counts whether or not its sender still waits.
        let _ = self.reply.send(result);
    }
}

/// A handle that sends commands to the writer.
#[derive(Clone)]
pub(super) struct Writer {
    commands: mpsc::Sender<Box<dyn Command>>,
    tidy: mpsc::Sender<oneshot::Sender<bool>>,
    taken_over: watch::Receiver<bool>,
    failure: LastFailure,
}

/// The latest failed transaction and its time, until a later [`Writer::probe`] finds that writing works.
type LastFailure = Arc<Mutex<Option<(Instant, StoreError)>>>;

impl Writer {
    /// Starts the writer on `conn`. The writer ends, and closes the connection, when every `Writer` is dropped.
    pub(super) fn start(conn: SqliteConnection, epoch: Epoch) -> (Self, JoinHandle<()>) {
        let (commands, inbox) = mpsc::channel(BACKLOG);
        let (tidy, asked) = mpsc::channel(1);
        let (taken_over_tx, taken_over) = watch::channel(false);
        let failure = LastFailure::default();
        let writer = Self {
            commands,
            tidy,
            taken_over,
            failure: Arc::clone(&failure),
        };
        let task = async move {
            let _end = EndIfPanics;
            let mut held = Held {
                conn,
                epoch,
                failure,
            };
            match held.write(inbox, asked).await {
                Ended::InOrder => held.close().await,
                Ended::TakenOver => {
                    tracing::error!(
                        "another orchestratord took over the job database; writing stopped"
                    );
                    taken_over_tx.send_replace(true);
                }
            }
        };
        (writer, tokio::spawn(task))
    }

    /// Returns once another run has taken over the database.
    pub(super) async fn taken_over(&self) {
        let mut taken_over = self.taken_over.clone();
        // A writer that ended in order closed the channel without a take-over, and none can follow.
        if taken_over.wait_for(|taken| *taken).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns whether another run has taken over the database.
    pub(super) fn is_taken_over(&self) -> bool {
        *self.taken_over.borrow()
    }

    /// Fails if a transaction failed in the last few seconds, or failed earlier and writing still does not work. The seconds
    /// matter because a small write may find room where a job would not: its success alone proves nothing.
    pub(super) async fn probe(&self) -> Result<(), StoreError> {
        let failure = || self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((at, error)) = failure().clone() else {
            return Ok(());
        };
        if at.elapsed() < FAILURE_COUNTS {
            return Err(error);
        }
        self.run(|conn| Box::pin(holder::touch(conn))).await?;
        *failure() = None;
        Ok(())
    }

    /// Empties the write-ahead log unless a reader needs it. Returns false if the log stays.
    pub(super) async fn forget_log(&self) -> bool {
        let (reply, done) = oneshot::channel();
        self.tidy.send(reply).await.is_ok() && done.await.unwrap_or(false)
    }

    /// Runs `work` in a transaction and returns once it is committed.
    pub(super) async fn run<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> Future<'c, Result<T, StoreError>>
            + Send
            + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let command = Box::new(Typed {
            work: Some(work),
            result: None,
            reply,
        });
        self.commands
            .send(command)
            .await
            .map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

/// The reason for the end of the writer's work.
enum Ended {
    /// All senders of commands are gone.
    InOrder,
    /// Another run owns the database.
    TakenOver,
}

/// The database, as held by its only writer.
struct Held {
    conn: SqliteConnection,
    epoch: Epoch,
    failure: LastFailure,
}

impl Held {
    async fn write(
        &mut self,
        mut inbox: mpsc::Receiver<Box<dyn Command>>,
        mut asked: mpsc::Receiver<oneshot::Sender<bool>>,
    ) -> Ended {
        let mut batch = Vec::new();
        loop {
            let received = tokio::select! {
                received = inbox.recv_many(&mut batch, BATCH) => received,
                Some(reply) = asked.recv() => {
                    let emptied = self.forget_log().await;
                    if let Err(error) = &emptied {
                        end_if_sync_failed(error);
                        tracing::warn!(%error, "could not empty the write-ahead log");
                    }
                    let _ = reply.send(emptied.unwrap_or(false));
                    continue;
                }
                // A writer that slept through a take-over must end even if it has nothing to write.
                () = tokio::time::sleep(LOOK) => {
                    match holder::check(&mut self.conn, self.epoch).await {
                        Err(StoreError::TakenOver) => return Ended::TakenOver,
                        _ => continue,
                    }
                }
            };
            if received == 0 {
                return Ended::InOrder;
            }
            let broken = self.transact(&mut batch).await.err();
            if let Some(error) = &broken {
                end_if_sync_failed(error);
                tracing::error!(%error, commands = batch.len(), "could not write to the database");
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((Instant::now(), error.clone()));
                // SQLite may have rolled back already; then this statement does nothing.
                let _ = execute(&mut self.conn, "ROLLBACK").await;
            }
            if let Some(StoreError::TakenOver) = broken {
                // Dropping the commands makes the store look closed to their senders: this run no longer decides about its jobs.
                batch.clear();
                return Ended::TakenOver;
            }
            for command in batch.drain(..) {
                command.answer(broken.clone());
            }
        }
    }

    async fn transact(&mut self, batch: &mut [Box<dyn Command>]) -> Result<(), StoreError> {
        let conn = &mut self.conn;
        execute(conn, "BEGIN IMMEDIATE").await?;
        holder::check(conn, self.epoch).await?;
        execute(conn, "SAVEPOINT command").await?;
        for command in batch {
            match command.run(conn).await {
                // One round trip to the database's thread instead of two, which are most of the cost of a short statement.
                Ran::Keep => execute(conn, "RELEASE command; SAVEPOINT command").await?,
                // The savepoint stays, and serves the next command.
                Ran::Undo => execute(conn, "ROLLBACK TO command").await?,
                Ran::Broken(error) => return Err(error),
            }
        }
        execute(conn, "COMMIT").await
    }

    /// Writes the log back into the file and empties it. Does not wait for a reader in a long read, because other commands wait
    /// for the writer: the log then stays, and the result is false.
    async fn forget_log(&mut self) -> Result<bool, StoreError> {
        let conn = &mut self.conn;
        holder::check(conn, self.epoch).await?;
        execute(conn, "PRAGMA busy_timeout = 0").await?;
        let emptied = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .fetch_one(&mut *conn)
            .await;
        let milliseconds = BUSY_TIMEOUT.as_millis();
        let sql = format!("PRAGMA busy_timeout = {milliseconds}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
            .execute(conn)
            .await?;
        // A log in use is not an error; the first column says whether it is.
        Ok(emptied?.try_get::<i64, _>(0)? == 0)
    }

    async fn close(mut self) {
        if let Err(error) = holder::release(&mut self.conn, self.epoch).await {
            tracing::warn!(%error, "could not mark the database as cleanly closed; the next start checks it for damage");
        }
        if let Err(error) = sqlx::Connection::close(self.conn).await {
            tracing::warn!(%error, "could not close the database cleanly");
        }
    }
}

async fn execute(conn: &mut SqliteConnection, sql: &'static str) -> Result<(), StoreError> {
    sqlx::query(sql)
        .execute(conn)
        .await
        .map_err(|error| unavailable(&error))?;
    Ok(())
}

/// Aborts the process if the writer panics: otherwise nothing would be written any more, and all senders would wait.
struct EndIfPanics;

impl Drop for EndIfPanics {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Aborts the process after a failed sync. The kernel may have dropped the pages, and would call the next sync a success: the
/// state of the disk is known again only after the database is reopened.
fn end_if_sync_failed(error: &StoreError) {
    if let StoreError::Unavailable(outage) = error
        && outage.kind == OutageKind::SyncFailed
    {
        tracing::error!(%error, "the disk failed to sync; aborting, so that no answer confirms data that may be lost");
        std::process::abort();
    }
}
