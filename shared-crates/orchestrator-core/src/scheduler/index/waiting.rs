//! Explanations and estimates for waiting jobs.

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::{SignedDuration, Timestamp};
use pool_core::worker::WorkerStatus;

use super::{Index, Waiting};
use crate::job::JobId;
use crate::queue::TurnKey;
use crate::scheduler::explain::{self, Explanation};
use crate::scheduler::judge::{Held, World, alive};
use crate::scheduler::snapshot::{PoolState, WorkerState};
use crate::scheduler::wait_reason::WaitReason;

impl Index {
    /// Returns the reason that the job waits; `None` if it does not wait.
    pub fn waiting(&mut self, id: JobId, now: Timestamp) -> Option<Waiting> {
        let mut known = HashMap::new();
        self.waiting_with(id, now, &mut known)
    }

    /// Returns the reasons for those of the jobs that wait. An explanation is computed once for all jobs of a class.
    pub fn waiting_all(
        &mut self,
        ids: impl IntoIterator<Item = JobId>,
        now: Timestamp,
    ) -> Vec<(JobId, Waiting)> {
        let mut known = HashMap::new();
        ids.into_iter()
            .filter_map(|id| Some((id, self.waiting_with(id, now, &mut known)?)))
            .collect()
    }

    fn waiting_with(
        &mut self,
        id: JobId,
        now: Timestamp,
        known: &mut HashMap<usize, Arc<Explanation>>,
    ) -> Option<Waiting> {
        let position = self.position(id, now)?;
        let job = Arc::clone(self.line().get(id)?);
        let (key, class) = self.place_of(id)?;
        if job.backs_off(now) {
            return Some(Waiting {
                position,
                explanation: Arc::new(explain::backing_off(&job, now)),
                estimated_start: job.not_before.map(|at| at.duration_since(now)),
            });
        }
        let explanation = match known.get(&class) {
            Some(explanation) => Arc::clone(explanation),
            None => {
                let explanation = Arc::new(self.explain(class, now)?);
                known.insert(class, Arc::clone(&explanation));
                explanation
            }
        };
        let estimated_start = self.estimate(class, key, explanation.reason, now);
        Some(Waiting {
            position,
            explanation,
            estimated_start,
        })
    }

    fn explain(&self, class: usize, now: Timestamp) -> Option<Explanation> {
        let jobs = self.classes[class].as_ref()?;
        let pools: Vec<&PoolState> = self
            .ordered_places()
            .into_iter()
            .filter_map(|place| Some(self.pools[place].as_ref()?.state.as_ref()))
            .collect();
        let held = match jobs.ready.first() {
            Some(first) => self.held(class, *first),
            None => Vec::new(),
        };
        let explain = |world: &World<'_>| explain::explain(&jobs.class, &pools, world);
        Some(self.with_world(now, Held(&held), explain))
    }

    /// Estimates the time until a job of the class starts.
    fn estimate(
        &self,
        class: usize,
        key: TurnKey,
        reason: WaitReason,
        now: Timestamp,
    ) -> Option<SignedDuration> {
        let jobs = self.classes[class].as_ref()?;
        let rivals = self.models[jobs.model].classes.iter();
        let rivals = rivals.filter_map(|&(_, rival)| self.classes[rival].as_ref());
        let before: usize = rivals.map(|rival| rival.ready.range(..key).count()).sum();
        let mine: Vec<&WorkerState> = self
            .pools
            .iter()
            .flatten()
            .filter(|pool| alive(&pool.state))
            .flat_map(|pool| pool.state.workers.iter().map(|w| (&pool.state.id, w)))
            .filter(|(pool, w)| jobs.class.admits_worker(pool, w))
            .map(|(_, w)| w)
            .collect();
        let model = &jobs.class.model;
        match reason {
            WaitReason::SlotsBusy => {
                let slots = mine.iter().filter(|w| w.serves()).map(|w| w.slots).sum();
                self.estimates.turn(model, before, slots)
            }
            WaitReason::WorkerStarting => {
                let starting = mine.iter().filter(|w| w.status == WorkerStatus::Starting);
                let since = starting.map(|w| w.created_at).min()?;
                self.estimates
                    .start(model, before, now.duration_since(since))
            }
            _ => None,
        }
    }
}
