//! The daemon, killed repeatedly while its workers compute.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pool_core::worker::WorkerStatus;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::house::{House, PATIENCE, generate, spawn, until_status, workers};

const KILLS: u32 = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [POOLD-064] P8 P14
async fn twenty_kills_of_the_daemon_cost_no_worker_and_no_token() {
    let seed = std::env::var("LLORCH_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random::<u64>);
    println!("seed {seed}: LLORCH_TEST_SEED={seed} repeats it");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut house = House::real();
    let mut client = house.start().await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(spawn(&client, &house).await.id);
    }
    for id in &ids {
        until_status(&client, id, WorkerStatus::Ready).await;
    }
    let pids =
        |house: &House| -> Vec<_> { ids.iter().map(|id| house.record(id).identity).collect() };
    let before = pids(&house);

    let over = Arc::new(AtomicBool::new(false));
    let total = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (ids.iter().map(|id| house.record(id)))
        .map(|record| {
            let (over, total) = (Arc::clone(&over), Arc::clone(&total));
            tokio::spawn(async move {
                let mut job = 0;
                while !over.load(Ordering::Relaxed) {
                    let tokens = generate(&record, job, 200).await?;
                    total.fetch_add(tokens.into(), Ordering::Relaxed);
                    job += 1;
                }
                Ok::<_, String>(job)
            })
        })
        .collect();

    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(dice.random_range(0..500))).await;
        house.kill_daemon();
        house.launch();
        // Every third daemon is killed while it starts or adopts.
        if kill % 3 == 2 {
            continue;
        }
        client = house.client().await;
        let listed = workers(&client).await;
        assert_eq!(listed.len(), 2, "after kill {kill}: {listed:?}");
        for info in &listed {
            assert!(
                info.status.is_live() && info.exit.is_none(),
                "after kill {kill}: {info:?}"
            );
        }
        assert_eq!(pids(&house), before, "after kill {kill}");
        let mut found = house.worker_processes();
        found.sort_unstable();
        let mut wanted: Vec<_> = before
            .iter()
            .flatten()
            .map(|identity| identity.pid)
            .collect();
        wanted.sort_unstable();
        assert_eq!(found, wanted, "one process a worker, after kill {kill}");
    }

    // The new daemon watches them as well: their later reports arrive.
    client = house.client().await;
    for id in &ids {
        until_status(&client, id, WorkerStatus::Busy).await;
    }
    over.store(true, Ordering::Relaxed);
    let mut jobs = 0;
    for reader in readers {
        jobs += tokio::time::timeout(PATIENCE, reader)
            .await
            .expect("the last answer ends")
            .unwrap()
            .unwrap();
    }
    println!(
        "{KILLS} kills, {jobs} answers, {} tokens",
        total.load(Ordering::Relaxed)
    );
    house.check(u64::MAX);
}
