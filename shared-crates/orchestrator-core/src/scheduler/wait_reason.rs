//! Reasons that a job waits.

use serde::{Deserialize, Serialize};

/// The constraint that keeps a job waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// No pool is registered, or not the one that the job asks for.
    NoPool,
    /// Pools are registered, but none of them is online and takes work.
    PoolsAway,
    /// No pool has the device that the job asks for, or a worker program for any device.
    NoBackend,
    /// No pool has the model on its disk.
    ModelMissing,
    /// A pool is downloading the model.
    Downloading,
    /// The model should be downloaded, but no pool has room on its disk, or the latest downloads failed.
    DownloadRefused,
    /// The prompt needs a longer context than any worker has, and than any pool's file allows.
    ContextShort,
    /// No pool has enough free memory.
    MemoryShort,
    /// Idle workers were asked to stop, to free their memory.
    Evicting,
    /// Every pool that could start a worker recently refused to.
    StartRefused,
    /// A worker with the model is loading it.
    WorkerStarting,
    /// All workers with the model are busy.
    SlotsBusy,
    /// No worker with the model has enough room in its cache, or the room is reserved for an earlier job.
    CacheFull,
    /// There is a place, but the policy left it empty.
    PolicyHeld,
    /// The job is backing off after a lost attempt.
    BackingOff,
}

impl WaitReason {
    /// Returns the reason of a job that waits for the workers serving its model, of which one or none has a free slot.
    pub(super) fn of_serving(has_slot: bool) -> Self {
        match has_slot {
            true => Self::CacheFull,
            false => Self::SlotsBusy,
        }
    }
}
