//! Why a job waits, in words and numbers.

use serde::{Deserialize, Serialize};

/// The constraint that binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// No pool is registered, or not the one that the job asks for.
    NoPool,
    /// Pools are registered, and none is heard from or takes work.
    PoolsAway,
    /// No pool has the device that the job asks for, or a worker program for one.
    NoBackend,
    /// No pool has the model on its disk.
    ModelMissing,
    /// A pool downloads the model.
    Downloading,
    /// The model should be downloaded, and no pool has the room on its disk, or none got it a moment ago.
    DownloadRefused,
    /// No pool has enough free memory.
    MemoryShort,
    /// Idle workers were told to stop, so that their memory becomes free.
    Evicting,
    /// Every pool that could start a worker refused to, a moment ago.
    StartRefused,
    /// A worker with the model is loading it.
    WorkerStarting,
    /// All workers with the model are busy.
    SlotsBusy,
    /// There is a place, and the policy gives it to nobody.
    PolicyHeld,
    /// The job waits a moment after a lost attempt.
    BackingOff,
}

/// How many pools one filter left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterCount {
    /// The filter.
    pub filter: Filter,
    /// Pools left after it.
    pub pools: u32,
}

/// The filters, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Registered, and the one that the job asks for.
    Known,
    /// Heard from and taking work.
    Alive,
    /// Has the device.
    Backend,
    /// Has the model, and did not fail to start it.
    ModelPresent,
    /// Runs the model, or has the memory for it.
    MemoryFits,
    /// Has a worker with a free slot.
    Slots,
    /// The policy agrees.
    Policy,
}

/// Why a job waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The constraint that binds.
    pub reason: WaitReason,
    /// The same, for people, with its numbers.
    pub message: String,
    /// What would lift it.
    pub hint: String,
    /// Pools left after each filter, in order.
    pub filters: Vec<FilterCount>,
}
