//! Judgement of a class with the help of the index.

use jiff::Timestamp;
use pool_core::worker::{Device, WorkerStatus};

use super::{Free, Index, Jobs, Scope};
use crate::queue::{QueuedJob, TurnKey};
use crate::scheduler::judge::{
    EvictionKey, Held, Verdict, Wish, World, alive, eviction_key, fitting, judge, next_spare,
    stopping, victims,
};
use crate::scheduler::policy::{Rank, StartChoice};
use crate::scheduler::snapshot::{PoolState, StartSize, WorkerState};
use crate::scheduler::wait_reason::WaitReason;

/// Sort key of possible starts.
type StartKey<'a> = (bool, Rank, &'a str, Device);

impl Index {
    pub(super) fn with_world<T>(
        &self,
        now: Timestamp,
        held: Held<'_>,
        work: impl FnOnce(&World<'_>) -> T,
    ) -> T {
        let needed = |pool: &str, worker: &WorkerState| {
            let Some(&model) = self.model_ids.get(&worker.model) else {
                return false;
            };
            let least = self.models[model].classes.iter();
            // Classes are sorted by context, so the rest need longer ones than the worker has.
            let mut classes = least.take_while(|(context, _)| *context <= worker.capacity());
            classes.any(|&(_, class)| {
                let jobs = self.classes[class].as_ref();
                jobs.is_some_and(|jobs| jobs.class.admits_worker(pool, worker))
            })
        };
        work(&World {
            now,
            settings: &self.settings,
            policy: self.policy,
            sizes: &self.sizes,
            needed: &needed,
            held,
        })
    }

    pub(super) fn prefers(&self, job: &QueuedJob) -> Option<&str> {
        let session = job.session_id.as_ref()?;
        Some(&self.sessions.get(session)?.0)
    }

    /// Returns the result of [`judge`], computed from the index, and the time at which the class is due for the next
    /// evaluation.
    pub(super) fn judge(
        &self,
        class: usize,
        job: &QueuedJob,
        key: TurnKey,
        now: Timestamp,
    ) -> (Verdict, Option<Timestamp>) {
        let Some(jobs) = &self.classes[class] else {
            return (Verdict::Wait(WaitReason::PolicyHeld), None);
        };
        let prefer = self.prefers(job);
        // If all free workers have the same context, a preference for a long one makes no difference, and the job's size is
        // irrelevant.
        let differ = self.models[jobs.model].free.len() > 1;
        let roomy = differ.then(|| jobs.class.context.max(job.context_wished()));
        let held = self.held(class, key);
        let held = Held(&held);
        let tokens = job.cache_expected();
        let free = |sure: bool| {
            let takes = |pool: &str, worker: &WorkerState| {
                jobs.class.finds_place(worker, tokens)
                    && (!sure || worker.surely_has_room(tokens))
                    && !held.keeps(pool, worker)
            };
            let free = |context| self.free_worker(jobs, prefer, context, held, &takes);
            roomy.and_then(free).or_else(|| free(jobs.class.context))
        };
        let some_may_refuse = self.models[jobs.model].short > 0;
        let found = some_may_refuse.then(|| free(true)).flatten();
        let found = found.or_else(|| free(false));
        if let Some((pool, worker)) = found {
            return (Verdict::Dispatch { pool, worker }, None);
        }
        let wish = Wish::of(job, prefer);
        self.with_world(now, held, |world| self.judge_starts(jobs, &wish, world))
    }

    /// Returns the best worker with a free slot and at least this context that suits the class and passes the test `takes`.
    fn free_worker(
        &self,
        jobs: &Jobs,
        prefer: Option<&str>,
        context: u32,
        held: Held<'_>,
        takes: &dyn Fn(&str, &WorkerState) -> bool,
    ) -> Option<(usize, usize)> {
        let class = &jobs.class;
        let on_pool = |name: &str| {
            let place = self.pool_place(name)?;
            let pool = self.pools[place].as_ref()?;
            let own = pool.worker_models.iter().enumerate();
            own.filter(|&(worker, &model)| {
                let state = &pool.state.workers[worker];
                model == jobs.model
                    && class.admits_device(state.device)
                    && state.capacity() >= context
                    && takes(name, state)
            })
            .filter_map(|(worker, _)| {
                Some((pool.ranks[worker]?, &pool.worker_names[worker], worker))
            })
            .min()
            .map(|(.., worker)| (place, worker))
        };
        if let Some(wanted) = &class.placement.pool {
            return on_pool(wanted);
        }
        // For most jobs, any free slot is a place, so the state of the workers need not be read.
        let model = &self.models[jobs.model];
        let any = class.cache == 0 && held.is_empty() && model.short == 0;
        prefer.and_then(on_pool).or_else(|| {
            let best = model.free(context).filter_map(|free| {
                let mut free = free.iter();
                free.find(|free| {
                    class.admits_device(free.device) && (any || self.is_at(free, takes))
                })
            });
            best.min().map(|free| (free.pool, free.worker))
        })
    }

    /// Returns whether the worker passes the test.
    fn is_at(&self, free: &Free, test: &dyn Fn(&str, &WorkerState) -> bool) -> bool {
        let pool = self.pools[free.pool].as_ref();
        pool.is_some_and(|pool| test(&free.pool_name, &pool.state.workers[free.worker]))
    }

    /// Returns whether a worker for the class has a free slot.
    fn has_free_slot(&self, jobs: &Jobs) -> bool {
        let class = &jobs.class;
        let mut free = self.models[jobs.model].free(class.context).flatten();
        free.any(|free| class.admits_device(free.device) && class.admits_pool(&free.pool_name))
    }

    /// Returns the numbers of starting and of serving workers for the class.
    fn live_workers(&self, jobs: &Jobs) -> (u32, u32) {
        if let Some(wanted) = &jobs.class.placement.pool {
            let pool = self.pool_place(wanted);
            let pool = pool.and_then(|place| self.pools[place].as_ref());
            let Some(pool) = pool.filter(|pool| alive(&pool.state)) else {
                return (0, 0);
            };
            let mine = |w: &&WorkerState| jobs.class.admits_worker(wanted, w);
            let mine = pool.state.workers.iter().filter(mine);
            return mine.fold((0, 0), |(starting, serving), w| {
                (
                    starting + u32::from(w.status == WorkerStatus::Starting),
                    serving + u32::from(w.serves()),
                )
            });
        }
        let devices = self.models[jobs.model].workers.iter();
        devices
            .filter(|((device, context), _)| {
                jobs.class.admits_device(*device) && *context >= jobs.class.context
            })
            .fold((0, 0), |sum, (_, counts)| {
                (sum.0 + counts.0, sum.1 + counts.1)
            })
    }

    /// Returns the live pools in scope that can start a worker for the class, with the size of the smallest such worker.
    fn with_file<'a>(
        &'a self,
        jobs: &'a Jobs,
    ) -> impl Iterator<Item = (usize, &'a PoolState, StartSize)> {
        let files = &self.models[jobs.model].files;
        let wanted = jobs.class.placement.pool.as_ref();
        let some: Option<Vec<usize>> = match (wanted, &jobs.scope) {
            (Some(wanted), _) => Some(self.pool_place(wanted).into_iter().collect()),
            (None, Scope::Pools(pools)) => Some(pools.clone()),
            (None, _) => None,
        };
        let all = some
            .is_none()
            .then(|| files.iter().map(|(&place, &cost)| (place, cost)));
        let some = some.into_iter().flatten();
        let some = some.filter_map(move |place| Some((place, *files.get(&place)?)));
        all.into_iter()
            .flatten()
            .chain(some)
            .filter_map(|(place, cost)| {
                let state = self.pools[place].as_ref()?.state.as_ref();
                let size = cost.least(jobs.class.context)?;
                alive(state).then_some((place, state, size))
            })
    }

