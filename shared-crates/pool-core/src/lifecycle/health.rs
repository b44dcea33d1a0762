//! The health reports of workers, and their transfer into the workers' records.

use std::net::SocketAddr;

use jiff::Timestamp;

use super::spawner;
use crate::api::worker::{HealthState, WorkerHealth};
use crate::registry::WorkerRecord;
use crate::worker::CacheRoom;
use crate::worker::WorkerEvent;

/// The reason a health report was rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HealthRefused {
    /// The answer came from another program, or from another start of the worker.
    #[error("the answer is not from {id}: {what} differs")]
    Stranger {
        /// Id of the expected worker.
        id: String,
        /// Part of the report that differs.
        what: &'static str,
    },
    /// The worker has already ended.
    #[error("{id} has ended")]
    Over {
        /// Id of the worker.
        id: String,
    },
}

/// Applies a worker's health report to its record. Only such a report makes a worker ready or busy.
pub fn apply_health(
    record: &mut WorkerRecord,
    health: &WorkerHealth,
    now: Timestamp,
) -> Result<(), HealthRefused> {
    let stranger = |what| HealthRefused::Stranger {
        id: record.info.id.clone(),
        what,
    };
    if health.nonce != record.nonce {
        return Err(stranger("the nonce"));
    }
    if health.worker_id != record.info.id {
        return Err(stranger("the id"));
    }
    if !record.info.status.is_live() {
        return Err(HealthRefused::Over {
            id: record.info.id.clone(),
        });
    }
    let info = &mut record.info;
    info.load_percent = health.load_percent.min(100);
    info.active = health.active;
    info.cache = health.cache.map(in_steps).or(info.cache);
    info.context_length = health.context_length.or(info.context_length);
    info.memory.measured_bytes = health.measured_bytes.or(info.memory.measured_bytes);
    // The other states need no event. Every worker begins as loading. The process of a failed worker is about to end, and its
    // exit says more than its report.
    if health.state == HealthState::Ready {
        info.ready_at = info.ready_at.or(Some(now));
        let event = if health.active >= health.slots {
            WorkerEvent::BecameBusy
        } else {
            WorkerEvent::BecameReady
        };
        info.idle_since = match health.active {
            0 => info.idle_since.or(Some(now)),
            _ => None,
        };
        // Every live state accepts both events, so this can't fail.
        let _ = record.apply(event);
    }
    Ok(())
}

/// Rounds the free tokens down to a multiple of an eighth of the cache, so that the record does not change with every token.
fn in_steps(room: CacheRoom) -> CacheRoom {
    let step = room.tokens.div_ceil(8).max(1);
    let free_tokens = match room.free_tokens >= room.tokens {
        true => room.tokens,
        false => room.free_tokens / step * step,
    };
    CacheRoom {
        free_tokens,
        ..room
    }
}

/// Number of requests before a silent worker may be ended.
const ASKED: u32 = 3;

/// Requests the health report of the worker at `address`; `None` if there is no valid answer. Blocks for about 1.5 seconds if
/// the worker is silent. Intended for callers without an HTTP client.
pub(super) fn ask(address: SocketAddr) -> Option<WorkerHealth> {
    (0..ASKED).find_map(|_| {
        let answer = spawner::ask_health(address).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::tests::record;
    use crate::worker::WorkerStatus;

    fn health(record: &WorkerRecord) -> WorkerHealth {
        WorkerHealth {
            worker_id: record.info.id.clone(),
            nonce: record.nonce.clone(),
            state: HealthState::Ready,
            load_percent: 100,
            reason: None,
            model_ref: None,
            sha256: None,
            context_length: Some(4096),
            slots: 2,
            active: 0,
            cache: None,
            measured_bytes: Some(77),
            progress: 1,
        }
    }

    #[test] // [POOLD-025]
    fn what_is_left_of_the_cache_is_noted_in_steps() {
        let mut record = record(0);
        let mut says = health(&record);
        let mut noted = |tokens, free_tokens| {
            says.cache = Some(CacheRoom {
                tokens,
                free_tokens,
                executions: None,
            });
            apply_health(&mut record, &says, Timestamp::UNIX_EPOCH).unwrap();
            record.info.cache.unwrap().free_tokens
        };
        let free = [8192, 8191, 7168, 7167, 1024, 1023, 0].map(|free| noted(8192, free));
        assert_eq!(free, [8192, 7168, 7168, 6144, 1024, 0, 0]);
        assert_eq!([100, 99].map(|free| noted(100, free)), [100, 91]);
    }

    #[test] // [POOLD-013]
    fn ready_busy_and_ready_again() {
        let mut record = record(0);
        let first = Timestamp::UNIX_EPOCH;
        let mut says = health(&record);
        apply_health(
            &mut record,
            &WorkerHealth {
                state: HealthState::Loading,
                load_percent: 40,
                ..says.clone()
            },
            first,
        )
        .unwrap();
        assert_eq!(
            (
                record.info.status,
                record.info.load_percent,
                record.info.ready_at
            ),
            (WorkerStatus::Starting, 40, None)
        );
        apply_health(&mut record, &says, first).unwrap();
        assert_eq!(
            (record.info.status, record.info.ready_at),
            (WorkerStatus::Ready, Some(first))
        );
        assert_eq!(
            (
                record.info.context_length,
                record.info.memory.measured_bytes
            ),
            (Some(4096), Some(77))
        );
        says.active = 2;
        apply_health(&mut record, &says, Timestamp::MAX).unwrap();
        assert_eq!(
            (record.info.status, record.info.active, record.info.ready_at),
            (WorkerStatus::Busy, 2, Some(first))
        );
        says.active = 1;
        apply_health(&mut record, &says, Timestamp::MAX).unwrap();
        assert_eq!(record.info.status, WorkerStatus::Ready);
    }

    #[test] // [POOLD-013]
    fn a_stranger_and_a_late_answer_change_nothing() {
        let mut record = record(0);
        let good = health(&record);
        for (says, what) in [
            (
                WorkerHealth {
                    nonce: "other".into(),
                    ..good.clone()
                },
                "nonce",
            ),
            (
                WorkerHealth {
                    worker_id: "worker-cpu-7".into(),
                    ..good.clone()
                },
                "id",
            ),
        ] {
            let error = apply_health(&mut record, &says, Timestamp::UNIX_EPOCH).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
            assert_eq!(record.info.status, WorkerStatus::Starting);
        }
        record.apply(WorkerEvent::Died).unwrap();
        assert!(matches!(
            apply_health(&mut record, &good, Timestamp::UNIX_EPOCH),
            Err(HealthRefused::Over { .. })
        ));
        assert_eq!(record.info.status, WorkerStatus::Failed);
    }
}
