//! Stored registrations of pools.

use pool_core::POOL_API_VERSION;

use super::*;

fn registration(pool: &str, instance: &str) -> RegisterRequest {
    RegisterRequest {
        pool_id: pool.into(),
        instance_id: instance.into(),
        url: format!("http://{pool}:9200"),
        api_version: POOL_API_VERSION,
        heartbeat_interval_ms: 1000,
        host_id: (pool == "a").then(|| "host".into()),
    }
}

// [ORCHD-079] [ORCHD-098]
pub async fn registrations_outlive_a_crash(place: impl Place) {
    let store = place.open().await;
    let now = crate::clock::now();
    for (pool, instance) in [("b", "1"), ("a", "1"), ("c", "1"), ("a", "2")] {
        let saved = store.save_pool(registration(pool, instance), now).await;
        saved.unwrap();
    }
    for pool in ["a", "b", "nowhere"] {
        store.stop_pool(pool, now).await.unwrap();
    }
    store.remove_pool("c").await.unwrap();
    let saved = store.save_pool(registration("a", "3"), now).await;
    saved.unwrap();
    store.crash().await;

    let store = place.open().await;
    let found = store.pools().await.unwrap();
    let requests: Vec<_> = found.iter().map(|pool| pool.request.clone()).collect();
    assert_eq!(requests, [registration("a", "3"), registration("b", "1")]);
    // A database may keep less than nanoseconds.
    let [a, b] = [&found[0], &found[1]].map(|pool| pool.stopped_at);
    assert_eq!(a, None);
    assert_eq!(b.unwrap().as_microsecond(), now.as_microsecond());
}
