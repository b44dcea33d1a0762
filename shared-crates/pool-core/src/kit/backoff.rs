//! Exponential backoff: pauses between tries that double from one failure to the next.

use std::time::Duration;

/// The bounds of a backoff.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Pause after the first failure.
    pub first: Duration,
    /// Longest pause.
    pub longest: Duration,
}

impl Backoff {
    /// Returns the pause after `failures` failures in a row; 0 counts as 1.
    pub fn after(&self, failures: u32) -> Duration {
        let doubled = 1 << failures.saturating_sub(1).min(16);
        self.first.saturating_mul(doubled).min(self.longest)
    }

    /// Returns the pause that follows one of length `pause`.
    pub fn next(&self, pause: Duration) -> Duration {
        pause.saturating_mul(2).min(self.longest)
    }

    /// Returns a part of a pause, from half (`roll` 0) to the whole (`roll` 1) in whole milliseconds, so that callers that failed
    /// together do not try again together.
    pub fn spread(pause: Duration, roll: f64) -> Duration {
        let part = pause.mul_f64(0.5 + roll.clamp(0.0, 1.0) / 2.0);
        Duration::from_millis(u64::try_from(part.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_their_bounds() {
        let backoff = Backoff {
            first: Duration::from_millis(250),
            longest: Duration::from_secs(5),
        };
        let ms = |failures| backoff.after(failures).as_millis();
        let pauses = [0, 1, 2, 3, 5, 6, u32::MAX].map(ms);
        assert_eq!(pauses, [250, 250, 500, 1000, 4000, 5000, 5000]);
        let next = |ms| backoff.next(Duration::from_millis(ms)).as_millis();
        assert_eq!([250, 4000, 5000].map(next), [500, 5000, 5000]);
        let part = |roll| Backoff::spread(backoff.first, roll).as_millis();
        assert_eq!(
            [-1.0, 0.0, 0.5, 1.0, 2.0].map(part),
            [125, 125, 187, 250, 250]
        );
    }
}
