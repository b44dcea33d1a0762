//! Receipts and the jobs they belong to.

use pool_core::api::receipt::Receipt;

use super::*;

pub fn receipt() -> Receipt {
    Receipt {
        model_sha256: Some("00".into()),
        engine: "fake 1".into(),
        arithmetic: "cpu 2".into(),
        earlier_arithmetic: vec!["cpu 1".into()],
        tokenizer_sha256: "01".into(),
        chat_template_sha256: None,
        prompt_tokens: 3,
        prompt_sha256: "02".into(),
        temperature: 0.8,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.05,
        repetition_penalty: 1.1,
        seed: u64::MAX,
        max_tokens: 8,
        stop_sha256: Some("03".into()),
        output_tokens: 2,
        output_sha256: "04".into(),
    }
}

fn finished(fence: u64) -> Ending {
    let last = entry(1, 3, error_event());
    Ending {
        receipt: Some(Box::new(receipt())),
        ..ending(JobEvent::Finished, Some(fence), last)
    }
}

/// Returns a running job, and the fence of its lease.
async fn running(store: &Store) -> (JobId, u64) {
    let id = submitted(&**store).await;
    let now = crate::clock::now();
    let fence = store.lease(id, "p", "w", now).await.unwrap().fence;
    let started = Progress {
        started_at: Some(now),
        events: vec![token(1, 2)],
    };
    store.progress(id, fence, started).await.unwrap();
    (id, fence)
}

async fn stored(store: &Store, id: JobId) -> Option<Receipt> {
    store.job(id).await.unwrap().unwrap().0.receipt
}

// [ORCHD-240] P4
pub async fn a_receipt_is_written_with_the_end_or_not_at_all(place: impl Place) {
    let opened = place.open().await;
    let (id, fence) = running(&opened).await;
    assert_eq!(stored(&opened, id).await, None);
    assert!(opened.end(id, finished(fence + 1)).await.is_err());
    assert_eq!(stored(&opened, id).await, None);
    let status = opened.end(id, finished(fence)).await.unwrap();
    assert_eq!(status, JobStatus::Completed);
    // A repeated end changes nothing, and a different end adds nothing.
    for event in [JobEvent::Cancel, JobEvent::Finished] {
        let again = Ending {
            event,
            ..finished(fence)
        };
        let _ = opened.end(id, again).await;
    }
    opened.crash().await;

    let opened = place.open().await;
    assert_eq!(stored(&opened, id).await, Some(receipt()));
    let (cancelled, fence) = running(&opened).await;
    let cancel = ending(JobEvent::Cancel, None, entry(1, 3, error_event()));
    opened.end(cancelled, cancel).await.unwrap();
    let late = opened.end(cancelled, finished(fence)).await;
    assert!(matches!(late, Err(StoreError::Illegal(_))), "{late:?}");
    assert_eq!(stored(&opened, cancelled).await, None);
}

// [ORCHD-242]
pub async fn a_receipt_outlives_the_texts_and_goes_with_its_job(place: impl Place) {
    let store = place.open().await;
    let (id, fence) = running(&store).await;
    store.end(id, finished(fence)).await.unwrap();
    let now = crate::clock::now() + jiff::SignedDuration::from_hours(1);
    let sweep = async |cutoffs| {
        while store.sweep(cutoffs, now).await.unwrap() != Step::Done {}
    };
    let drop = Cutoffs {
        drop: Some(now),
        forget: None,
    };
    sweep(drop).await;
    let (job, _) = store.job(id).await.unwrap().unwrap();
    assert_eq!((job.dropped_at, job.text.as_str()), (Some(now), ""));
    assert_eq!(job.receipt, Some(receipt()));
    let forget = Cutoffs {
        forget: Some(now),
        ..drop
    };
    sweep(forget).await;
    assert!(store.job(id).await.unwrap().is_none());
}
