//! Explanations of waits and dispatches, in words and numbers.

use std::cmp::Reverse;
use std::fmt;

use jiff::Timestamp;
use pool_core::kit::units::{
    human_bytes, human_bytes_down, human_bytes_up, human_ms, human_seconds,
};
use pool_core::worker::Device;
use serde::{Deserialize, Serialize};

use super::judge::{
    Class, ClassDecision, Held, Wish, World, alive, fitting, has_backend, judge, next_spare, runs,
    startable, usable,
};
use super::policy::{BuiltIn, WorkerChoice};
use super::rules::{DISK_RESERVE, may_download};
use super::snapshot::{PoolState, WorkerState};
use super::wait_reason::WaitReason;
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// Number of pools left by a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FilterCount {
    /// Filter that was applied.
    pub filter: Filter,
    /// Number of pools that passed it and all filters before.
    pub pools: u32,
}

/// A filter on pools. Variants are in the order of application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// The pool is registered, and is the one that the job asks for, if any.
    Known,
    /// The pool is online and takes work.
    Alive,
    /// The pool has the device that the job asks for.
    Backend,
    /// The pool has the model and has not failed to start it.
    ModelPresent,
    /// The pool has a worker with the context that the job needs, or a file that allows it.
    Context,
    /// The pool runs the model with that context, or has the memory for it.
    MemoryFits,
    /// The pool has a worker with a free slot.
    Slots,
    /// The pool has a worker with a free slot and room for the job in its cache.
    Cache,
    /// The policy gave the job a place on the pool.
    Policy,
}

/// The reason that a job waits, in words and numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Explanation {
    /// Constraint that keeps the job waiting.
    pub reason: WaitReason,
    /// Description of the constraint for people, with its numbers.
    pub message: String,
    /// Remedy that would lift the constraint.
    pub hint: String,
    /// Pools left after each filter, in order.
    pub filters: Vec<FilterCount>,
}

/// Explains why jobs of the class wait.
pub(super) fn explain(class: &Class, pools: &[&PoolState], world: &World<'_>) -> Explanation {
    let any_job = Wish {
        cache: u32::MAX,
        ..Wish::default()
    };
    let (verdict, _) = judge(class, &any_job, pools, world);
    let (reason, cause) = match verdict {
        ClassDecision::Wait(reason) => (reason, None),
        ClassDecision::Reject { message, .. } => (WaitReason::PoolsAway, Some(message)),
        _ => (WaitReason::PolicyHeld, None),
    };
    let words = Words {
        class,
        pools,
        world,
    };
    let (message, hint) = match cause {
        Some(cause) => (
            format!("{cause}; other pools may still register after the restart"),
            "wait: the decision follows soon".to_owned(),
        ),
        None => words.of(reason),
    };
    Explanation {
        reason,
        message,
        hint,
        filters: filters(class, pools, world.held),
    }
}

/// The origin of a choice among places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chooser {
    /// A built-in policy.
    Policy(BuiltIn),
    /// The operator's script.
    Script,
}

/// The reason for dispatching a job to its worker. Formatted only when displayed, because a pass may dispatch thousands of
/// jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Why {
    /// True if the job asks for the pool, and for the device.
    asked: (bool, bool),
    /// True if the latest job of the job's session ran on this pool.
    session_was_here: bool,
    /// Number of workers with the model that had a free slot.
    free_workers: usize,
    chooser: Chooser,
    /// Slots of the worker before the dispatch: in use, and in total.
    slots: (u32, u32),
    device: Device,
    free_bytes: u64,
}

impl Why {
    pub(super) fn new(
        job: &QueuedJob,
        choice: &WorkerChoice<'_>,
        chooser: Chooser,
        session_was_here: bool,
        free_workers: usize,
    ) -> Self {
        let (asked, worker) = (&job.placement, choice.worker);
        Self {
            asked: (asked.pool.is_some(), asked.device.is_some()),
            session_was_here,
            free_workers,
            chooser,
            slots: (worker.active, worker.slots),
            device: worker.device,
            free_bytes: choice.free_bytes(),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.asked {
            (true, true) => "the job asks for this pool and device; ",
            (true, false) => "the job asks for this pool; ",
            (false, true) => "the job asks for this device; ",
            (false, false) => "",
        })?;
        match (self.free_workers, self.chooser) {
            (1, _) => f.write_str("the only worker with the model and a free slot"),
            (count, Chooser::Script) => write!(
                f,
                "chosen by the scheduler's script from {count} workers with a free slot"
            ),
            (_, Chooser::Policy(_)) if self.session_was_here => {
                f.write_str("the job's session last ran on this pool")
            }
            (count, Chooser::Policy(policy)) => write!(
                f,
                "the best of {count} workers with a free slot under policy {policy}"
            ),
        }?;
        let ((used, slots), free, device) = (self.slots, self.free_bytes, self.device);
        write!(
            f,
            " ({used} of {slots} slots in use, {} of memory free on {device})",
            human_bytes(free)
        )
    }
}

