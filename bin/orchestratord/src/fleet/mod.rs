//! The pools, as they describe themselves. Registrations survive a restart of the orchestrator; the rest is only in memory, and
//! comes back with the pools' next heartbeats.

mod ages;
mod membership;
mod overlay;
mod reach;
mod requests;
mod standing;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::api::pools::PoolView;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::pool::PoolLiveness;
use orchestrator_core::scheduler::PoolState;
use pool_core::api::pool::{
    HEARTBEAT_INTERVAL_MS, Heartbeat, ModelOnDisk, PoolStatus, RegisterRequest, WorkerEndpoint,
};
use pool_core::kit::client::{ApiClient, ClientError};
use pool_core::kit::clock as own_clock;
use pool_core::kit::secret::Secret;
use pool_core::worker::WorkerInfo;
use pool_core::{ModelRef, POOL_API_VERSION};
use tokio::sync::watch;

use ages::WorkerTimes;
pub use membership::{forget, leave, register};
pub use overlay::Asked;
use overlay::Overlay;

use crate::clock;
use crate::state::StoredPool;

/// A refused call of a pool.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The pool has not registered with this process.
    #[error("pool `{0}` has not registered")]
    Unknown(String),
    /// The pool speaks another version of the API.
    #[error(
        "pool `{pool}` speaks version {theirs} of the pool API; this orchestrator speaks version {ours}"
    )]
    Version {
        /// Id of the pool.
        pool: String,
        /// Version of the API that the pool speaks.
        theirs: u32,
        /// Version of the API that this orchestrator speaks.
        ours: u32,
    },
    /// Another live instance holds the pool id.
    #[error("pool id `{pool}` is held by another instance at {holder}")]
    Taken {
        /// Contested pool id.
        pool: String,
        /// Address of the holder.
        holder: String,
    },
    /// A newer report of the pool, or of a newer instance, has arrived already.
    #[error("this heartbeat of pool `{pool}` is stale: {detail}")]
    Stale {
        /// Id of the pool.
        pool: String,
        /// The newer report or instance.
        detail: String,
    },
    /// A field of the request is malformed.
    #[error("`{field}` {reason}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// Predicate that completes the message: "must be ...".
        reason: String,
    },
    /// The limit on registered pools is reached.
    #[error("no room for pool `{pool}`: {limit} pools have registered")]
    Full {
        /// Id of the refused pool.
        pool: String,
        /// Maximum number of pools.
        limit: usize,
    },
    /// The pool's address can't be used.
    #[error("`url` can't be used")]
    Url(#[source] ClientError),
}

/// The fate of a worker, according to its pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The worker lives, or nothing newer is known.
    Alive,
    /// The worker has ended, for this reason.
    Gone(String),
    /// The pool has left or is silent, with a message that says which.
    PoolAway(String),
}

/// A change of a pool, as the scheduler sees it.
#[derive(Debug)]
pub enum PoolChange {
    /// New state of the pool.
    Is(Box<PoolState>),
    /// Id of a pool that has left.
    Gone(String),
}

