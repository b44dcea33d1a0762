//! Notification of the pool manager that the worker is ready. The pool learns this from `/health` anyway, only later.

use std::time::Duration;

use pool_core::api::worker::WorkerHealth;
use pool_core::kit::client::{ApiClient, ClientError};
use pool_core::kit::secret::Secret;
use serde::de::IgnoredAny;

const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// Posts `health` to the pool's `/workers/ready`, at most `TRIES` times. A failure is only logged.
pub async fn report(pool_url: &str, secret: Secret, health: WorkerHealth) {
    let client = match ApiClient::new(pool_url, Some(secret)) {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!(%error, "can't notify the pool that the model is loaded");
            return;
        }
    };
    let mut pause = FIRST_PAUSE;
    for attempt in 1..=TRIES {
        match client
            .post::<_, IgnoredAny>("/workers/ready", &health)
            .await
        {
            Ok(_) => return,
            // The pool understood and refused, so a retry would not help.
            Err(
                error @ ClientError::Api {
                    status: 400..=499, ..
                },
            ) => {
                tracing::warn!(%error, "the pool refused the notification that the model is loaded");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, attempt, "could not notify the pool that the model is loaded");
            }
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}