/// Returns the explanation of a job that is backing off after a lost attempt.
pub(super) fn backing_off(job: &QueuedJob, now: Timestamp) -> Explanation {
    let pause = job
        .not_before
        .map_or(0, |at| at.duration_since(now).as_millis());
    let pause = human_ms(u64::try_from(pause).unwrap_or(0));
    Explanation {
        reason: WaitReason::BackingOff,
        message: format!("the last attempt was lost; the next one can start in {pause}"),
        hint: "wait: the job is retried automatically".to_owned(),
        filters: Vec::new(),
    }
}

/// Counts the pools that each filter leaves, up to the first filter that leaves none.
fn filters(class: &Class, pools: &[&PoolState], held: Held<'_>) -> Vec<FilterCount> {
    let has = |pool: &PoolState, place: &dyn Fn(&WorkerState) -> bool| {
        let mut workers = pool.workers.iter();
        workers.any(|w| class.admits_worker(&pool.id, w) && place(w))
    };
    let has_slot = |pool: &PoolState| has(pool, &WorkerState::has_slot);
    let has_room = |pool: &PoolState| {
        has(pool, &|w| {
            class.finds_place(w, u32::MAX) && !held.keeps(&pool.id, w)
        })
    };
    let fits = |pool: &PoolState| {
        startable(class, pool)
            .is_some_and(|size| fitting(class, pool, size, false).next().is_some())
    };
    let any_context = Class {
        context: 0,
        ..class.clone()
    };
    type Test<'a> = &'a dyn Fn(&PoolState) -> bool;
    let tests: [(Filter, Test<'_>); 8] = [
        (Filter::Known, &|p| class.admits_pool(&p.id)),
        (Filter::Alive, &alive),
        (Filter::Backend, &|p| has_backend(class, p)),
        (Filter::ModelPresent, &|p| {
            runs(&any_context, p) || usable(class, p).is_some()
        }),
        (Filter::Context, &|p| {
            runs(class, p) || startable(class, p).is_some()
        }),
        (Filter::MemoryFits, &|p| runs(class, p) || fits(p)),
        (Filter::Slots, &has_slot),
        (Filter::Cache, &has_room),
    ];
    let mut left: Vec<&PoolState> = pools.to_vec();
    let mut counts = Vec::with_capacity(tests.len());
    for (filter, test) in tests {
        left.retain(|pool| test(pool));
        counts.push(FilterCount {
            filter,
            pools: u32::try_from(left.len()).unwrap_or(u32::MAX),
        });
        if left.is_empty() {
            return counts;
        }
    }
    // Every built-in policy uses the places that the filters leave; only a script can leave one empty.
    counts.push(FilterCount {
        filter: Filter::Policy,
        pools: 0,
    });
    counts
}

/// Hint about a registered pool that has not reported yet.
const REPORTS_SOON: &str =
    "wait for its report; if none arrives, run `llorch-pool daemon status` on its host";

/// Wording of a reason for a class, with its numbers from the pools.
struct Words<'a> {
    class: &'a Class,
    pools: &'a [&'a PoolState],
    world: &'a World<'a>,
}

