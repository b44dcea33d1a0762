//! Detection of stalled workers. An answer to `/health` only proves that the process can answer, so a worker counts as moving
//! only if its progress counter increases while it has work.
//!
//! The watcher looks at a worker at regular intervals, and sums up the time between looks. A look comes late if the watcher or
//! the host was suspended. Such a gap counts as no time, so that a worker does not appear stuck because it was not watched. If
//! several consecutive looks are late, the host is merely slow, and each gap counts as the longest regular step.

use std::time::{Duration, Instant};

use crate::api::worker::{HealthState, WorkerHealth};
use crate::kit::units::human_duration;
use crate::worker::Backend;

/// Longest regular time between two looks.
const LONGEST_STEP: Duration = Duration::from_secs(3);
/// Number of consecutive looks without progress before a worker counts as stalled. A single look may come at a bad moment.
const LEAST_LOOKS: u32 = 3;
/// Slowest believable source of a model, in bytes per second.
const LOAD_BYTES_PER_S: u64 = 100_000_000;
/// Assumed share of the largest tensor in a file, as a divisor. The largest tensor is the longest step of loading.
const LARGEST_TENSOR_PART: u64 = 4;
/// Bytes of weights that a slow CPU with one thread processes per second for the 64 tokens of a prefill chunk. A worker
/// progresses with every layer, so a limit for the whole chunk leaves room for neighbours on the same CPU.
const CPU_CHUNK_BYTES_PER_S: u64 = 32_000_000;
/// The same rate for a slow GPU.
const GPU_CHUNK_BYTES_PER_S: u64 = 320_000_000;

/// The time limits for a worker without progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Limit between two steps of loading.
    pub load: Duration,
    /// Limit between two tokens, or two chunks of a prompt.
    pub compute: Duration,
    /// Limit for a missing answer while the worker is idle.
    pub answer: Duration,
}

impl Deadlines {
    /// Returns the deadlines of a worker for a model file of this size: at least `floor`, and longer for large files.
    pub fn of(file_bytes: u64, backend: Backend, floor: Duration) -> Self {
        let rate = match backend {
            Backend::Cpu => CPU_CHUNK_BYTES_PER_S,
            Backend::Cuda | Backend::Metal => GPU_CHUNK_BYTES_PER_S,
        };
        let at_least_floor = |seconds| floor.max(Duration::from_secs(seconds));
        Self {
            load: at_least_floor(file_bytes / LARGEST_TENSOR_PART / LOAD_BYTES_PER_S),
            compute: at_least_floor(file_bytes / rate),
            answer: floor,
        }
    }
}

/// The activity of a worker, according to its last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// The worker is loading, or has not answered yet.
    Loading,
    /// The worker runs this many sequences.
    Work(u32),
    /// The worker is idle.
    Rest,
    /// The worker has reported that it can't serve, after which it should end.
    Ending,
}

/// The diagnosis of a worker that makes no progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stall {
    at: At,
    /// True if the worker still answers `/health`.
    answers: bool,
    /// Time without progress, counting only watched time.
    pub stood_for: Duration,
    /// Deadline that was exceeded.
    pub limit: Duration,
    /// Progress counter of the worker; `None` if the worker never reported one.
    pub progress: Option<u64>,
}

impl std::fmt::Display for Stall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match (self.at, self.answers) {
            (At::Loading, _) => "no loading progress".to_owned(),
            (At::Work(1), _) => "no token or prompt progress with 1 sequence running".to_owned(),
            (At::Work(active), _) => {
                format!("no token or prompt progress with {active} sequences running")
            }
            (At::Rest, _) => "no answer while idle".to_owned(),
            (At::Ending, _) => "gave up but did not exit".to_owned(),
        };
        write!(
            f,
            "{what} for {} (limit {})",
            human_duration(self.stood_for),
            human_duration(self.limit)
        )?;
        if let Some(progress) = self.progress {
            write!(f, ", at progress {progress}")?;
        }
        // The answer distinguishes a stopped process from a stuck computation.
        match (self.at, self.answers) {
            (At::Rest, _) => Ok(()),
            (_, true) => f.write_str("; /health still answers"),
            (_, false) => f.write_str("; /health does not answer"),
        }
    }
}

/// The observation of one process of a worker, look by look.
#[derive(Debug, Clone)]
pub struct ProgressWatch {
    deadlines: Deadlines,
    at: At,
    progress: Option<u64>,
    looked_at: Instant,
    late: bool,
    watched_for: Duration,
    stood_for: Duration,
    looks: u32,
}

impl ProgressWatch {
    /// Starts watching at `now`.
    pub fn new(deadlines: Deadlines, now: Instant) -> Self {
        Self {
            deadlines,
            at: At::Loading,
            progress: None,
            looked_at: now,
            late: false,
            watched_for: Duration::ZERO,
            stood_for: Duration::ZERO,
            looks: 0,
        }
    }

