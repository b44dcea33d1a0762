//! The one task that writes. Commands that arrived together share a transaction, each in a savepoint of its own, and one
//! COMMIT; none is answered before it. So a hundred submits cost about as many syncs as one.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::{Row as _, SqliteConnection};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::holder::{self, Epoch};
use super::{BUSY_TIMEOUT, StoreError};

/// Most commands of one transaction: bounds how long the first of them waits for the last.
const BATCH: usize = 256;
/// Commands that may wait for the writer; senders beyond wait for room.
const BACKLOG: usize = 1024;
/// How often a writer with nothing to write looks whether the database is still its own.
const LOOK: Duration = Duration::from_secs(2);
/// How long a failed transaction counts: as long as its clients are told to wait before they try again.
const FAILURE_COUNTS: Duration = Duration::from_secs(5);

pub(super) type Future<'a, T> = Pin<Box<dyn std::future::Future<Output = T> + Send + 'a>>;

/// A command with its answer, whatever type that has.
trait Command: Send {
    /// Runs it; the error of a broken database ends the whole batch.
    fn run<'a>(&'a mut self, conn: &'a mut SqliteConnection) -> Future<'a, Ran>;
    /// Tells the sender what became of it.
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
        // A sender that went away has nothing to do with whether the command counts.
        let _ = self.reply.send(result);
    }
}

/// Sends commands to the writer.
#[derive(Clone)]
pub(super) struct Writer {
    commands: mpsc::Sender<Box<dyn Command>>,
    tidy: mpsc::Sender<oneshot::Sender<bool>>,
    taken_over: watch::Receiver<bool>,
    failure: LastFailure,
}

/// The latest transaction that failed, and when, until a later [`Writer::probe`] finds that all is well.
type LastFailure = Arc<Mutex<Option<(Instant, StoreError)>>>;

impl Writer {
    /// Starts the writer on `conn`. It ends, and closes the connection, when every `Writer` is dropped.
    pub(super) fn start(conn: SqliteConnection, epoch: Epoch) -> (Self, JoinHandle<()>) {
        let (commands, inbox) = mpsc::channel(BACKLOG);
        let (tidy, asked) = mpsc::channel(1);
        let (told, taken_over) = watch::channel(false);
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
                        "another orchestratord has taken over the job database; this one writes no more"
                    );
                    told.send_replace(true);
                }
            }
        };
        (writer, tokio::spawn(task))
    }

    /// Returns when another run has taken over the database.
    pub(super) async fn taken_over(&self) {
        let mut taken_over = self.taken_over.clone();
        // A writer that ended in order is gone without a word, and nobody can take anything over from it.
        if taken_over.wait_for(|taken| *taken).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether another run has taken over the database.
    pub(super) fn is_taken_over(&self) -> bool {
        *self.taken_over.borrow()
    }

    /// Fails where a transaction failed a moment ago, or something did before that and still nothing can be written. A
    /// small write may find room where a job would not: so a success alone says nothing.
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

    /// Empties the write-ahead log if no reader needs it; false where it stays.
    pub(super) async fn forget_log(&self) -> bool {
        let (reply, done) = oneshot::channel();
        self.tidy.send(reply).await.is_ok() && done.await.unwrap_or(false)
    }

    /// Runs `work` in a transaction and returns once that is committed.
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

/// How the writer's work ended.
enum Ended {
    /// Nobody sends commands any more.
    InOrder,
    /// The database is another run's.
    TakenOver,
}

/// The database as its one writer has it.
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
                        tracing::warn!(%error, "the write-ahead log stays for now");
                    }
                    let _ = reply.send(emptied.unwrap_or(false));
                    continue;
                }
                // One that slept and has nothing to write shall end as well.
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
                // SQLite may have rolled back by itself already; then this one has nothing to do.
                let _ = execute(&mut self.conn, "ROLLBACK").await;
            }
            if let Some(StoreError::TakenOver) = broken {
                // Those who sent commands learn from the closed store that this run is over: it has no word in what
                // becomes of its jobs.
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
                // One way to the database's thread and back, not two: that is most of what a short statement costs.
                Ran::Keep => execute(conn, "RELEASE command; SAVEPOINT command").await?,
                // The savepoint stays, and is the next command's.
                Ran::Undo => execute(conn, "ROLLBACK TO command").await?,
                Ran::Broken(error) => return Err(error),
            }
        }
        execute(conn, "COMMIT").await
    }

    /// Writes the log back into the file and empties it. A reader in the midst of a long read is not waited for, because the
    /// writer has others to serve: then the log stays, and this is false.
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
        // A log that is needed is no error: the first column tells.
        Ok(emptied?.try_get::<i64, _>(0)? == 0)
    }

    async fn close(mut self) {
        if let Err(error) = holder::release(&mut self.conn, self.epoch).await {
            tracing::warn!(%error, "the database is checked for damage at the next start");
        }
        if let Err(error) = sqlx::Connection::close(self.conn).await {
            tracing::warn!(%error, "the database did not close in order");
        }
    }
}

async fn execute(conn: &mut SqliteConnection, sql: &'static str) -> Result<(), StoreError> {
    sqlx::query(sql)
        .execute(conn)
        .await
        .map_err(StoreError::unavailable)?;
    Ok(())
}

/// Ends the process where the writer panics: without it nothing would be written any more, and everybody would wait.
struct EndIfPanics;

impl Drop for EndIfPanics {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// After a failed sync the kernel may have dropped the pages and would call the next sync a success: what is on disk is
/// only known again after the database was opened anew.
fn end_if_sync_failed(error: &StoreError) {
    const IOERR_FSYNC: &str = "1034";
    const IOERR_DIR_FSYNC: &str = "1290";
    if let StoreError::Unavailable(cause) = error
        && let Some(code) = cause
            .as_database_error()
            .and_then(|database| database.code())
        && [IOERR_FSYNC, IOERR_DIR_FSYNC].contains(&code.as_ref())
    {
        tracing::error!(%error, "the disk failed to sync; ending, so that nothing is answered that may be lost");
        std::process::abort();
    }
}