impl Words<'_> {
    fn known(&self) -> impl Iterator<Item = &PoolState> {
        let pools = self.pools.iter().copied();
        pools.filter(|pool| self.class.admits_pool(&pool.id))
    }

    fn left(&self) -> impl Iterator<Item = &PoolState> {
        self.known()
            .filter(|pool| alive(pool) && has_backend(self.class, pool))
    }

    fn of(&self, reason: WaitReason) -> (String, String) {
        let wanted = self.wanted();
        let (message, hint) = match reason {
            WaitReason::NoPool => (
                match &self.class.placement.pool {
                    Some(wanted) => format!("pool `{wanted}` has not registered"),
                    None => "no pool has registered".to_owned(),
                },
                "run `llorch-pool daemon start` on a pool host; on another machine, set `orchestrator_url` in its settings first",
            ),
            WaitReason::PoolsAway => return self.pools_away(),
            WaitReason::NoBackend => match self.class.placement.device {
                Some(device) => (
                    format!("no pool can run a worker on {device}"),
                    "add a pool with that device and a worker program for it, or change or omit `placement.device`",
                ),
                None => (
                    "no pool has a worker program".to_owned(),
                    "install `llorch-candled` next to `pool-managerd`",
                ),
            },
            WaitReason::ModelMissing => return self.model_missing(),
            WaitReason::Downloading => return self.downloading(),
            WaitReason::DownloadRefused => return self.download_refused(),
            WaitReason::ContextShort => return self.context_short(),
            WaitReason::MemoryShort => return self.memory_short(),
            WaitReason::Evicting => (
                format!("idle workers are being stopped to free memory for a worker with {wanted}"),
                "wait: a worker with the model starts once they have stopped",
            ),
            WaitReason::StartRefused => (
                self.start_refused(),
                "wait: the start is retried in a moment",
            ),
            WaitReason::WorkerStarting => (
                format!("a worker with {wanted} is loading"),
                "wait: the job starts when the worker is ready",
            ),
            WaitReason::SlotsBusy => {
                let mine = |pool: &PoolState| {
                    let mine =
                        |w: &&WorkerState| w.serves() && self.class.admits_worker(&pool.id, w);
                    pool.workers.iter().filter(mine).count()
                };
                let count: usize = self.left().map(mine).sum();
                let message = match count {
                    1 => format!("the worker with {wanted} is busy"),
                    count => format!("all {count} workers with {wanted} are busy"),
                };
                (message, "wait: the job starts when an earlier job ends")
            }
            WaitReason::CacheFull => return self.cache_full(),
            WaitReason::PolicyHeld => (
                "a place is free, but the scheduler has not given it to this job".to_owned(),
                "wait for the next pass; if a script schedules, see `llorch orchestrator scheduler show`",
            ),
            WaitReason::BackingOff => (
                "the last attempt was lost a moment ago".to_owned(),
                "wait: the job is retried automatically",
            ),
        };
        (message, hint.to_owned())
    }

    fn cache_full(&self) -> (String, String) {
        let model = &self.class.model;
        let cramped = self
            .workers_left()
            .filter(|(_, w)| w.has_slot() && !w.has_room(self.class.cache));
        let most = cramped.max_by_key(|(pool, w)| (w.free_tokens, Reverse((&pool.id, &w.id))));
        let needed = self.class.cache;
        let message = match most {
            Some((pool, worker)) => format!(
                "the prompt and the longest answer need {needed} tokens of a worker's cache; \
                at most {} are free, on worker `{}` of pool `{}`",
                worker.free_tokens.unwrap_or(0),
                worker.id,
                pool.id
            ),
            None if self.is_kept_out() => format!(
                "an earlier job is waiting for room in the caches of the workers with `{model}`"
            ),
            None => format!(
                "a worker with `{model}` has yet to answer whether it has room for an earlier job"
            ),
        };
        let hint = "wait for earlier jobs to end, or start a worker with a larger cache: `llorch-pool worker spawn --cache-tokens`";
        (message, hint.to_owned())
    }

    /// Returns whether a worker for the class is reserved for an earlier job.
    fn is_kept_out(&self) -> bool {
        self.workers_left()
            .any(|(pool, w)| self.world.held.keeps(&pool.id, w))
    }

    /// Returns the workers for the class on the pools that the filters leave.
    fn workers_left(&self) -> impl Iterator<Item = (&PoolState, &WorkerState)> {
        let workers = self
            .left()
            .flat_map(|pool| pool.workers.iter().map(move |w| (pool, w)));
        workers.filter(|(pool, w)| self.class.admits_worker(&pool.id, w))
    }

    fn pools_away(&self) -> (String, String) {
        let model = &self.class.model;
        let hint = "run `llorch-pool daemon status` on that host".to_owned();
        if self.known().any(alive) {
            let unheard = self.known().find(|p| p.liveness == PoolLiveness::Awaited);
            let away = self
                .known()
                .find(|pool| !alive(pool) && usable(self.class, pool).is_some());
            let failure = self.left().find_map(|pool| {
                let why = pool.start_failure(pool.model(model)?)?;
                Some(format!(
                    "`{model}` can't be started on pool `{}`: {why}",
                    pool.id
                ))
            });
            let missing = || format!("no pool that accepts work has `{model}`");
            let why = failure.unwrap_or_else(missing);
            return match (away, unheard) {
                (None, Some(pool)) => (
                    format!("{why}; pool `{}` has not reported yet", pool.id),
                    REPORTS_SOON.to_owned(),
                ),
                (away, _) => {
                    let away = away.map_or("another pool", |pool| pool.id.as_str());
                    (format!("{why}; pool `{away}` has it but is away"), hint)
                }
            };
        }
        let count = |liveness| {
            let pools = self.known().filter(move |pool| pool.liveness == liveness);
            pools.count()
        };
        let draining = count(PoolLiveness::Online);
        let (awaited, stopped) = (count(PoolLiveness::Awaited), count(PoolLiveness::Stopped));
        let all = self.known().count();
        let silent = all - draining - awaited - stopped;
        let first = |liveness| {
            let pool = self.known().find(|pool| pool.liveness == liveness);
            pool.map_or("", |pool| pool.id.as_str())
        };
        let message = match (all, awaited, stopped) {
            (1, 1, _) => format!(
                "pool `{}` is registered but has not reported yet",
                first(PoolLiveness::Awaited)
            ),
            (1, _, 1) => format!("pool `{}` was stopped", first(PoolLiveness::Stopped)),
            _ => {
                let parts = [
                    (silent, "not heard from"),
                    (awaited, "not reported yet"),
                    (stopped, "stopped"),
                    (draining, "draining"),
                ];
                let parts = parts.iter().filter(|(count, _)| *count > 0);
                let parts: Vec<_> = parts
                    .map(|(count, what)| format!("{count} {what}"))
                    .collect();
                let pools = match all {
                    1 => "the only pool does not accept work".to_owned(),
                    _ => format!("none of the {all} pools accepts work"),
                };
                format!("{pools}: {}", parts.join(", "))
            }
        };
        let hint = match (awaited, silent, stopped) {
            (0, 0, 0) => {
                "run `llorch-pool daemon resume` on a pool host to let it accept work again"
            }
            (0, 0, _) => "run `llorch-pool daemon start` on its host to let it accept work again",
            (0, ..) => "run `llorch-pool daemon status` on the pool hosts",
            _ => REPORTS_SOON,
        };
        (message, hint.to_owned())
    }

    fn model_missing(&self) -> (String, String) {
        let model = &self.class.model;
        let message = format!("no pool has `{model}` on its disk");
        let by_hand = format!("on a pool host, run `llorch-pool models download {model}`");
        let hint = if self.world.settings.download || !self.world.sizes.contains_key(model) {
            by_hand
        } else {
            format!("{by_hand}, or let the orchestrator do it with `scheduler.download = true`")
        };
        (message, hint)
    }

    fn downloading(&self) -> (String, String) {
        let model = &self.class.model;
        let found = self.left().find_map(|pool| {
            let download = pool.downloads.iter().find(|d| d.model == *model)?;
            Some((pool, download.percent))
        });
        let message = match found {
            Some((pool, Some(percent))) => {
                format!("pool `{}` is downloading `{model}`: {percent} %", pool.id)
            }
            Some((pool, None)) => format!("pool `{}` is downloading `{model}`", pool.id),
            None => format!("`{model}` is being downloaded"),
        };
        (
            message,
            "wait: a worker starts when the download is complete".to_owned(),
        )
    }

    fn download_refused(&self) -> (String, String) {
        let model = &self.class.model;
        let refused = self.left().find_map(|pool| {
            let refused = pool.refused_downloads.iter().find(|r| r.model == *model)?;
            Some((pool, refused))
        });
        if let Some((pool, refused)) = refused {
            let message = format!(
                "pool `{}` could not download `{model}`: {}",
                pool.id, refused.message
            );
            return (
                message,
                "wait: the download is retried after a pause".to_owned(),
            );
        }
        let size = self.world.sizes.get(model).copied().unwrap_or_default();
        let can_hold =
            |pool: &&PoolState| may_download(self.class.needs(), &with_room(pool), size).is_some();
        match self
            .left()
            .filter(can_hold)
            .max_by_key(|p| p.disk_free_bytes)
        {
            Some(pool) => (
                format!(
                    "`{model}` takes {}, and a download must leave {} free; the most free disk space is {}, on pool `{}`",
                    human_bytes(size),
                    human_bytes(DISK_RESERVE),
                    human_bytes_down(pool.disk_free_bytes),
                    pool.id
                ),
                "make room on a pool's disk: run `llorch-pool models delete` on its host"
                    .to_owned(),
            ),
            None => (
                format!(
                    "no device is large enough for `{model}` ({})",
                    human_bytes(size)
                ),
                "add a pool with more memory, or ask for a smaller model".to_owned(),
            ),
        }
    }

    /// Returns the model, with the context that the jobs need if it is known.
    fn wanted(&self) -> String {
        let Class { model, context, .. } = self.class;
        match context {
            0 => format!("`{model}`"),
            tokens => format!("`{model}` and a context of {tokens} tokens"),
        }
    }

    fn context_short(&self) -> (String, String) {
        let Class { model, context, .. } = self.class;
        let files = self.left().filter_map(|pool| usable(self.class, pool));
        let longest = files.filter_map(|file| file.context).map(|c| c.max_tokens);
        match longest.max() {
            Some(longest) => (
                format!(
                    "the job needs a context of {context} tokens; no worker has one, \
                    and the pools' files of `{model}` allow at most {longest}"
                ),
                "send a shorter prompt, or ask for a model with a longer context".to_owned(),
            ),
            None => (
                format!(
                    "the job needs a context of {context} tokens; no worker with `{model}` has one, \
                    and no pool reports that it can start one"
                ),
                format!(
                    "on a pool host, run `llorch-pool worker spawn cpu --model {model} --context-length {context}`"
                ),
            ),
        }
    }

    fn memory_short(&self) -> (String, String) {
        let wanted = self.wanted();
        let left: Vec<&PoolState> = self.left().collect();
        let devices = left.iter().flat_map(|pool| {
            let needed = startable(self.class, pool).map(|size| size.bytes);
            let admitted = pool
                .devices
                .iter()
                .filter(|d| self.class.admits_device(d.device));
            admitted.filter_map(move |d| {
                Some((
                    d.free_bytes,
                    Reverse(pool.id.as_str()),
                    d.total_bytes,
                    needed?,
                ))
            })
        });
        let Some((free, Reverse(pool), total, needed)) = devices.max() else {
            return (
                format!("no pool has enough memory for a worker with {wanted}"),
                "stop a worker: see `llorch-pool worker list`".to_owned(),
            );
        };
        let message = format!(
            "a worker with {wanted} needs {}; the most free memory is {}, on pool `{pool}`",
            human_bytes_up(needed),
            human_bytes_down(free)
        );
        let soon = self.left().flat_map(|pool| {
            let devices = pool.devices.iter();
            devices
                .filter(|d| self.class.admits_device(d.device))
                .filter_map(|d| next_spare(self.world, pool, d.device))
        });
        let hint = match soon.min() {
            _ if needed > total && self.class.context > 0 => {
                "add memory, send a shorter prompt, or ask for a smaller model: stopping workers does not free enough"
                    .to_owned()
            }
            _ if needed > total => {
                "add memory, or ask for a smaller model: stopping workers does not free enough"
                    .to_owned()
            }
            Some(at) if self.world.settings.evict => format!(
                "wait: an idle worker may be stopped for the job in {}; or stop one now: see `llorch-pool worker list`",
                human_seconds(at.duration_since(self.world.now).as_secs() + 1)
            ),
            _ => "wait until a worker ends: see `llorch-pool worker list`".to_owned(),
        };
        (message, hint)
    }

    fn start_refused(&self) -> String {
        let model = &self.class.model;
        let refusal = self.left().find_map(|pool| {
            let asked = startable(self.class, pool)?.context;
            let mut refused = pool.refused_starts.iter();
            let refused = refused.find(|r| {
                r.model == *model && self.class.admits_device(r.device) && r.context_length <= asked
            })?;
            Some((pool, refused))
        });
        match refusal {
            Some((pool, refused)) => format!(
                "pool `{}` refused to start a worker with `{model}`: {}",
                pool.id, refused.message
            ),
            None => format!("the pools refused to start a worker with `{model}`"),
        }
    }
}

/// Returns the pool as if its disk were empty and no download had been refused.
fn with_room(pool: &PoolState) -> PoolState {
    PoolState {
        disk_free_bytes: u64::MAX,
        refused_downloads: Vec::new(),
        ..pool.clone()
    }
}
