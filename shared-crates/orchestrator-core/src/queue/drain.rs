//! How fast the queue drains.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};

/// Departures that are remembered.
const KEPT: usize = 64;
/// Older departures say nothing about now.
const WINDOW: SignedDuration = SignedDuration::from_mins(5);
/// What is said where too little is known.
const UNKNOWN: SignedDuration = SignedDuration::from_secs(5);
/// The shortest and the longest time that is told.
const BOUNDS: (SignedDuration, SignedDuration) =
    (SignedDuration::from_secs(1), SignedDuration::from_secs(60));

/// When jobs left the queue lately.
#[derive(Debug, Clone, Default)]
pub struct Departures {
    at: VecDeque<Timestamp>,
}

impl Departures {
    /// Notes that a job left the queue.
    pub fn note(&mut self, now: Timestamp) {
        if self.at.len() == KEPT {
            self.at.pop_front();
        }
        self.at.push_back(now);
    }

    /// When somebody who found the queue full should come back: the time in which one job leaves, in whole seconds.
    pub fn retry_after(&self, now: Timestamp) -> SignedDuration {
        retry_after(&self.at, now)
    }
}

/// The mean time between departures up to now, so that a queue that stands still is given ever more time. Whole seconds
/// from 1 to 60.
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
    whole.clamp(BOUNDS.0, BOUNDS.1)
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
        // One every 3 s.
        assert_eq!(told((0..20).map(|i| i * 3000), 60_000), 3);
        // Faster than seconds can tell.
        assert_eq!(told((0..50).map(|i| i * 10), 500), 1);
        // It has stood still since: ever longer, up to a minute.
        assert_eq!(told([0, 1000], 40_000), 20);
        assert_eq!(told([0, 1000], 290_000), 60);
        assert_eq!(told([0, 1000], 10_000_000), 60);
        // Nothing is known.
        assert_eq!(told([], 1000), 5);
        // A clock that was set back.
        assert_eq!(told([5000, 6000], 0), 1);
    }
}