    fn judge_starts(
        &self,
        jobs: &Jobs,
        wish: &Wish<'_>,
        world: &World<'_>,
    ) -> (Verdict, Option<Timestamp>) {
        let class = &jobs.class;
        let (starting, serving) = self.live_workers(jobs);
        if starting > 0 {
            return (Verdict::Wait(WaitReason::WorkerStarting), None);
        }
        let mut refused = false;
        let mut best: Option<(StartKey<'_>, usize, StartChoice<'_>)> = None;
        for (place, pool, size) in self.with_file(jobs) {
            for device in fitting(class, pool, size.bytes, serving > 0) {
                let refusal = pool.refused(&class.model, device.device, size.context);
                if refusal.is_some() {
                    refused = true;
                    continue;
                }
                let choice = StartChoice { pool, device };
                let rank = world.policy.rank_start(&choice);
                let elsewhere = wish.is_elsewhere(pool);
                let key = (elsewhere, rank, pool.id.as_str(), device.device);
                if best.as_ref().is_none_or(|(known, ..)| key < *known) {
                    best = Some((key, place, choice));
                }
            }
        }
        if let Some((_, pool, choice)) = best {
            let device = choice.device.device;
            let context = wish.size(class, &choice);
            let start = Verdict::Start {
                pool,
                device,
                context,
            };
            return (start, None);
        }
        if serving > 0 {
            let reason = WaitReason::of_serving(self.has_free_slot(jobs));
            return (Verdict::Wait(reason), None);
        }
        if refused {
            return (Verdict::Wait(WaitReason::StartRefused), None);
        }
        self.judge_evictions(jobs, wish, world)
    }