/// The registered pools, and the overlay of requests to them.
#[derive(Debug)]
pub struct Fleet {
    inner: Mutex<FleetState>,
    token: Option<Secret>,
    /// Maximum number of registered pools.
    limit: usize,
    /// Start of the daemon.
    started_at: Timestamp,
    /// Time for which silence does not count against pools, because the fault may be on this side.
    window: SignedDuration,
    heard: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct FleetState {
    pools: BTreeMap<String, RegisteredPool>,
    /// Pools of an earlier run that have not reported to this one.
    awaited: BTreeSet<String>,
    overlay: Overlay,
    /// Pools whose state may have changed since the scheduler last read it.
    changed: BTreeSet<String>,
    /// Time until which the passing of time alone changes no pool; `None` if not known.
    due: Option<Timestamp>,
    /// Sum of this process's gaps for which the pools' silence was excused.
    excused: Duration,
}

#[derive(Debug)]
struct RegisteredPool {
    url: String,
    instance_id: String,
    client: ApiClient,
    interval: SignedDuration,
    registered_at: Timestamp,
    last_heartbeat: Timestamp,
    /// Sum of this process's gaps before the last heartbeat: the pool's age in real time includes only later gaps.
    stood_before: Duration,
    /// Start of the judged silence: the last heartbeat, or the end of a later gap of this process.
    silent_since: Timestamp,
    seq: u64,
    status: Option<PoolStatus>,
    /// Models on the disk of the previous instance, used until this one reports its own.
    models_before: Vec<ModelOnDisk>,
    endpoints: HashMap<String, WorkerEndpoint>,
    times: WorkerTimes,
    /// Liveness when the scheduler last read the pool's state.
    shown: PoolLiveness,
    /// Identity of the pool's host; older pools send none.
    host_id: Option<String>,
    /// Time at which the pool stopped on purpose, until it registers again.
    stopped_at: Option<Timestamp>,
    /// Instances that held the id earlier, newest last.
    replaced: Vec<String>,
    /// The instance whose registration was refused last.
    contender: Option<standing::Contender>,
}

impl FleetState {
    /// Gives every live pool a full time limit again after a gap in which this process did not run: heartbeats that
    /// arrived in the gap may still be unread.
    fn excuse(&mut self, stood: Duration) {
        if stood <= self.excused {
            return;
        }
        self.excused = stood;
        let now = clock::now();
        let alive = |pool: &&mut RegisteredPool| pool.liveness(now) != PoolLiveness::Offline;
        for pool in self.pools.values_mut().filter(alive) {
            pool.silent_since = now;
        }
    }
}

impl RegisteredPool {
    fn liveness(&self, now: Timestamp) -> PoolLiveness {
        PoolLiveness::judge(self.silent_since, self.interval, now)
    }

    /// Returns the times at which the pool becomes suspect and offline.
    fn deadlines(&self) -> [Timestamp; 2] {
        PoolLiveness::deadlines(self.silent_since, self.interval)
    }

    /// Returns the milliseconds since the last heartbeat in which this process did not run.
    fn stood_ms(&self) -> u64 {
        let stood = own_clock::stood().saturating_sub(self.stood_before);
        u64::try_from(stood.as_millis()).unwrap_or(u64::MAX)
    }

    fn heard(&mut self, now: Timestamp) {
        (self.last_heartbeat, self.silent_since) = (now, now);
        self.stood_before = own_clock::stood();
    }

    /// Returns the models on the pool's disk. Until the first heartbeat, these are the previous instance's.
    fn models(&self) -> &[ModelOnDisk] {
        let status = self.status.as_ref();
        status.map_or(&self.models_before, |status| &status.models)
    }

    /// Returns whether the pool can run a model on its disk: `Some(None)` if so, `Some(Some(reason))` if not, `None` if
    /// it has not reported the model.
    fn support(&self, model: &ModelRef) -> Option<Option<&str>> {
        let mut models = self.models().iter();
        let known = models.find(|known| known.model_ref == *model)?;
        Some(known.unsupported.as_deref())
    }

    fn worker(&self, id: &str) -> Option<&WorkerInfo> {
        self.status
            .as_ref()?
            .workers
            .iter()
            .find(|worker| worker.id == id)
    }

    /// Returns the refusal of an instance that this one has replaced.
    fn newer_instance(&self, id: &str) -> FleetError {
        let detail = format!(
            "instance `{}` at {} has registered since",
            self.instance_id, self.url
        );
        FleetError::Stale {
            pool: id.to_owned(),
            detail,
        }
    }
}

impl Fleet {
    /// Creates a fleet without pools. `token` opens the pools' APIs. Silence does not count until the recovery window has
    /// passed, both since `now` and since the moment at which the last pool fell silent.
    pub fn new(token: Option<Secret>, config: &OrchestratorConfig, now: Timestamp) -> Self {
        Self {
            inner: Mutex::default(),
            token,
            limit: usize::try_from(config.max_pools).unwrap_or(usize::MAX),
            started_at: now,
            window: config.recovery_window(),
            heard: watch::Sender::new(()),
        }
    }

