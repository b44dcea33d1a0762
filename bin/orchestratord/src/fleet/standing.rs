//! A registered pool's standing: the instance that holds its id, whether the pool is awaited or stopped, and its shown
//! state.

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::api::pools::{PoolConflict, PoolView, PoolViewState};
use orchestrator_core::pool::PoolLiveness;
use pool_core::api::pool::{PoolStatus, RegisterRequest};

use super::{Fleet, FleetError, RegisteredPool};

/// Number of earlier instances of a pool kept in memory. If one of them returns, it is alive at the same time as its
/// successor.
const REPLACED: usize = 8;

/// An instance that was refused because another instance holds the pool id.
#[derive(Debug)]
pub(super) struct Contender {
    url: String,
    instance_id: String,
    interval: SignedDuration,
    tried_at: Timestamp,
}

impl Contender {
    fn of(request: &RegisterRequest, now: Timestamp) -> Self {
        let interval = i64::try_from(request.heartbeat_interval_ms).unwrap_or(i64::MAX);
        Self {
            url: request.url.clone(),
            instance_id: request.instance_id.clone(),
            interval: SignedDuration::from_millis(interval),
            tried_at: now,
        }
    }

    /// Returns whether this contender has the id `instance_id`.
    pub(super) fn is(&self, instance_id: &str) -> bool {
        self.instance_id == instance_id
    }

    /// Returns whether the contender still tries to register, so that the conflict lasts.
    fn persists(&self, now: Timestamp) -> bool {
        PoolLiveness::judge(self.tried_at, self.interval, now) != PoolLiveness::Offline
    }
}

impl RegisteredPool {
    /// Returns the pool's liveness for the scheduler: a pool gets work from its own first heartbeat until it stops.
    pub(super) fn standing(&self, now: Timestamp) -> PoolLiveness {
        match self.liveness(now) {
            PoolLiveness::Offline => PoolLiveness::Offline,
            _ if self.stopped_at.is_some() => PoolLiveness::Stopped,
            _ if self.status.is_none() => PoolLiveness::Awaited,
            heard => heard,
        }
    }

    /// Returns whether this registration may not replace the present one: another live instance holds the id.
    ///
    /// A restart on the same host replaces its predecessor at once. Hosts are compared by identity, or by address if
    /// either side sends no identity.
    pub(super) fn withstands(&self, request: &RegisterRequest, now: Timestamp) -> bool {
        if request.instance_id == self.instance_id
            || self.stopped_at.is_some()
            || self.liveness(now) == PoolLiveness::Offline
        {
            return false;
        }
        if self.replaced.contains(&request.instance_id) {
            return true;
        }
        match (&self.host_id, &request.host_id) {
            (Some(holder), Some(other)) => holder != other,
            _ => self.url != request.url,
        }
    }

    /// Records and returns the refusal of a registration. The pool's view shows the record.
    pub(super) fn refuse(&mut self, request: &RegisterRequest, now: Timestamp) -> FleetError {
        let known = self.conflict(now);
        if known.is_none_or(|known| known.instance_id != request.instance_id) {
            tracing::warn!(
                pool = request.pool_id,
                holder = self.url,
                refused = request.url,
                "two instances claim the same pool id; refusing the second"
            );
        }
        self.contender = Some(Contender::of(request, now));
        FleetError::Taken {
            pool: request.pool_id.clone(),
            holder: self.url.clone(),
        }
    }

    /// Returns the instances that this registration replaces, newest last.
    pub(super) fn replaced_by(&self, instance_id: &str) -> Vec<String> {
        let mut replaced = self.replaced.clone();
        if self.instance_id != instance_id {
            replaced.push(self.instance_id.clone());
        }
        let surplus = replaced.len().saturating_sub(REPLACED);
        replaced.split_off(surplus)
    }

    fn conflict(&self, now: Timestamp) -> Option<PoolConflict> {
        let contender = self.contender.as_ref()?;
        contender.persists(now).then(|| PoolConflict {
            url: contender.url.clone(),
            instance_id: contender.instance_id.clone(),
            age_ms: millis_since(contender.tried_at, now),
        })
    }

