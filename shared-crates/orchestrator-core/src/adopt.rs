//! Validation of a scheduler script's proposals against a snapshot, by the rules that bind the built-in policies.
//!
//! A script only proposes; no proposal takes effect before it has passed these checks. A single invalid proposal rejects the
//! whole answer: a partial plan from a script with a wrong picture of the fleet is worse than a complete built-in plan.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use jiff::SignedDuration;
use pool_core::ModelRef;
use pool_core::worker::Device;

use crate::job::{JobId, Placement};
use crate::queue::QueuedJob;
use crate::scheduler::{
    Action, Explanation, Filter, FilterCount, Plan, Policy, Settings, Snapshot, WaitReason,
    schedule,
};

mod promised;

pub use promised::Promised;

/// Most jobs offered to a script in one pass.
pub const MAX_CANDIDATES: usize = 256;
/// Most actions that a script may return.
pub const MAX_ACTIONS: usize = 1024;
/// Longest reason that a script may give, in characters. Longer reasons are truncated.
pub const MAX_REASON: usize = 200;
/// Shortest delay after which a script may ask to be run again for a job that it lets wait.
pub const SHORTEST_DELAY: SignedDuration = SignedDuration::from_millis(100);
/// Longest such delay.
pub const LONGEST_DELAY: SignedDuration = SignedDuration::from_hours(1);

/// An action requested by a policy. Jobs, pools and workers are indices into the snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proposal {
    /// Lease the job to the worker.
    Dispatch {
        /// Index of the job among the snapshot's jobs.
        job: usize,
        /// Index of the worker's pool.
        pool: usize,
        /// Index of the worker in its pool.
        worker: usize,
    },
    /// Start a worker.
    StartWorker {
        /// Index of the pool.
        pool: usize,
        /// Device that the worker computes on.
        device: Device,
        /// Model that the worker loads.
        model: ModelRef,
        /// Tokens of context; `None` for the pool's default.
        context_length: Option<u32>,
    },
    /// Stop an idle worker.
    EvictWorker {
        /// Index of the worker's pool.
        pool: usize,
        /// Index of the worker in its pool.
        worker: usize,
        /// Model that needs the memory.
        needed_by: ModelRef,
    },
    /// Let the job wait, even if there may be a place for it.
    Wait {
        /// Index of the job among the snapshot's jobs.
        job: usize,
        /// Explanation for people; may be empty.
        reason: String,
        /// Delay until the next pass if nothing triggers one earlier.
        again: Option<SignedDuration>,
    },
}

/// Reason for rejecting a proposal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The snapshot has no such job, pool or worker, or the job was not offered to the script.
    #[error("{0} is not in this pass")]
    Unknown(String),
    /// The job already has an action.
    #[error("{0} already has an action")]
    Twice(JobId),
    /// The job can't be dispatched to this worker.
    #[error("{job} can't be dispatched to `{worker}` on pool `{pool}`: {why}")]
    Dispatch {
        /// Id of the job.
        job: JobId,
        /// Name of the worker's pool.
        pool: String,
        /// Id of the worker on its pool.
        worker: String,
        /// Rule that the dispatch breaks, as part of a sentence.
        why: String,
    },
    /// The worker can't be started.
    #[error("a worker with `{model}` can't start on {device} of pool `{pool}`: {why}")]
    Start {
        /// Reference to the model to load.
        model: String,
        /// Device that the worker was to compute on.
        device: Device,
        /// Name of the pool.
        pool: String,
        /// Rule that the start breaks, as part of a sentence.
        why: String,
    },
    /// The worker can't be stopped.
    #[error("`{worker}` on pool `{pool}` can't be evicted: {why}")]
    Evict {
        /// Id of the worker on its pool.
        worker: String,
        /// Name of the worker's pool.
        pool: String,
        /// Rule that the eviction breaks, as part of a sentence.
        why: String,
    },
    /// The answer has more than [`MAX_ACTIONS`] actions.
    #[error("{0} actions; at most {MAX_ACTIONS} are allowed")]
    TooMany(usize),
}

/// The proposal that invalidates an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct RejectedProposal {
    /// Index of the proposal in the answer.
    pub index: usize,
    /// Rule that the proposal breaks.
    pub why: Refusal,
}

/// Returns whether a job that waits for this reason is out of every policy's reach, because only a change of the fleet helps.
fn is_out_of_reach(reason: WaitReason) -> bool {
    use WaitReason as R;
    match reason {
        R::NoPool
        | R::PoolsAway
        | R::NoBackend
        | R::ModelMissing
        | R::ContextShort
        | R::Downloading
        | R::DownloadRefused
        | R::BackingOff => true,
        R::MemoryShort
        | R::Evicting
        | R::StartRefused
        | R::WorkerStarting
        | R::SlotsBusy
        | R::CacheFull
        | R::PolicyHeld => false,
    }
}