    /// Returns a receiver that is notified at each heartbeat.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.heard.subscribe()
    }

    /// Returns the time of the pool's last heartbeat; `None` if the pool is unknown, or has registered but not reported.
    pub fn last_told(&self, pool: &str) -> Option<Timestamp> {
        let inner = self.lock();
        let told = |pool: &&RegisteredPool| pool.status.is_some();
        Some(inner.pools.get(pool).filter(told)?.last_heartbeat)
    }

    /// Returns the time from which a silent pool counts as lost. After a start, every pool has to find this orchestrator again.
    /// If all pools are silent at once, the fault is probably on this side.
    fn silence_counts_from(&self, inner: &FleetState, now: Timestamp) -> Timestamp {
        let offline = inner.pools.values().map(|pool| pool.deadlines()[1]);
        let none_left = offline.max().filter(|at| *at <= now);
        none_left
            .unwrap_or(self.started_at)
            .max(self.started_at)
            .saturating_add(self.window)
            .unwrap_or(Timestamp::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, FleetState> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.excuse(own_clock::stood());
        inner
    }

    /// Registers a pool, or a new instance of one. The pool's first heartbeat reports what it has.
    pub fn register(&self, request: RegisterRequest, now: Timestamp) -> Result<(), FleetError> {
        self.take_in(request, self.limit, now)
    }

    /// Registers a pool, if it is known or fewer than `limit` pools are registered.
    fn take_in(
        &self,
        request: RegisterRequest,
        limit: usize,
        now: Timestamp,
    ) -> Result<(), FleetError> {
        check_name("pool_id", &request.pool_id)?;
        check_name("instance_id", &request.instance_id)?;
        if let Some(host_id) = &request.host_id {
            check_name("host_id", host_id)?;
        }
        let RegisterRequest {
            pool_id,
            url,
            api_version,
            heartbeat_interval_ms,
            ..
        } = request.clone();
        if api_version != POOL_API_VERSION {
            return Err(FleetError::Version {
                pool: pool_id,
                theirs: api_version,
                ours: POOL_API_VERSION,
            });
        }
        if !HEARTBEAT_INTERVAL_MS.contains(&heartbeat_interval_ms) {
            let reason = format!(
                "is {heartbeat_interval_ms}; use {} to {}",
                HEARTBEAT_INTERVAL_MS.start(),
                HEARTBEAT_INTERVAL_MS.end()
            );
            return Err(FleetError::Invalid {
                field: "heartbeat_interval_ms",
                reason,
            });
        }
        let client = ApiClient::new(&url, self.token.clone()).map_err(FleetError::Url)?;
        let interval =
            SignedDuration::from_millis(i64::try_from(heartbeat_interval_ms).unwrap_or(i64::MAX));
        let mut inner = self.lock();
        if inner.pools.len() >= limit && !inner.pools.contains_key(&pool_id) {
            return Err(FleetError::Full {
                pool: pool_id,
                limit,
            });
        }
        let before = inner.pools.get_mut(&pool_id);
        if let Some(held) = before.filter(|held| held.withstands(&request, now)) {
            return Err(held.refuse(&request, now));
        }
        let RegisterRequest {
            instance_id,
            host_id,
            ..
        } = request;
        let before = inner.pools.remove(&pool_id);
        let replaced = before.as_ref().map(|old| old.replaced_by(&instance_id));
        let models_before = before.as_ref().map(|old| old.models().to_vec());
        let contender = before.and_then(|old| old.contender);
        // Requests before this registration may have gone to an earlier instance.
        inner.overlay.forget_pool(&pool_id);
        tracing::info!(pool = pool_id, url, "pool registered");
        let pool = RegisteredPool {
            contender: contender.filter(|other| !other.is(&instance_id)),
            replaced: replaced.unwrap_or_default(),
            host_id,
            stopped_at: None,
            url,
            instance_id,
            client,
            interval,
            registered_at: clock::wall(now),
            last_heartbeat: now,
            stood_before: own_clock::stood(),
            silent_since: now,
            seq: 0,
            status: None,
            models_before: models_before.unwrap_or_default(),
            endpoints: HashMap::new(),
            times: WorkerTimes::default(),
            shown: PoolLiveness::Online,
        };
        // The pool may never report, so its silence counts from here.
        let [silent, _] = pool.deadlines();
        inner.due = inner.due.into_iter().chain([silent]).min();
        inner.changed.insert(pool_id.clone());
        inner.pools.insert(pool_id, pool);
        Ok(())
    }

    /// Registers a pool of an earlier run. It counts as heard from at `now`, so that it has time to report.
    pub fn restore(&self, stored: StoredPool, now: Timestamp) -> Result<(), FleetError> {
        let StoredPool {
            request,
            registered_at,
            stopped_at,
        } = stored;
        let id = request.pool_id.clone();
        // The pool was admitted under the limit in force then. A lowered limit applies to new pools only.
        self.take_in(request, usize::MAX, now)?;
        let mut inner = self.lock();
        if let Some(pool) = inner.pools.get_mut(&id) {
            pool.registered_at = registered_at;
            pool.stopped_at = stopped_at;
        }
        if stopped_at.is_none() {
            inner.awaited.insert(id);
        }
        Ok(())
    }

    /// Takes a pool's report.
    pub fn heartbeat(
        &self,
        id: &str,
        heartbeat: Heartbeat,
        now: Timestamp,
    ) -> Result<(), FleetError> {
        let Heartbeat {
            instance_id,
            seq,
            snapshot,
        } = heartbeat;
        let mut inner = self.lock();
        let FleetState {
            pools,
            awaited,
            overlay,
            changed,
            due,
            ..
        } = &mut *inner;
        let pool = pools
            .get_mut(id)
            .ok_or_else(|| FleetError::Unknown(id.to_owned()))?;
        if snapshot.status.pool_id != id {
            let reason = format!(
                "is `{}` in a heartbeat of pool `{id}`",
                snapshot.status.pool_id
            );
            return Err(FleetError::Invalid {
                field: "snapshot.status.pool_id",
                reason,
            });
        }
        if instance_id != pool.instance_id {
            return Err(pool.newer_instance(id));
        }
        // A late heartbeat of an instance that has deregistered.
        if pool.stopped_at.is_some() {
            return Err(FleetError::Unknown(id.to_owned()));
        }
        if pool.status.is_some() && seq <= pool.seq {
            let detail = format!("its number is {seq}, but {} has arrived already", pool.seq);
            return Err(FleetError::Stale {
                pool: id.to_owned(),
                detail,
            });
        }
        pool.seq = seq;
        pool.heard(now);
        pool.times
            .heard(&snapshot.status.workers, &snapshot.ages, now);
        pool.endpoints = snapshot
            .endpoints
            .into_iter()
            .map(|e| (e.worker_id.clone(), e))
            .collect();
        awaited.remove(id);
        overlay.heard(id, &snapshot.status, now);
        pool.status = Some(snapshot.status);
        changed.insert(id.to_owned());
        // This pool's deadline may be earlier than all others.
        let [silent, _] = pool.deadlines();
        *due = due.iter().copied().chain([silent]).min();
        drop(inner);
        self.heard.send_replace(());
        Ok(())
    }

    /// Forgets a pool. Returns false if it was unknown.
    pub fn remove(&self, id: &str) -> bool {
        let mut inner = self.lock();
        inner.overlay.forget_pool(id);
        inner.changed.insert(id.to_owned());
        inner.awaited.remove(id);
        inner.pools.remove(id).is_some()
    }

    /// Returns all pools, by id.
    pub fn views(&self, now: Timestamp) -> Vec<PoolView> {
        self.lock()
            .pools
            .iter()
            .map(|(id, pool)| pool.view(id, now))
            .collect()
    }

    /// Returns one pool; `None` if it has not registered.
    pub fn view(&self, id: &str, now: Timestamp) -> Option<PoolView> {
        self.lock().pools.get(id).map(|pool| pool.view(id, now))
    }

    /// Returns a client of a pool's API; `None` if the pool has not registered.
    pub fn client(&self, id: &str) -> Option<ApiClient> {
        self.lock().pools.get(id).map(|pool| pool.client.clone())
    }

    /// Returns the endpoint of a worker; `None` if its pool has not reported one.
    pub fn endpoint(&self, pool: &str, worker: &str) -> Option<WorkerEndpoint> {
        self.lock().pools.get(pool)?.endpoints.get(worker).cloned()
    }

    /// Returns the models on the pools' disks that `model` means, by the names that workers use: one for an exact name
    /// or for another path to the same file, any number for a reference to the hub that leaves its revision or file
    /// open.
    pub fn meant_by(&self, model: &ModelRef) -> Vec<ModelRef> {
        let inner = self.lock();
        let models = || inner.pools.values().flat_map(RegisteredPool::models);
        if models().any(|on_disk| on_disk.model_ref == *model) {
            return vec![model.clone()];
        }
        if let Some(on_disk) = models().find(|on_disk| on_disk.aliases.contains(model)) {
            return vec![on_disk.model_ref.clone()];
        }
        let fitting = models().filter(|on_disk| on_disk.model_ref.is_meant_by(model));
        let fitting: BTreeSet<_> = fitting.map(|on_disk| on_disk.model_ref.clone()).collect();
        fitting.into_iter().collect()
    }

    /// Returns a pool that downloads a model that `model` may mean.
    pub fn downloads(&self, model: &ModelRef) -> Option<String> {
        let inner = self.lock();
        let fetches = |pool: &RegisteredPool| {
            let mut downloads = pool.status.iter().flat_map(|status| &status.downloads);
            downloads.any(|other| other == model || other.is_meant_by(model))
        };
        let found = inner.pools.iter().find(|(_, pool)| fetches(pool));
        found.map(|(id, _)| id.clone())
    }

    /// Returns the pools' verdict on a model: `Some(None)` if a pool can run it, `Some(Some(reason))` if every pool
    /// with the model can't, `None` if no pool has reported it.
    pub fn support(&self, model: &ModelRef) -> Option<Option<String>> {
        let inner = self.lock();
        let mut said = inner.pools.values().filter_map(|pool| pool.support(model));
        let first = said.next()?;
        let able = first.is_none() || said.any(|reason| reason.is_none());
        Some(first.filter(|_| !able).map(str::to_owned))
    }

    /// Returns a registered pool that has not reported yet and may have a model: a pool of an earlier run while silence
    /// does not count, a pool of this run until it is lost.
    pub fn awaited(&self, now: Timestamp) -> Option<String> {
        let inner = self.lock();
        let patient = now < self.silence_counts_from(&inner, now);
        let may_come = |id: &String, pool: &RegisteredPool| {
            let of_this_run = !inner.awaited.contains(id);
            let alive = pool.standing(now) == PoolLiveness::Awaited;
            pool.status.is_none() && (patient || (of_this_run && alive))
        };
        let mut pools = inner.pools.iter();
        let found = pools.find(|(id, pool)| may_come(id, pool));
        found.map(|(id, _)| id.clone())
    }

    /// Returns whether pools may still report models: a registered pool has not reported yet, or soon after a start no
    /// pool has.
    pub fn is_unknown(&self, now: Timestamp) -> bool {
        if self.awaited(now).is_some() {
            return true;
        }
        let inner = self.lock();
        let spoken = inner.pools.values().any(|pool| pool.status.is_some());
        !spoken && now < self.silence_counts_from(&inner, now)
    }

    /// Returns the fate of a worker, as its pool reports it. The pool's own silence counts only after the recovery window.
    pub fn fate(&self, pool_id: &str, worker: &str, now: Timestamp) -> Fate {
        let inner = self.lock();
        let away = |why: &str| {
            if now < self.silence_counts_from(&inner, now) {
                Fate::Alive
            } else {
                Fate::PoolAway(format!("pool `{pool_id}` {why}"))
            }
        };
        let Some(pool) = inner.pools.get(pool_id) else {
            return away("has left");
        };
        if pool.liveness(now) == PoolLiveness::Offline {
            return away("is silent");
        }
        match pool.worker(worker) {
            Some(worker) if worker.status.is_live() => Fate::Alive,
            Some(worker) => {
                let why = worker
                    .exit
                    .as_ref()
                    .map_or_else(|| worker.status.to_string(), |exit| exit.message.clone());
                Fate::Gone(format!(
                    "worker `{}` on pool `{pool_id}` ended: {why}",
                    worker.id
                ))
            }
            // A new instance reports its workers only with its first heartbeat.
            None if pool.status.is_none() => Fate::Alive,
            None => Fate::Gone(format!(
                "pool `{pool_id}` has no worker `{worker}` any more"
            )),
        }
    }

    /// Returns the pools whose state may have changed since the last call, as the scheduler must see them: their reports, with
    /// later requests and answers laid over them.
    pub fn take_changes(&self, now: Timestamp) -> Vec<PoolChange> {
        let mut inner = self.lock();
        let FleetState {
            pools,
            overlay,
            changed,
            due,
            ..
        } = &mut *inner;
        if due.is_none_or(|due| due <= now) {
            changed.extend(overlay.expire(now));
            let turned = pools
                .iter()
                .filter(|(_, pool)| pool.standing(now) != pool.shown);
            changed.extend(turned.map(|(id, _)| id.clone()));
        }
        let changes = std::mem::take(changed).into_iter().map(|id| {
            let Some(pool) = pools.get_mut(&id) else {
                return PoolChange::Gone(id);
            };
            pool.shown = pool.standing(now);
            let Some(status) = pool.status.clone() else {
                return PoolChange::Is(Box::new(PoolState::unheard(&id, pool.shown)));
            };
            let mut state = PoolState::new(&status, pool.shown);
            pool.times.apply(&mut state);
            overlay.apply(&mut state, now, |worker| {
                pool.endpoints.contains_key(worker)
            });
            PoolChange::Is(Box::new(state))
        });
        let changes = changes.collect();
        // A heartbeat since then can only move its pool's deadlines later. So `due` may be too early, but never too late.
        if due.is_none_or(|due| due <= now) {
            *due = next_change(pools, overlay, now);
        }
        changes
    }

    /// Returns the next moment after `now` at which the passing of time alone changes the pools' states, or an earlier one.
    pub fn next_change(&self, now: Timestamp) -> Option<Timestamp> {
        let mut inner = self.lock();
        // Requests since `due` was computed may have earlier deadlines.
        let overlay = inner.overlay.deadlines().filter(|at| *at > now).min();
        inner.due = inner.due.into_iter().chain(overlay).min();
        if inner.due.is_none() {
            inner.due = next_change(&inner.pools, &inner.overlay, now);
        }
        let silence = Some(self.silence_counts_from(&inner, now)).filter(|at| *at > now);
        inner.due.into_iter().chain(silence).min()
    }
}

fn next_change(
    pools: &BTreeMap<String, RegisteredPool>,
    overlay: &Overlay,
    now: Timestamp,
) -> Option<Timestamp> {
    let liveness = pools.values().flat_map(RegisteredPool::deadlines);
    liveness
        .chain(overlay.deadlines())
        .filter(|at| *at > now)
        .min()
}

/// Checks a name. Names come from other machines, are shown to people, and become parts of paths.
fn check_name(field: &'static str, name: &str) -> Result<(), FleetError> {
    let fits = (1..=128).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let reason = || "must be 1 to 128 letters, digits, `.`, `_` or `-`".to_owned();
    if fits {
        Ok(())
    } else {
        Err(FleetError::Invalid {
            field,
            reason: reason(),
        })
    }
}

#[cfg(test)]
mod tests;
