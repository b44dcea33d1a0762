//! A clock that never steps and leaves out the time in which this process did not run.
//!
//! The wall clock steps: by an hour, by years, in both directions. Durations are therefore measured with the time since
//! the host's boot, which only increases and includes sleep. A process that was stopped or suspended could mistake its
//! own absence for the silence of others, so [`elapsed`] leaves out the gaps in which this process did not run. A
//! dedicated thread reads the clock several times a second; a reading much later than the previous one ends a gap.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Interval between two readings of the watching thread.
const TICK: Duration = Duration::from_millis(100);
/// Longest time between two readings that does not count as a gap: a busy host may run the thread late.
const LATE: Duration = Duration::from_millis(500);

/// The clock that includes sleep. On macOS, that is the monotonic clock.
#[cfg(target_os = "macos")]
const BOOT: ClockId = ClockId::Monotonic;
#[cfg(not(target_os = "macos"))]
const BOOT: ClockId = ClockId::Boottime;

/// Returns the time since the host's boot, including sleep.
pub fn since_boot() -> Duration {
    let time = clock_gettime(BOOT);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Returns the time since the clock's first use, without gaps. Never decreases.
pub fn elapsed() -> Duration {
    OWN.read().ran
}

/// Returns the total length of the gaps since the clock's first use.
pub fn stood() -> Duration {
    OWN.read().stood
}

static OWN: LazyLock<Own> = LazyLock::new(Own::start);

struct Own {
    /// True while the watching thread runs. Without it, a long time between two readings proves no gap.
    watched: bool,
    reading: Mutex<Reading>,
}

impl Own {
    fn start() -> Self {
        let watch = || {
            loop {
                thread::sleep(TICK);
                OWN.read();
            }
        };
        let thread = thread::Builder::new().name("clock".into()).spawn(watch);
        if let Err(error) = &thread {
            tracing::warn!(%error, "could not start the clock thread; suspensions go unnoticed");
        }
        Self {
            watched: thread.is_ok(),
            reading: Mutex::new(Reading::new(since_boot())),
        }
    }

    fn read(&self) -> Reading {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        // Read the clock under the lock, so that readings stay in order.
        let gap = reading.advance(since_boot(), self.watched);
        let copy = *reading;
        drop(reading);
        if let Some(gap) = gap {
            let gap_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
            tracing::warn!(
                gap_ms,
                "process was suspended; deadlines extended by the gap"
            );
        }
        copy
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    at: Duration,
    ran: Duration,
    stood: Duration,
}

impl Reading {
    fn new(at: Duration) -> Self {
        Self {
            at,
            ran: Duration::ZERO,
            stood: Duration::ZERO,
        }
    }

    /// Records a reading, the time since boot, and returns the gap that it ends, if any.
    fn advance(&mut self, now: Duration, watched: bool) -> Option<Duration> {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let gap = (watched && passed > LATE).then(|| passed - TICK);
        self.ran += passed - gap.unwrap_or_default();
        self.stood += gap.unwrap_or_default();
        gap
    }
}

/// A wait that timed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

/// Waits for `work` for at most `limit`. After a gap, the limit starts again: the outcome may have arrived while this
/// process did not run, and needs a moment to be processed.
#[cfg(any(feature = "client", feature = "service"))]
pub async fn timeout<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut work = std::pin::pin!(work);
    let mut patience = std::pin::pin!(Patience::new(limit));
    tokio::select! {
        biased;
        outcome = &mut work => Ok(outcome),
        () = &mut patience => Err(Elapsed),
    }
}

/// A timer that ends after `limit` without a gap, measured from the latest [`Patience::renew`].
#[cfg(any(feature = "client", feature = "service"))]
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    stood: Duration,
    timer: std::pin::Pin<Box<tokio::time::Sleep>>,
}

#[cfg(any(feature = "client", feature = "service"))]
impl Patience {
    /// Returns a timer that starts now.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            stood: stood(),
            timer: Box::pin(tokio::time::sleep(limit)),
        }
    }

    /// Starts the limit again.
    pub fn renew(&mut self) {
        let end = tokio::time::Instant::now() + self.limit;
        self.timer.as_mut().reset(end);
    }
}

#[cfg(any(feature = "client", feature = "service"))]
impl Future for Patience {
    type Output = ();

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<()> {
        loop {
            std::task::ready!(self.timer.as_mut().poll(context));
            // The timer's clock includes gaps, so the timer may end before data that arrived in a gap is read.
            let stood = stood();
            if stood == self.stood {
                return std::task::Poll::Ready(());
            }
            self.stood = stood;
            self.renew();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test] // [POOLCORE-160] P25
    fn a_gap_does_not_count_as_time_that_passed() {
        let mut reading = Reading::new(MS(5_000));
        for at in [5_100, 5_200, 5_600] {
            assert_eq!(reading.advance(MS(at), true), None);
        }
        assert_eq!(reading.advance(MS(95_600), true), Some(MS(89_900)));
        assert_eq!((reading.ran, reading.stood), (MS(700), MS(89_900)));
        // A clock that goes back, for example in a restored virtual machine, has no effect.
        assert_eq!(reading.advance(MS(1), true), None);
        assert_eq!(reading.advance(MS(95_700), true), None);
        assert_eq!(reading.ran, MS(800));
    }

    #[test]
    fn without_the_thread_nothing_is_a_gap() {
        let mut reading = Reading::new(MS(0));
        assert_eq!(reading.advance(MS(90_000), false), None);
        assert_eq!(reading.ran, MS(90_000));
    }

    #[test]
    fn own_time_passes() {
        let before = (since_boot(), elapsed());
        thread::sleep(MS(20));
        // In the reverse order of the first readings, so that the span of the second clock lies within that of the first.
        let own = elapsed() - before.1;
        let passed = (since_boot() - before.0, own);
        assert!(passed.0 >= MS(20) && passed.1 <= passed.0, "{passed:?}");
        assert!(passed.1 >= MS(20) || stood() > Duration::ZERO);
    }
}