    /// Returns how long the worker was watched, excluding time in which the watcher itself did not run.
    pub fn watched_for(&self) -> Duration {
        self.watched_for
    }

    /// Notes that the worker has reported its model as loaded, possibly before the watch began.
    pub fn heard_ready(&mut self) {
        if self.at == At::Loading {
            self.at = At::Rest;
            (self.stood_for, self.looks) = (Duration::ZERO, 0);
        }
    }

    /// Notes a look that ended at `now`, with the worker's answer if there was one. Returns the stall if the worker has
    /// exceeded its deadline.
    pub fn look(&mut self, now: Instant, answer: Option<&WorkerHealth>) -> Option<Stall> {
        let passed = now.saturating_duration_since(self.looked_at);
        let late_before = std::mem::replace(&mut self.late, passed > LONGEST_STEP);
        // Only the first of several late looks is taken for a suspension.
        let step = if self.late && !late_before {
            Duration::ZERO
        } else {
            passed.min(LONGEST_STEP)
        };
        self.looked_at = now;
        self.watched_for += step;
        let moved = answer.is_some_and(|health| {
            let at = match health.state {
                HealthState::Loading => At::Loading,
                HealthState::Ready if health.active == 0 => At::Rest,
                HealthState::Ready => At::Work(health.active),
                HealthState::Failed => At::Ending,
            };
            let moved = at == At::Rest
                || self.progress != Some(health.progress)
                || std::mem::discriminant(&at) != std::mem::discriminant(&self.at);
            (self.at, self.progress) = (at, Some(health.progress));
            moved
        });
        if moved {
            (self.stood_for, self.looks) = (Duration::ZERO, 0);
            return None;
        }
        self.stood_for += step;
        self.looks += 1;
        let limit = match self.at {
            At::Loading => self.deadlines.load,
            At::Work(_) => self.deadlines.compute,
            At::Rest | At::Ending => self.deadlines.answer,
        };
        (self.stood_for >= limit && self.looks >= LEAST_LOOKS).then_some(Stall {
            at: self.at,
            answers: answer.is_some(),
            stood_for: self.stood_for,
            limit,
            progress: self.progress,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Deadlines = Deadlines {
        load: Duration::from_secs(20),
        compute: Duration::from_secs(10),
        answer: Duration::from_secs(5),
    };

    fn health(state: HealthState, active: u32, progress: u64) -> WorkerHealth {
        WorkerHealth {
            worker_id: "worker-cpu-0".into(),
            nonce: "nonce".into(),
            state,
            load_percent: 0,
            reason: None,
            model_ref: None,
            sha256: None,
            context_length: None,
            slots: 1,
            active,
            cache: None,
            measured_bytes: None,
            progress,
        }
    }

    /// A watch with one look per second, and its current time.
    struct Clock(ProgressWatch, Instant);

    impl Clock {
        fn new() -> Self {
            let now = Instant::now();
            Self(ProgressWatch::new(LIMITS, now), now)
        }

        fn after(&mut self, pause_s: u64, answer: Option<&WorkerHealth>) -> Option<Stall> {
            self.1 += Duration::from_secs(pause_s);
            self.0.look(self.1, answer)
        }

        /// Returns the seconds and the message of a stall, repeating one answer every second.
        fn until_stalled(&mut self, answer: Option<&WorkerHealth>) -> Option<(u64, String)> {
            (1..=60).find_map(|s| Some((s, self.after(1, answer)?.to_string())))
        }
    }

    #[test] // [POOLD-060]
    fn a_stall_is_distinguished_from_progress_in_every_phase() {
        let stalled_after = |first: Option<WorkerHealth>, then: Option<WorkerHealth>| {
            let mut clock = Clock::new();
            if first.is_some() {
                assert_eq!(clock.after(1, first.as_ref()), None);
            }
            clock.until_stalled(then.as_ref())
        };
        let loading = health(HealthState::Loading, 0, 7);
        let busy = health(HealthState::Ready, 1, 90);
        let idle = health(HealthState::Ready, 0, 90);
        let failed = health(HealthState::Failed, 0, 8);
        for (first, then, seconds, message) in [
            (
                None,
                None,
                20,
                "no loading progress for 20s (limit 20s); /health does not answer",
            ),
            (
                Some(&loading),
                Some(&loading),
                20,
                "no loading progress for 20s (limit 20s), at progress 7; /health still answers",
            ),
            (
                Some(&loading),
                None,
                20,
                "no loading progress for 20s (limit 20s), at progress 7; /health does not answer",
            ),
            (
                Some(&busy),
                Some(&busy),
                10,
                "no token or prompt progress with 1 sequence running for 10s (limit 10s), at progress 90; /health still answers",
            ),
            (
                Some(&busy),
                None,
                10,
                "no token or prompt progress with 1 sequence running for 10s (limit 10s), at progress 90; /health does not answer",
            ),
            (
                Some(&idle),
                None,
                5,
                "no answer while idle for 5s (limit 5s), at progress 90",
            ),
            (
                Some(&failed),
                Some(&failed),
                5,
                "gave up but did not exit for 5s (limit 5s), at progress 8; /health still answers",
            ),
        ] {
            assert_eq!(
                stalled_after(first.cloned(), then.cloned()),
                Some((seconds, message.to_owned()))
            );
        }
        assert_eq!(
            stalled_after(None, Some(idle)),
            None,
            "an idle worker need not make progress"
        );
    }

    #[test] // [POOLD-060]
    fn one_step_in_time_is_enough() {
        let mut clock = Clock::new();
        for progress in 0..20 {
            for _ in 0..9 {
                assert_eq!(
                    clock.after(1, Some(&health(HealthState::Ready, 1, progress))),
                    None
                );
            }
        }
        // Work that begins after a long rest gets its full deadline.
        assert_eq!(
            clock.after(1, Some(&health(HealthState::Ready, 0, 20))),
            None
        );
        let begun = health(HealthState::Ready, 1, 20);
        assert_eq!(clock.after(1, Some(&begun)), None);
        assert_eq!(clock.until_stalled(Some(&begun)).map(|(s, _)| s), Some(10));
    }

    #[test] // [POOLD-061]
    fn unwatched_time_does_not_count() {
        let mut clock = Clock::new();
        let busy = health(HealthState::Ready, 1, 90);
        assert_eq!(clock.after(1, Some(&busy)), None);
        // The host was asleep, or the daemon was stopped, for a day, and the worker has not run yet.
        assert_eq!(clock.after(86_400, None), None);
        assert_eq!(clock.0.watched_for(), Duration::from_secs(1));
        for _ in 0..9 {
            assert_eq!(clock.after(1, None), None);
        }
        assert!(clock.after(1, None).is_some());
        // If every look is late, a stuck worker is still found: each look after the first counts as three seconds.
        let mut clock = Clock::new();
        assert_eq!(clock.after(1, Some(&busy)), None);
        let looks = (1..).find(|_| clock.after(60, Some(&busy)).is_some());
        assert_eq!(looks, Some(5));
    }

    #[test] // [POOLD-060]
    fn what_is_heard_of_a_worker_between_two_looks_counts() {
        let mut clock = Clock::new();
        let loading = health(HealthState::Loading, 0, 7);
        assert_eq!(clock.after(1, Some(&loading)), None);
        clock.0.heard_ready();
        let (seconds, message) = clock.until_stalled(None).unwrap();
        assert!(
            seconds == 5 && message.starts_with("no answer"),
            "{message}"
        );
    }

    #[test] // [POOLD-061]
    fn one_look_alone_never_decides() {
        let now = Instant::now();
        let short = Duration::from_secs(1);
        let limits = Deadlines {
            load: short,
            compute: short,
            answer: short,
        };
        let mut watch = ProgressWatch::new(limits, now);
        for late in [9, 18] {
            assert_eq!(watch.look(now + Duration::from_secs(late), None), None);
        }
        assert!(watch.look(now + Duration::from_secs(27), None).is_some());
    }

    #[test] // [POOLD-060]
    fn deadlines_grow_with_the_model_and_have_a_floor() {
        let floor = Duration::from_secs(30);
        let seconds = |bytes, backend| {
            let of = Deadlines::of(bytes, backend, floor);
            (of.load.as_secs(), of.compute.as_secs(), of.answer.as_secs())
        };
        assert_eq!(seconds(98_362_432, Backend::Cpu), (30, 30, 30));
        assert_eq!(seconds(4_000_000_000, Backend::Cpu), (30, 125, 30));
        assert_eq!(seconds(40_000_000_000, Backend::Cpu), (100, 1250, 30));
        assert_eq!(seconds(40_000_000_000, Backend::Cuda), (100, 125, 30));
        assert_eq!(seconds(u64::MAX, Backend::Metal).2, 30);
    }

    proptest! {
        // [POOLD-060] For any history, a worker that moves within each limit is never stuck, and one that stops moving is
        // found.
        #[test]
        fn movers_live_and_the_stuck_are_found(steps in proptest::collection::vec((0u64..3, any::<bool>()), 0..60)) {
            let mut clock = Clock::new();
            let mut progress = 0;
            for (pause, answers) in steps {
                progress += 1;
                let busy = health(HealthState::Ready, 1, progress);
                // At most two seconds without an answer, then a step.
                prop_assert_eq!(clock.after(pause, answers.then_some(&busy)), None);
                prop_assert_eq!(clock.after(1, Some(&busy)), None);
            }
            let stuck = health(HealthState::Ready, 1, progress);
            prop_assert!(clock.until_stalled(Some(&stuck)).is_some());
            prop_assert!(Clock::new().until_stalled(None).is_some());
        }
    }
}
