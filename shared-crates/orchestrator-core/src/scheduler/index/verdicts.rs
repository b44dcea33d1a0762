//! Judgement of a class with the help of the index.

use jiff::Timestamp;
use pool_core::worker::WorkerStatus;

use super::{ClassJobs, Free, Index, Scope};
use crate::queue::{QueuedJob, TurnKey};
use crate::scheduler::judge::{
    ClassDecision, Held, LiveWorkers, Places, Wish, World, alive, judge, judge_places,
};
use crate::scheduler::snapshot::{PoolState, StartSize, WorkerState};
use crate::scheduler::wait_reason::WaitReason;

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
    ) -> (ClassDecision, Option<Timestamp>) {
        let Some(jobs) = &self.classes[class] else {
            return (ClassDecision::Wait(WaitReason::PolicyHeld), None);
        };
        let prefer = self.prefers(job);
        let held = self.held(class, key);
        let held = Held(&held);
        let wish = Wish::of(job, prefer);
        self.with_world(now, held, |world| {
            let places = IndexedPlaces {
                index: self,
                jobs,
                wish: &wish,
                world,
            };
            judge_places(&places, &jobs.class, &wish, world)
        })
    }

    /// Returns the best worker with a free slot and at least this context that suits the class and passes the test `takes`.
    fn free_worker(
        &self,
        jobs: &ClassJobs,
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
    fn has_free_slot(&self, jobs: &ClassJobs) -> bool {
        let class = &jobs.class;
        let mut free = self.models[jobs.model].free(class.context).flatten();
        free.any(|free| class.admits_device(free.device) && class.admits_pool(&free.pool_name))
    }

    /// Returns the numbers of starting and of serving workers for the class.
    fn live_workers(&self, jobs: &ClassJobs) -> (u32, u32) {
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
        jobs: &'a ClassJobs,
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

    /// Judges a class whose model no pool can start with the reference implementation. This case is rare.
    fn judge_plainly(&self, jobs: &ClassJobs, wish: &Wish<'_>, world: &World<'_>) -> ClassDecision {
        let places: Vec<usize> = match &jobs.scope {
            Scope::Pools(pools) => pools.clone(),
            _ => self.ordered_places(),
        };
        let (places, pools): (Vec<usize>, Vec<&PoolState>) = places
            .into_iter()
            .filter_map(|place| Some((place, self.pools[place].as_ref()?.state.as_ref())))
            .unzip();
        let (verdict, _) = judge(&jobs.class, wish, &pools, world);
        match verdict {
            ClassDecision::Dispatch { pool, worker } => ClassDecision::Dispatch {
                pool: places[pool],
                worker,
            },
            ClassDecision::Start {
                pool,
                device,
                context,
            } => ClassDecision::Start {
                pool: places[pool],
                device,
                context,
            },
            ClassDecision::Evict { pool, workers } => ClassDecision::Evict {
                pool: places[pool],
                workers,
            },
            ClassDecision::Download { pool } => ClassDecision::Download { pool: places[pool] },
            other => other,
        }
    }
}

/// The places for a class that the index's tables name.
struct IndexedPlaces<'a> {
    index: &'a Index,
    jobs: &'a ClassJobs,
    wish: &'a Wish<'a>,
    world: &'a World<'a>,
}

impl Places for IndexedPlaces<'_> {
    fn free_worker(&self) -> Option<(usize, usize)> {
        let Self {
            index, jobs, wish, ..
        } = *self;
        let held = self.world.held;
        // If all free workers have the same context, a preference for a long one makes no difference, and the job's size is
        // irrelevant.
        let differ = index.models[jobs.model].free.len() > 1;
        let roomy = differ.then(|| jobs.class.context.max(wish.context));
        let free = |sure: bool| {
            let takes = |pool: &str, worker: &WorkerState| {
                jobs.class.finds_place(worker, wish.cache)
                    && (!sure || worker.surely_has_room(wish.cache))
                    && !held.keeps(pool, worker)
            };
            let free = |context| index.free_worker(jobs, wish.pool, context, held, &takes);
            roomy.and_then(free).or_else(|| free(jobs.class.context))
        };
        let some_may_refuse = index.models[jobs.model].short > 0;
        let found = some_may_refuse.then(|| free(true)).flatten();
        found.or_else(|| free(false))
    }

    fn workers(&self) -> LiveWorkers {
        let (starting, serving) = self.index.live_workers(self.jobs);
        LiveWorkers {
            starting: starting > 0,
            serving: serving > 0,
        }
    }

    fn has_slot(&self) -> bool {
        self.index.has_free_slot(self.jobs)
    }

    fn with_file(&self) -> impl Iterator<Item = (usize, &PoolState, StartSize)> {
        self.index.with_file(self.jobs)
    }

    fn without_file(&self) -> ClassDecision {
        let Self {
            index,
            jobs,
            wish,
            world,
        } = *self;
        // The search for memory, which found none, also covered the pools that are out of scope now.
        if jobs.settled == Some(WaitReason::MemoryShort) && jobs.scope != Scope::All {
            return ClassDecision::Wait(WaitReason::MemoryShort);
        }
        index.judge_plainly(jobs, wish, world)
    }
}
