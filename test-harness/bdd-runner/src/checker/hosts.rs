//! The rules of a pool host.

use std::collections::BTreeMap;

use pool_core::registry::WorkerRecord;
use pool_core::worker::Device;

use super::{Findings, Rule};

/// The state of a pool host at one moment.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Name in the messages of violations.
    pub name: String,
    /// Records of the registry.
    pub workers: Vec<HostWorker>,
    /// Process ids of the running workers.
    pub processes: Vec<u32>,
    /// Most bytes that may be reserved on each device.
    pub capacity_bytes: BTreeMap<Device, u64>,
}

/// A worker's record in the registry.
#[derive(Debug, Clone)]
pub struct HostWorker {
    /// Id of the worker.
    pub id: String,
    /// True if the record's status is a live one.
    pub live: bool,
    /// Process id of the worker; `None` if the record has no process.
    pub pid: Option<u32>,
    /// Device on which the worker computes.
    pub device: Device,
    /// Memory reserved for the worker.
    pub reserved_bytes: u64,
}

impl From<&WorkerRecord> for HostWorker {
    fn from(record: &WorkerRecord) -> Self {
        Self {
            id: record.info.id.clone(),
            live: record.info.status.is_live(),
            pid: record.identity.as_ref().map(|identity| identity.pid),
            device: record.info.device,
            reserved_bytes: record.reserved_bytes(),
        }
    }
}

/// Checks the rules of one host.
pub(super) fn check(host: &Host, findings: &mut Findings) {
    let live = || host.workers.iter().filter(|worker| worker.live);
    for pid in &host.processes {
        let owners: Vec<_> = live()
            .filter(|worker| worker.pid == Some(*pid))
            .map(|worker| &*worker.id)
            .collect();
        findings.add_unless(
            owners.len() == 1,
            Rule::OneProcessARecord,
            &host.name,
            || match &*owners {
                [] => format!("process {pid} has no record"),
                owners => format!("process {pid} has the records {}", owners.join(" and ")),
            },
        );
    }
    for worker in live() {
        let runs = worker.pid.is_some_and(|pid| host.processes.contains(&pid));
        findings.add_unless(runs, Rule::OneProcessARecord, &host.name, || {
            format!("the record of {} is live but has no process", worker.id)
        });
    }
    let mut reserved: BTreeMap<Device, u64> = BTreeMap::new();
    for worker in &host.workers {
        *reserved.entry(worker.device).or_default() += worker.reserved_bytes;
    }
    for (device, bytes) in reserved {
        let capacity = host.capacity_bytes.get(&device).copied().unwrap_or(0);
        findings.add_unless(bytes <= capacity, Rule::MemoryFits, &host.name, || {
            format!("{bytes} bytes are reserved of {capacity} on {device}")
        });
    }
}
