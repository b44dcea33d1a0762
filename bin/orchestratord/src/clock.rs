//! The clock for durations in orchestratord, and the clock for shown times.
//!
//! Durations (timeouts, backoff, liveness, retention) need a time that never steps, not even across a restart. [`now`]
//! is a point of the database's *timeline*: the timeline begins with the wall clock when the database is created, grows
//! by the time that this process runs, and continues from the same point at the next start (`state::sqlite::timeline`). The
//! wall clock can't move the timeline, so a wrong clock neither ends a wait nor deletes a record.
//!
//! [`wall`] converts a point of the timeline to wall-clock time. Only shown and stored wall-clock times follow the wall
//! clock.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use pool_core::kit::clock;

/// Smallest difference, in microseconds, that counts as a step. Smaller differences are the clock's own drift.
const STEP_US: i64 = 500_000;

/// The timeline and the wall clock in this process, in microseconds.
struct Reckoning {
    /// The point of the timeline at which the process's own time began.
    start: AtomicI64,
    /// Lead of the wall clock over the timeline, as of its latest step. Negative if the wall clock is behind.
    ahead: AtomicI64,
}

#[cfg(not(test))]
fn with_reckoning<T>(work: impl FnOnce(&Reckoning) -> T) -> T {
    static RECKONING: std::sync::LazyLock<Reckoning> = std::sync::LazyLock::new(Reckoning::new);
    work(&RECKONING)
}

/// Gives each thread its own timeline. A process normally has one database and so one timeline, but tests in one process open
/// many databases, each on its own thread.
#[cfg(test)]
fn with_reckoning<T>(work: impl FnOnce(&Reckoning) -> T) -> T {
    thread_local!(static RECKONING: Reckoning = Reckoning::new());
    RECKONING.with(work)
}

impl Reckoning {
    /// Returns a timeline that begins with the wall clock.
    fn new() -> Self {
        Self {
            start: AtomicI64::new(Timestamp::now().as_microsecond() - ran_us()),
            ahead: AtomicI64::new(0),
        }
    }

    fn now_us(&self) -> i64 {
        self.start.load(Ordering::Relaxed).saturating_add(ran_us())
    }

    fn resume(&self, point: Timestamp) {
        let start = point.as_microsecond().saturating_sub(ran_us());
        self.start.store(start, Ordering::Relaxed);
    }

    fn wall(&self, point: Timestamp) -> Timestamp {
        let ahead = Timestamp::now().as_microsecond() - self.now_us();
        let known = self.ahead.load(Ordering::Relaxed);
        let ahead = if (ahead - known).abs() > STEP_US {
            self.ahead.store(ahead, Ordering::Relaxed);
            ahead
        } else {
            known
        };
        at(point.as_microsecond().saturating_add(ahead))
    }
}

fn ran_us() -> i64 {
    i64::try_from(clock::elapsed().as_micros()).unwrap_or(i64::MAX)
}

fn at(us: i64) -> Timestamp {
    let range = (
        Timestamp::MIN.as_microsecond(),
        Timestamp::MAX.as_microsecond(),
    );
    Timestamp::from_microsecond(us.clamp(range.0, range.1)).unwrap_or_default()
}

/// Returns the present point of the timeline, in whole microseconds, so that a stored point reads back equal.
pub fn now() -> Timestamp {
    at(with_reckoning(Reckoning::now_us))
}

/// Makes `point` the present point of the timeline.
pub fn resume(point: Timestamp) {
    with_reckoning(|reckoning| reckoning.resume(point));
}

/// Returns the seconds since `at`; zero if it has not come.
pub fn seconds_since(at: Timestamp) -> f64 {
    now().duration_since(at).as_secs_f64().max(0.0)
}

/// Returns the time until `at`; zero if it has passed.
pub fn until(at: Timestamp) -> Duration {
    at.duration_since(now()).try_into().unwrap_or_default()
}

/// Returns the wall-clock time at a point of the timeline, as of the clock's latest step.
pub fn wall(point: Timestamp) -> Timestamp {
    with_reckoning(|reckoning| reckoning.wall(point))
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    // [ORCHD-220] P25
    #[test]
    fn the_timeline_is_apart_from_the_wall_clock_and_shown_times_are_not() {
        let reckoning = Reckoning::new();
        let far_from_wall = |at| reckoning.wall(at).duration_since(Timestamp::now()).abs();
        let second = SignedDuration::from_secs(1);
        assert!(far_from_wall(at(reckoning.now_us())) < second);
        let point = Timestamp::from_second(86_400).unwrap();
        reckoning.resume(point);
        let passed = reckoning.now_us() - point.as_microsecond();
        assert!((0..5_000_000).contains(&passed), "{passed}");
        assert!(far_from_wall(at(reckoning.now_us())) < second);
        // Durations between shown times are exact.
        let later = reckoning.wall(point + second * 3);
        assert_eq!(later.duration_since(reckoning.wall(point)), second * 3);
    }
}
