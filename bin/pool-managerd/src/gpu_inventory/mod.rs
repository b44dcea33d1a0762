//! The devices of this host. For now that is the CPU, which every host has.

use pool_core::api::pool::DeviceInfo;
use pool_core::lifecycle::Lifecycle;
use pool_core::registry::WorkerRecord;

/// All devices, with the memory that a further worker could take beside those in `records`.
pub fn devices(lifecycle: &Lifecycle, records: &[WorkerRecord]) -> Vec<DeviceInfo> {
    match lifecycle.cpu_device(records) {
        Ok(cpu) => vec![cpu],
        Err(error) => {
            tracing::error!(%error, "could not find out how much memory the host has");
            Vec::new()
        }
    }
}
