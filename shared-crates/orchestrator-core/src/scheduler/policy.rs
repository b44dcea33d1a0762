//! Policies: which of several places is the best one.

use super::snapshot::{DeviceState, PoolState, WorkerState};

/// How good a place is: lower is better, compared from the left. Places of the same rank are taken by the names of pool
/// and worker, or pool and device, so that a choice never depends on the order in which places were looked at.
pub type Rank = [u64; 3];

/// A worker that could take the job.
#[derive(Debug, Clone, Copy)]
pub struct WorkerChoice<'a> {
    /// Its pool.
    pub pool: &'a PoolState,
    /// The worker.
    pub worker: &'a WorkerState,
}

/// A device on which a worker could be started.
#[derive(Debug, Clone, Copy)]
pub struct StartChoice<'a> {
    /// Its pool.
    pub pool: &'a PoolState,
    /// The device.
    pub device: DeviceState,
}

/// Chooses among the places that passed every filter. A rank depends on nothing but the choice itself, so that it needs
/// to be worked out again only where the place has changed.
pub trait Policy: Send + Sync {
    /// Ranks a worker with a free slot.
    fn rank_worker(&self, choice: &WorkerChoice<'_>) -> Rank;
    /// Ranks a device with enough memory.
    fn rank_start(&self, choice: &StartChoice<'_>) -> Rank;
}

impl WorkerChoice<'_> {
    /// Bytes that a further worker could take on the worker's device.
    fn free_bytes(&self) -> u64 {
        let mut devices = self.pool.devices.iter();
        devices
            .find(|d| d.device == self.worker.device)
            .map_or(0, |d| d.free_bytes)
    }

    /// The share of the worker's slots that is in use, as a whole number that orders like it.
    fn load(&self) -> u64 {
        (u64::from(self.worker.active) << 32) / u64::from(self.worker.slots.max(1))
    }
}

/// More of `bytes` is better.
fn most(bytes: u64) -> u64 {
    u64::MAX - bytes
}

/// The default policy: the worker with the smallest share of its slots in use, the device of the pool with the least
/// work. Ties go to the most free memory, then the least work, then the lower id.
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