fn rejected(plan: &Plan) -> HashSet<JobId> {
    let rejects = plan.actions.iter().filter_map(|action| match action {
        Action::Reject { job, .. } => Some(*job),
        _ => None,
    });
    rejects.collect()
}

/// Returns the jobs offered to a script, as indices into the snapshot, in queue order: those that an action could help, at most
/// [`MAX_CANDIDATES`]. If there are more, every class of jobs (model and placement) gets its share, so that a thousand jobs for
/// one model don't hide the jobs for another.
pub fn candidates(snapshot: &Snapshot, built_in: &Plan) -> Vec<usize> {
    let rejected = rejected(built_in);
    let within_reach = |job: &QueuedJob| {
        let waits = built_in.waiting.get(&job.id);
        !rejected.contains(&job.id) && !waits.is_some_and(|why| is_out_of_reach(why.reason))
    };
    let all: Vec<usize> = (0..snapshot.jobs.len())
        .filter(|&index| within_reach(&snapshot.jobs[index]))
        .collect();
    if all.len() <= MAX_CANDIDATES {
        return all;
    }
    let mut rank_in_class: HashMap<(&ModelRef, &Placement), usize> = HashMap::new();
    let mut ranked: Vec<(usize, usize)> = all
        .into_iter()
        .map(|index| {
            let job = &snapshot.jobs[index];
            let rank = rank_in_class
                .entry((&job.model, &job.placement))
                .or_default();
            *rank += 1;
            (*rank, index)
        })
        .collect();
    ranked.sort_unstable();
    let mut chosen: Vec<usize> = ranked
        .into_iter()
        .take(MAX_CANDIDATES)
        .map(|(_, index)| index)
        .collect();
    chosen.sort_unstable();
    chosen
}

/// Turns a policy's proposals into a plan, or returns the first proposal that breaks a rule.
///
/// The policy decides on dispatches, starts and evictions. The built-in plan keeps the decisions that involve no choice:
/// rejecting jobs that no pool can ever run, stopping workers that were idle for `idle_ttl`, and downloading missing models.
/// Every waiting job gets an explanation; if only the policy holds the job back, the explanation says so.
pub fn adopt(
    snapshot: &Snapshot,
    policy: &dyn Policy,
    built_in: &Plan,
    offered: &[usize],
    proposals: &[Proposal],
) -> Result<Plan, RejectedProposal> {
    if proposals.len() > MAX_ACTIONS {
        let why = Refusal::TooMany(proposals.len());
        return Err(RejectedProposal {
            index: MAX_ACTIONS,
            why,
        });
    }
    let offered: HashSet<usize> = offered.iter().copied().collect();
    let mut promised = Promised::default();
    let mut plan = Plan {
        wake: built_in.wake,
        ..Plan::default()
    };
    let mut reasons: BTreeMap<usize, &str> = BTreeMap::new();
    let mut dispatched: HashSet<usize> = HashSet::new();
    for (index, proposal) in proposals.iter().enumerate() {
        let refuse = |why| RejectedProposal { index, why };
        if let Proposal::Dispatch { job, .. } | Proposal::Wait { job, .. } = proposal
            && !offered.contains(job)
        {
            return Err(refuse(Refusal::Unknown(format!("job {job}"))));
        }
        promised.take(snapshot, proposal).map_err(refuse)?;
        let pool_name = |pool: usize| snapshot.pools[pool].id.clone();
        let worker_name =
            |pool: usize, worker: usize| snapshot.pools[pool].workers[worker].id.clone();
        match proposal {
            Proposal::Dispatch { job, pool, worker } => {
                dispatched.insert(*job);
                plan.actions.push(Action::Dispatch {
                    job: snapshot.jobs[*job].id,
                    pool: pool_name(*pool),
                    worker: worker_name(*pool, *worker),
                });
            }
            Proposal::StartWorker {
                pool,
                device,
                model,
                context_length,
            } => plan.actions.push(Action::StartWorker {
                pool: pool_name(*pool),
                model: model.clone(),
                device: *device,
                context_length: *context_length,
            }),
            Proposal::EvictWorker {
                pool,
                worker,
                needed_by,
            } => plan.actions.push(Action::EvictWorker {
                pool: pool_name(*pool),
                worker: worker_name(*pool, *worker),
                needed_by: needed_by.clone(),
            }),
            Proposal::Wait { job, reason, again } => {
                reasons.insert(*job, reason);
                let wake = again.and_then(|pause| {
                    let pause = pause.clamp(SHORTEST_DELAY, LONGEST_DELAY);
                    snapshot.now.checked_add(pause).ok()
                });
                plan.wake = plan.wake.into_iter().chain(wake).min();
            }
        }
    }
    keep_house(snapshot, built_in, &promised, &mut plan);
    explain(
        snapshot,
        policy,
        built_in,
        &promised,
        &dispatched,
        &reasons,
        &mut plan,
    );
    Ok(plan)
}