    pub(super) fn view(&self, id: &str, now: Timestamp) -> PoolView {
        let standing = match self.stopped_at {
            Some(_) => PoolLiveness::Stopped,
            None => self.standing(now),
        };
        PoolView {
            id: id.to_owned(),
            url: self.url.clone(),
            state: state_of(standing, self.status.as_ref()),
            // Readers of an earlier release know three values.
            liveness: match standing {
                PoolLiveness::Awaited => PoolLiveness::Suspect,
                PoolLiveness::Stopped => PoolLiveness::Offline,
                heard => heard,
            },
            registered_at: self.registered_at,
            heartbeat_age_ms: millis_since(self.last_heartbeat, now)
                .saturating_add(self.stood_ms()),
            status: self.status.clone(),
            conflict: self.conflict(now),
        }
    }
}

fn state_of(standing: PoolLiveness, status: Option<&PoolStatus>) -> PoolViewState {
    let drain = status.filter(|status| status.draining);
    match (standing, drain) {
        (PoolLiveness::Online, None) => PoolViewState::Online,
        (PoolLiveness::Online, Some(status)) => {
            let waits = |drain: &pool_core::api::pool::DrainStatus| !drain.remaining.is_empty();
            match status.drain.as_ref().is_some_and(waits) {
                true => PoolViewState::Draining,
                false => PoolViewState::Drained,
            }
        }
        (PoolLiveness::Suspect, _) => PoolViewState::Suspect,
        (PoolLiveness::Offline, _) => PoolViewState::Offline,
        (PoolLiveness::Awaited, _) => PoolViewState::Awaited,
        (PoolLiveness::Stopped, _) => PoolViewState::Stopped,
    }
}

fn millis_since(at: Timestamp, now: Timestamp) -> u64 {
    u64::try_from(now.duration_since(at).as_millis()).unwrap_or(0)
}

impl Fleet {
    /// Records that an instance of a pool stops on purpose. Its workers and their streams continue; the pool gets no
    /// more work. Returns false if the instance was refused the id: it only gives up its claim.
    pub fn stop(&self, id: &str, instance_id: &str, now: Timestamp) -> Result<bool, FleetError> {
        let mut inner = self.lock();
        let pool = inner.pools.get_mut(id);
        let pool = pool.ok_or_else(|| FleetError::Unknown(id.to_owned()))?;
        if pool.instance_id != instance_id {
            let contender = pool.contender.as_ref();
            if contender.is_some_and(|contender| contender.is(instance_id)) {
                pool.contender = None;
                return Ok(false);
            }
            return Err(pool.newer_instance(id));
        }
        pool.stopped_at = Some(now);
        inner.changed.insert(id.to_owned());
        inner.awaited.remove(id);
        tracing::info!(pool = id, "pool stopped");
        Ok(true)
    }

    /// Returns the pool that stopped first, if the limit on registered pools is reached: a new pool may take its place.
    pub fn longest_stopped(&self) -> Option<String> {
        let inner = self.lock();
        if inner.pools.len() < self.limit {
            return None;
        }
        let stopped = inner.pools.iter();
        let stopped = stopped.filter_map(|(id, pool)| Some((pool.stopped_at?, id)));
        stopped.min().map(|(_, id)| id.clone())
    }

    /// Returns the pools of an earlier run that have not reported since, by name, each with a client.
    pub fn unheard(&self) -> Vec<(String, pool_core::kit::client::ApiClient)> {
        let inner = self.lock();
        let awaited = inner.awaited.iter();
        awaited
            .filter_map(|id| Some((id.clone(), inner.pools.get(id)?.client.clone())))
            .collect()
    }

    /// Explains which pools have not reported since this run of the orchestrator started, and when their reports are
    /// due.
    pub fn awaited_words(&self, now: Timestamp) -> Option<String> {
        let inner = self.lock();
        let awaited = inner.awaited.iter().filter_map(|id| {
            let pool = inner.pools.get(id)?;
            (pool.standing(now) == PoolLiveness::Awaited).then_some((id, pool))
        });
        let words: Vec<_> = awaited
            .map(|(id, pool)| {
                let ago = now.duration_since(self.started_at).as_secs().max(0);
                let left = pool.interval.as_secs().max(1).saturating_sub(ago);
                let due = match left {
                    1.. => format!("expected within {left} s"),
                    _ => "late".to_owned(),
                };
                format!(
                    "pool `{id}` has not reported since orchestratord started {ago} s ago, {due}"
                )
            })
            .collect();
        (!words.is_empty()).then(|| words.join("; "))
    }
}
