//! Pools that join and leave the fleet: in memory at once, and in the database, so that a restart knows them.
//!
//! A failed write is logged and otherwise ignored, because the fleet works from memory: only a restarted daemon lacks the change,
//! and then the pool registers again.

use pool_core::api::pool::RegisterRequest;

use super::{Fleet, FleetError};
use crate::clock;
use crate::state::Store;

/// Registers a pool, or a new instance of one. The pool that stopped longest ago makes room for a new one.
pub async fn register(
    fleet: &Fleet,
    store: &Store,
    request: RegisterRequest,
) -> Result<(), FleetError> {
    make_room(fleet, store, &request).await;
    let (id, now) = (request.pool_id.clone(), clock::now());
    fleet.register(request.clone(), now)?;
    if let Err(error) = store.save_pool(request, now).await {
        tracing::warn!(pool = id, %error, "could not store the registration");
    }
    Ok(())
}

/// Forgets a stopped pool if a new one needs its place.
async fn make_room(fleet: &Fleet, store: &Store, request: &RegisterRequest) {
    if fleet.client(&request.pool_id).is_some() {
        return;
    }
    if let Some(stopped) = fleet.longest_stopped() {
        tracing::info!(
            pool = stopped,
            "forgetting a stopped pool to make room for a new one"
        );
        forget(fleet, store, &stopped).await;
    }
}

/// Marks the pool as stopped on purpose, until it registers again.
pub async fn leave(
    fleet: &Fleet,
    store: &Store,
    id: &str,
    instance_id: &str,
) -> Result<(), FleetError> {
    let now = clock::now();
    if fleet.stop(id, instance_id, now)?
        && let Err(error) = store.stop_pool(id, now).await
    {
        tracing::warn!(pool = id, %error, "could not store the deregistration");
    }
    Ok(())
}

/// Removes a pool. Returns whether there was such a pool.
pub async fn forget(fleet: &Fleet, store: &Store, id: &str) -> bool {
    let known = fleet.remove(id);
    if known && let Err(error) = store.remove_pool(id).await {
        tracing::warn!(pool = id, %error, "could not store the removal");
    }
    known
}
