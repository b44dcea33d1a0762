//! Estimate of the rate at which the queue drains.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};

/// Number of departures kept.
const KEPT: usize = 64;
/// Age beyond which a departure is ignored.
const WINDOW: SignedDuration = SignedDuration::from_mins(5);
/// Estimate without any departure, and the shortest one with fewer than two recent departures.
const UNKNOWN: SignedDuration = SignedDuration::from_secs(5);
/// Shortest estimate.
const SHORTEST: SignedDuration = SignedDuration::from_secs(1);
/// Longest estimate.
const LONGEST: SignedDuration = SignedDuration::from_secs(60);

/// Recent times at which jobs left the queue.
#[derive(Debug, Clone, Default)]
pub struct Departures {
    at: VecDeque<Timestamp>,
}

impl Departures {
    /// Records that a job left the queue.
    pub fn note(&mut self, now: Timestamp) {
        if self.at.len() == KEPT {
            self.at.pop_front();
        }
        self.at.push_back(now);
    }

    /// Returns the time after which a client that found the queue full should retry: the time in which one job leaves, in whole
    /// seconds.
    pub fn retry_after(&self, now: Timestamp) -> SignedDuration {
        retry_after(&self.at, now)
    }
}

/// Returns the mean time between recent departures, in whole seconds from 1 to 60. The time since the last departure counts, so
/// that a stalled queue yields ever longer times.
fn retry_after(departures: &VecDeque<Timestamp>, now: Timestamp) -> SignedDuration {
    let recent = || {
        departures
            .iter()
            .filter(|at| now.duration_since(**at) <= WINDOW)
    };
    let count = i32::try_from(recent().count()).unwrap_or(i32::MAX);
    let mean = match (recent().next(), count) {
        (Some(oldest), 2..) => now.duration_since(*oldest) / count,
        _ if departures.is_empty() => UNKNOWN,
        _ => now
            .duration_since(departures.back().copied().unwrap_or(now))
            .max(UNKNOWN),
    };
    let whole = SignedDuration::from_secs(mean.as_secs() + i64::from(mean.subsec_nanos() > 0));
    whole.clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(departures: impl IntoIterator<Item = i64>, now_ms: i64) -> i64 {
        let mut known = Departures::default();
        for at in departures {
            known.note(Timestamp::from_millisecond(at).unwrap());
        }
        known
            .retry_after(Timestamp::from_millisecond(now_ms).unwrap())
            .as_secs()
    }

    // [ORCHCORE-045]
    #[test]
    fn who_finds_the_queue_full_is_told_the_time_in_which_a_job_leaves() {
        // A departure every 3 s.
        assert_eq!(told((0..20).map(|i| i * 3000), 60_000), 3);
        // Departures faster than one per second.
        assert_eq!(told((0..50).map(|i| i * 10), 500), 1);
        // A stalled queue yields ever longer times, up to a minute.
        assert_eq!(told([0, 1000], 40_000), 20);
        assert_eq!(told([0, 1000], 290_000), 60);
        assert_eq!(told([0, 1000], 10_000_000), 60);
        // No departures are known.
        assert_eq!(told([], 1000), 5);
        // The clock was set back.
        assert_eq!(told([5000, 6000], 0), 1);
    }
}