    fn judge_evictions(
        &self,
        jobs: &Jobs,
        wish: &Wish<'_>,
        world: &World<'_>,
    ) -> (Verdict, Option<Timestamp>) {
        let class = &jobs.class;
        let mut best: Option<(EvictionKey<'_>, usize, Vec<usize>)> = None;
        let mut wake: Option<Timestamp> = None;
        let mut any = false;
        for (place, pool, size) in self.with_file(jobs) {
            let needed = size.bytes;
            for &device in &pool.devices {
                if !class.admits_device(device.device) {
                    continue;
                }
                any = true;
                let after = stopping(pool, device.device).saturating_add(device.free_bytes);
                if after >= needed {
                    return (Verdict::Wait(WaitReason::Evicting), None);
                }
                if !world.settings.evict {
                    continue;
                }
                wake = wake
                    .into_iter()
                    .chain(next_spare(world, pool, device.device))
                    .min();
                if let Some(victims) = victims(world, pool, device, needed) {
                    let key = eviction_key(world, pool, device, &victims);
                    if best.as_ref().is_none_or(|(known, ..)| key < *known) {
                        best = Some((key, place, victims));
                    }
                }
            }
        }
        if let Some((_, pool, workers)) = best {
            return (Verdict::Evict { pool, workers }, None);
        }
        if any || (jobs.settled == Some(WaitReason::MemoryShort) && jobs.scope != Scope::All) {
            return (Verdict::Wait(WaitReason::MemoryShort), wake);
        }
        (self.judge_plainly(jobs, wish, world), None)
    }

    /// Judges a class whose model no pool can start with the reference implementation. This case is rare.
    fn judge_plainly(&self, jobs: &Jobs, wish: &Wish<'_>, world: &World<'_>) -> Verdict {
        let places: Vec<usize> = match &jobs.scope {
            Scope::Pools(pools) => pools.clone(),
            _ => self.ordered_places(),
        };
        let (places, pools): (Vec<usize>, Vec<&PoolState>) = places
            .into_iter()
            .filter_map(|place| Some((place, self.pools[place].as_ref()?.state.as_ref())))
            .unzip();
        match judge(&jobs.class, wish, &pools, world) {
            Verdict::Dispatch { pool, worker } => Verdict::Dispatch {
                pool: places[pool],
                worker,
            },
            Verdict::Start {
                pool,
                device,
                context,
            } => Verdict::Start {
                pool: places[pool],
                device,
                context,
            },
            Verdict::Evict { pool, workers } => Verdict::Evict {
                pool: places[pool],
                workers,
            },
            Verdict::Download { pool } => Verdict::Download { pool: places[pool] },
            other => other,
        }
    }
}
