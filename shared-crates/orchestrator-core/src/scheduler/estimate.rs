//! When a waiting job starts, from how long others took.

use std::collections::{HashMap, VecDeque};

use jiff::SignedDuration;
use pool_core::ModelRef;

/// Times that are remembered of each kind.
const KEPT: usize = 32;

/// Measured times.
#[derive(Debug, Clone, Default)]
pub(super) struct Estimates {
    /// How long jobs ran, by model.
    service: HashMap<ModelRef, Recent>,
    /// How long workers took to come up, by model.
    starts: HashMap<ModelRef, Recent>,
}

/// The latest times.
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
    /// Notes how long a job ran.
    pub(super) fn completed(&mut self, model: &ModelRef, took: SignedDuration) {
        self.service.entry(model.clone()).or_default().note(took);
    }

    /// Notes how long a worker took to come up.
    pub(super) fn started(&mut self, model: &ModelRef, took: SignedDuration) {
        self.starts.entry(model.clone()).or_default().note(took);
    }

    /// How long until a job runs that has `before` jobs before it, where `slots` jobs run at a time and all slots are
    /// taken: one leaves in each `slots`th part of a job's time.
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

    /// How long until a job runs that has `before` jobs before it and waits for a worker that has been starting for
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
