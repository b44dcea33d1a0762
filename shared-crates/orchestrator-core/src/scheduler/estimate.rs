//! Estimates of a waiting job's start, based on measured times.

use std::collections::{HashMap, VecDeque};

use jiff::SignedDuration;
use pool_core::ModelRef;

/// Number of measurements kept per model and kind.
const KEPT: usize = 32;

/// Measured times, by model.
#[derive(Debug, Clone, Default)]
pub(super) struct Estimates {
    /// Run times of jobs.
    service: HashMap<ModelRef, Recent>,
    /// Load times of workers.
    starts: HashMap<ModelRef, Recent>,
}

/// The latest measurements, at most [`KEPT`].
#[derive(Debug, Clone, Default)]
struct Recent(VecDeque<SignedDuration>);

impl Recent {
    fn note(&mut self, took: SignedDuration) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(took.max(SignedDuration::ZERO));
    }

    fn mean(&self) -> Option<SignedDuration> {
        let count = i32::try_from(self.0.len())
            .ok()
            .filter(|count| *count > 0)?;
        Some(self.0.iter().sum::<SignedDuration>() / count)
    }
}

impl Estimates {
    /// Records the run time of a job.
    pub(super) fn completed(&mut self, model: &ModelRef, took: SignedDuration) {
        self.service.entry(model.clone()).or_default().note(took);
    }

    /// Records the load time of a worker.
    pub(super) fn started(&mut self, model: &ModelRef, took: SignedDuration) {
        self.starts.entry(model.clone()).or_default().note(took);
    }

    /// Returns the time until a job starts that has `before` jobs ahead of it, if all `slots` slots are in use. On average, a
    /// slot becomes free every `slots`th part of a job's run time.
    pub(super) fn turn(
        &self,
        model: &ModelRef,
        before: usize,
        slots: u32,
    ) -> Option<SignedDuration> {
        let mean = self.service.get(model)?.mean()?;
        let places = i32::try_from(before + 1).ok()?;
        let slots = i32::try_from(slots.max(1)).ok()?;
        mean.checked_mul(places)?.checked_div(slots)
    }

    /// Returns the time until a job starts that has `before` jobs ahead of it and waits for a worker that has been loading for
    /// `since`.
    pub(super) fn start(
        &self,
        model: &ModelRef,
        before: usize,
        since: SignedDuration,
    ) -> Option<SignedDuration> {
        let rest = (self.starts.get(model)?.mean()? - since).max(SignedDuration::ZERO);
        if before == 0 {
            return Some(rest);
        }
        rest.checked_add(self.turn(model, before - 1, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // [ORCHCORE-067]
    #[test]
    fn estimates_come_from_measured_times_and_are_unknown_without() {
        let model: ModelRef = "m".parse().unwrap();
        let seconds = SignedDuration::from_secs;
        let mut known = Estimates::default();
        assert_eq!(known.turn(&model, 0, 1), None);
        assert_eq!(known.start(&model, 0, seconds(0)), None);
        known.completed(&model, seconds(10));
        known.completed(&model, seconds(20));
        assert_eq!(known.turn(&model, 0, 1), Some(seconds(15)));
        assert_eq!(known.turn(&model, 3, 2), Some(seconds(30)));
        known.started(&model, seconds(40));
        assert_eq!(known.start(&model, 0, seconds(30)), Some(seconds(10)));
        assert_eq!(known.start(&model, 2, seconds(90)), Some(seconds(30)));
        assert_eq!(known.turn(&"other".parse().unwrap(), 0, 1), None);
    }
}
