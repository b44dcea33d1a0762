//! Background tasks of the daemon.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::task::JoinError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that outlive the requests that caused them. Clones share the tasks.
#[derive(Debug, Clone, Default)]
pub struct Background {
    tasks: TaskTracker,
    abort: CancellationToken,
}

impl Background {
    /// Spawns a task. A panic in the task is logged.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let work = AssertUnwindSafe(work).catch_unwind();
        let work = self.abort.clone().run_until_cancelled_owned(work);
        self.tasks.spawn(async move {
            if let Some(Err(_)) = work.await {
                tracing::error!("a task panicked; see standard error");
            }
        });
    }

    /// Waits for all tasks, and aborts those that still run after `grace`.
    pub async fn finish(&self, grace: Duration) {
        self.tasks.close();
        if timeout(grace, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.tasks.len(),
                "the grace period is over; aborting the remaining tasks"
            );
            self.abort.cancel();
            self.tasks.wait().await;
        }
    }
}

/// Runs `work` to completion even if the waiting request is dropped: after a commit, the in-memory state must follow.
///
/// # Errors
///
/// Fails if `work` panics.
pub async fn complete<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, JoinError> {
    tokio::spawn(work).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test]
    async fn tasks_have_the_grace_period_to_end_and_are_aborted_after_it() {
        let background = Background::default();
        let (ended, in_time) = (Arc::new(AtomicBool::new(false)), Background::default());
        let task = Arc::clone(&ended);
        in_time.spawn(async move {
            tokio::task::yield_now().await;
            task.store(true, Ordering::Relaxed);
        });
        in_time.spawn(async { panic!("does not reach the others") });
        in_time.finish(Duration::MAX).await;
        assert!(ended.load(Ordering::Relaxed));

        background.spawn(std::future::pending());
        background.finish(Duration::ZERO).await;
        assert!(background.tasks.is_empty());
    }
}
