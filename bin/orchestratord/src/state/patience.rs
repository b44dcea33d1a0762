//! Operations that must not fail because the database is unavailable for a while.

use std::time::Duration;

use orchestrator_core::JobId;

use super::{JobStore, StoreError};

/// The pause before the database is tried again.
pub const STORE_PAUSE: Duration = Duration::from_secs(1);

/// The end of `patiently` without a result.
#[derive(Debug)]
pub enum Unfinished<S> {
    /// Waiting for the database ended early, with the reason.
    Stopped(S),
    /// The operation failed for a reason that does not pass.
    Failed(StoreError),
}

impl dyn JobStore {
    /// Runs an operation for `job`, and repeats it while the database is unavailable. `what` names it in the daemon's log.
    ///
    /// # Errors
    ///
    /// Returns [`Unfinished::Stopped`] once `stop` is ready in a pause, and [`Unfinished::Failed`] if the operation fails for
    /// another reason.
    pub async fn patiently<T, S, O>(
        &self,
        job: JobId,
        what: &str,
        stop: impl Future<Output = S>,
        mut operation: impl FnMut() -> O,
    ) -> Result<T, Unfinished<S>>
    where
        O: Future<Output = Result<T, StoreError>>,
    {
        let mut stop = std::pin::pin!(stop);
        loop {
            match operation().await {
                Ok(done) => return Ok(done),
                Err(StoreError::Unavailable(error)) => {
                    tracing::warn!(%job, %error, "{what} waits for the database");
                }
                Err(error) => return Err(Unfinished::Failed(error)),
            }
            tokio::select! {
                reason = &mut stop => return Err(Unfinished::Stopped(reason)),
                () = tokio::time::sleep(STORE_PAUSE) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::state::{Outage, OutageKind, Store, open};

    fn unavailable() -> StoreError {
        StoreError::Unavailable(Outage {
            kind: OutageKind::Other,
            message: "a full disk".into(),
        })
    }

    async fn store(dir: &tempfile::TempDir) -> Store {
        open(&dir.path().join("jobs.db")).await.unwrap()
    }

    // [ORCHD-244] P1
    #[tokio::test]
    async fn an_operation_is_repeated_until_the_database_is_available() {
        let dir = tempfile::tempdir().unwrap();
        let (store, runs) = (store(&dir).await, Cell::new(0));
        let done = store.patiently(
            JobId::random(),
            "a test",
            std::future::pending::<()>(),
            || {
                runs.set(runs.get() + 1);
                let result = (runs.get() == 2).then_some(runs.get());
                async move { result.ok_or_else(unavailable) }
            },
        );
        assert_eq!(done.await.unwrap(), 2);
    }

    // [ORCHD-244]
    #[tokio::test]
    async fn a_stop_ends_the_wait_and_a_lasting_error_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir).await;
        let at_once = std::future::ready(());
        let stopped = store.patiently(JobId::random(), "a test", at_once, async || {
            Err::<(), _>(unavailable())
        });
        assert!(matches!(stopped.await, Err(Unfinished::Stopped(()))));

        let never = std::future::pending::<()>();
        let failed = store.patiently(JobId::random(), "a test", never, async || {
            Err::<(), _>(StoreError::Closed)
        });
        assert!(matches!(
            failed.await,
            Err(Unfinished::Failed(StoreError::Closed))
        ));
    }
}
