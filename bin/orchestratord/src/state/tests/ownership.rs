//! The run of the daemon that owns the record.

use super::*;

// [ORCHD-070] P13
pub async fn a_run_that_another_has_followed_writes_nothing(place: impl Place) {
    let old = place.open().await;
    let id = submitted(&*old).await;
    let lease = old.lease(id, "p", "w", crate::clock::now()).await.unwrap();
    let new = place.open().await;
    let before = new.job(id).await.unwrap();
    let late = old.progress(id, lease.fence, events([token(1, 2)])).await;
    assert!(matches!(late, Err(StoreError::Closed)), "{late:?}");
    old.taken_over().await;
    assert!(old.is_taken_over() && !new.is_taken_over());
    let end = ending(JobEvent::Cancel, None, entry(1, 2, error_event()));
    assert!(matches!(
        old.end(id, end.clone()).await,
        Err(StoreError::Closed)
    ));
    assert_eq!(new.job(id).await.unwrap(), before);
    assert_eq!(new.end(id, end).await.unwrap(), JobStatus::Cancelled);
}

// [ORCHD-070] P13: a run notices the take-over without trying to write.
pub async fn a_run_with_nothing_to_write_notices_that_another_has_followed(place: impl Place) {
    let old = place.open().await;
    let new = place.open().await;
    tokio::time::timeout(Duration::from_secs(60), old.taken_over())
        .await
        .unwrap();
    assert!(!new.is_taken_over());
}