/// Adds the built-in plan's rejections, downloads and idle stops, which are no policy's choice.
fn keep_house(snapshot: &Snapshot, built_in: &Plan, promised: &Promised, plan: &mut Plan) {
    let in_use: HashSet<(&str, &str)> = promised
        .workers_in_use()
        .map(|(pool, worker)| {
            let pool = &snapshot.pools[pool];
            (pool.id.as_str(), pool.workers[worker].id.as_str())
        })
        .collect();
    let kept = built_in.actions.iter().filter(|action| match action {
        Action::Reject { .. } | Action::Download { .. } => true,
        Action::UnloadWorker { pool, worker } => {
            !in_use.contains(&(pool.as_str(), worker.as_str()))
        }
        Action::Dispatch { .. } | Action::StartWorker { .. } | Action::EvictWorker { .. } => false,
    });
    plan.actions.extend(kept.cloned());
}

/// Model, placement and required tokens of context and cache, shared by jobs that wait for the same workers.
type Kind<'a> = (&'a ModelRef, &'a Placement, Option<u32>, Option<u32>);

fn kind(job: &QueuedJob) -> Kind<'_> {
    (
        &job.model,
        &job.placement,
        job.context_needed,
        job.cache_needed,
    )
}

/// Adds an explanation for every job that keeps waiting.
fn explain(
    snapshot: &Snapshot,
    policy: &dyn Policy,
    built_in: &Plan,
    promised: &Promised,
    dispatched: &HashSet<usize>,
    reasons: &BTreeMap<usize, &str>,
    plan: &mut Plan,
) {
    let rejected = rejected(built_in);
    let mut held: Vec<usize> = Vec::new();
    for (index, job) in snapshot.jobs.iter().enumerate() {
        if dispatched.contains(&index) || rejected.contains(&job.id) {
            continue;
        }
        match built_in.waiting.get(&job.id) {
            Some(why) if is_out_of_reach(why.reason) => {
                plan.waiting.insert(job.id, Arc::clone(why));
            }
            _ => held.push(index),
        }
    }
    // One job of each kind represents the others: its explanation by the built-in policy, after the promises of this pass,
    // names the constraint that binds it now.
    let mut classes: HashMap<Kind<'_>, Arc<Explanation>> = HashMap::new();
    let mut first: Vec<&Arc<QueuedJob>> = Vec::new();
    let mut seen: HashSet<Kind<'_>> = HashSet::new();
    for &index in &held {
        let job = &snapshot.jobs[index];
        if seen.insert(kind(job)) {
            first.push(job);
        }
    }
    let after = Snapshot {
        jobs: first.iter().map(|job| Arc::clone(job)).collect(),
        pools: promised.pools_after(snapshot),
        // The explanations must not announce evictions that this plan does not make.
        settings: Settings {
            evict: false,
            ..snapshot.settings
        },
        ..snapshot.clone()
    };
    let found = schedule(&after, policy);
    for job in first {
        let starts_one = found.actions.iter().any(
            |action| matches!(action, Action::StartWorker { model, .. } if *model == job.model),
        );
        let why = match found.waiting.get(&job.id) {
            Some(why) if !starts_one => Arc::clone(why),
            _ => Arc::new(held_back("", snapshot)),
        };
        classes.insert(kind(job), why);
    }
    for index in held {
        let job = &snapshot.jobs[index];
        let Some(why) = classes.get(&kind(job)) else {
            continue;
        };
        let why = match reasons.get(&index) {
            Some(reason) if why.reason == WaitReason::PolicyHeld && !reason.is_empty() => {
                Arc::new(held_back(reason, snapshot))
            }
            _ => Arc::clone(why),
        };
        plan.waiting.insert(job.id, why);
    }
}

fn held_back(reason: &str, snapshot: &Snapshot) -> Explanation {
    let message = match reason {
        "" => "a place is free, but the scheduler's script holds the job back".to_owned(),
        reason => format!("the scheduler's script holds the job back: {reason}"),
    };
    Explanation {
        reason: WaitReason::PolicyHeld,
        message,
        hint: "see `llorch orchestrator scheduler show`".to_owned(),
        filters: vec![
            FilterCount {
                filter: Filter::Known,
                pools: u32::try_from(snapshot.pools.len()).unwrap_or(u32::MAX),
            },
            FilterCount {
                filter: Filter::Policy,
                pools: 0,
            },
        ],
    }
}

/// Returns a reason in its stored form: one line without control characters, at most [`MAX_REASON`] characters long.
pub fn tidy_reason(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_REASON)
        .collect()
}
