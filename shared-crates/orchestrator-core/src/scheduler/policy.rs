//! Policies, which rank the possible places for a job or a new worker.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::snapshot::{DeviceState, PoolState, WorkerState};

/// Rank of a place: lower is better, compared from the left. Ties go to the lower names of pool and worker, or pool and device,
/// so that a choice never depends on the order in which places were considered.
pub type Rank = [u64; 3];

/// A worker that could take the job.
#[derive(Debug, Clone, Copy)]
pub struct WorkerChoice<'a> {
    /// Pool of the worker.
    pub pool: &'a PoolState,
    /// A worker with a free slot.
    pub worker: &'a WorkerState,
}

/// A device on which a worker could be started.
#[derive(Debug, Clone, Copy)]
pub struct StartChoice<'a> {
    /// Pool of the device.
    pub pool: &'a PoolState,
    /// A device with enough free memory.
    pub device: DeviceState,
}

/// A rule that picks among the places that passed every filter.
///
/// A rank depends only on the choice itself, so it must be recomputed only if the place has changed. The rank of a worker
/// depends on the worker and on its pool's devices, but not on the pool's other workers.
pub trait Policy: Send + Sync {
    /// Ranks a worker with a free slot.
    fn rank_worker(&self, choice: &WorkerChoice<'_>) -> Rank;
    /// Ranks a device with enough memory.
    fn rank_start(&self, choice: &StartChoice<'_>) -> Rank;
}

impl WorkerChoice<'_> {
    /// Returns the bytes that another worker could take on the worker's device.
    pub(super) fn free_bytes(&self) -> u64 {
        let mut devices = self.pool.devices.iter();
        devices
            .find(|d| d.device == self.worker.device)
            .map_or(0, |d| d.free_bytes)
    }

    /// Returns the share of the worker's slots that is in use, as an integer of the same order.
    fn load(&self) -> u64 {
        (u64::from(self.worker.active) << 32) / u64::from(self.worker.slots.max(1))
    }
}

/// Maps more bytes to a lower, hence better, number.
fn most(bytes: u64) -> u64 {
    u64::MAX - bytes
}

/// The default policy. Prefers the worker with the smallest share of its slots in use, and the device of the pool with the
/// least work. Ties go to the most free memory, then the least work, then the lower id.
#[derive(Debug, Clone, Copy, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn rank_worker(&self, choice: &WorkerChoice<'_>) -> Rank {
        let active = u64::from(choice.worker.active);
        [choice.load(), most(choice.free_bytes()), active]
    }

    fn rank_start(&self, choice: &StartChoice<'_>) -> Rank {
        [
            u64::from(choice.pool.active()),
            most(choice.device.free_bytes),
            0,
        ]
    }
}

/// A policy that prefers the worker on the device with the most free memory, and the device with the most free memory. Ties go
/// to the least work, then the lower id.
#[derive(Debug, Clone, Copy, Default)]
pub struct MostVramFree;

impl Policy for MostVramFree {
    fn rank_worker(&self, choice: &WorkerChoice<'_>) -> Rank {
        let active = u64::from(choice.worker.active);
        [most(choice.free_bytes()), active, 0]
    }

    fn rank_start(&self, choice: &StartChoice<'_>) -> Rank {
        let active = u64::from(choice.pool.active());
        [most(choice.device.free_bytes), active, 0]
    }
}

/// A policy that prefers the worker that got a job longest ago, and the pool that started a worker longest ago. Ties go to the
/// most free memory, then the least work, then the lower id. The snapshot holds the turns, as the numbers of the latest
/// dispatches and starts.
#[derive(Debug, Clone, Copy, Default)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn rank_worker(&self, choice: &WorkerChoice<'_>) -> Rank {
        let active = u64::from(choice.worker.active);
        [choice.worker.last_turn, most(choice.free_bytes()), active]
    }

    fn rank_start(&self, choice: &StartChoice<'_>) -> Rank {
        let active = u64::from(choice.pool.active());
        [
            choice.pool.last_start,
            most(choice.device.free_bytes),
            active,
        ]
    }
}

/// A built-in policy, by its name in `scheduler.policy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(rename_all = "kebab-case"))]
pub enum BuiltIn {
    /// See [`LeastLoaded`].
    #[default]
    LeastLoaded,
    /// See [`MostVramFree`].
    MostVramFree,
    /// See [`RoundRobin`].
    RoundRobin,
}

impl BuiltIn {
    /// All built-in policies.
    pub const ALL: [Self; 3] = [Self::LeastLoaded, Self::MostVramFree, Self::RoundRobin];

    /// Returns the name used in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LeastLoaded => "least-loaded",
            Self::MostVramFree => "most-vram-free",
            Self::RoundRobin => "round-robin",
        }
    }

    /// Returns the policy of this name.
    pub fn policy(self) -> &'static dyn Policy {
        match self {
            Self::LeastLoaded => &LeastLoaded,
            Self::MostVramFree => &MostVramFree,
            Self::RoundRobin => &RoundRobin,
        }
    }
}

impl fmt::Display for BuiltIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Error for a text that names no built-in policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown policy `{typed}`: did you mean `{nearest}`? Use least-loaded, most-vram-free or round-robin"
)]
pub struct PolicyError {
    typed: String,
    nearest: BuiltIn,
}

impl FromStr for BuiltIn {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let distance = |known: &Self| strsim::damerau_levenshtein(known.as_str(), text);
        let found = Self::ALL.into_iter().find(|known| known.as_str() == text);
        found.ok_or_else(|| PolicyError {
            typed: text.chars().take(40).collect(),
            nearest: Self::ALL
                .into_iter()
                .min_by_key(distance)
                .unwrap_or_default(),
        })
    }
}

impl Serialize for BuiltIn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for BuiltIn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
