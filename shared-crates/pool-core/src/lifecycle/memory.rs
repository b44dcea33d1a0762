//! The memory of devices, and the part available to workers.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::gpu::GpuState;
use crate::gpu::Gpu;
use crate::kit::host_memory::{HostMemory, private_bytes};
use crate::registry::WorkerRecord;
use crate::worker::{Backend, Device, WorkerStatus};

/// A reading of a device's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that workers may take in total.
    pub total_bytes: u64,
    /// Bytes that were unused at the time of the reading.
    pub available_bytes: u64,
    /// Time of the reading, measured from the host's boot; `None` for just now.
    pub as_of: Option<Duration>,
}

impl DeviceMemory {
    /// Limits the memory that workers may take to `limit`.
    #[must_use]
    pub fn limited(self, limit: Option<u64>) -> Self {
        Self {
            total_bytes: limit.map_or(self.total_bytes, |limit| limit.min(self.total_bytes)),
            ..self
        }
    }

    /// Returns the main memory that workers may take.
    pub fn of_host(memory: HostMemory) -> Self {
        Self {
            total_bytes: memory.total_bytes,
            available_bytes: memory.available_bytes,
            as_of: None,
        }
    }

    /// Returns the memory that workers may take on a GPU. A GPU of unknown memory has none, and one that does not respond has
    /// none available.
    pub fn of_gpu(gpu: &Gpu) -> Self {
        let memory = gpu.reading.memory.unwrap_or_default();
        let available = gpu.state == GpuState::Ok;
        Self {
            total_bytes: memory.total_bytes,
            available_bytes: if available { memory.free_bytes } else { 0 },
            as_of: gpu.read_at,
        }
    }

    /// Returns how much of the available memory a worker is still going to take: its reservation minus the bytes that it holds.
    /// A cache is touched only as it fills, so a ready worker may hold much less than it will need.
    fn outstanding(self, record: &WorkerRecord, held: &Held) -> u64 {
        match held.0.get(&record.info.id) {
            Some(now) => record.reserved_bytes().saturating_sub(*now),
            // If the held bytes are unknown, assume that a ready worker has allocated everything, as GPU drivers do at once.
            None if self.is_before(record) => record.reserved_bytes(),
            None => 0,
        }
    }

    /// Returns whether a worker has taken its memory after this reading, or is still going to.
    fn is_before(&self, record: &WorkerRecord) -> bool {
        let seen = |ready: Duration| self.as_of.is_none_or(|as_of| ready < as_of);
        record.info.status == WorkerStatus::Starting || !record.moments.ready.is_none_or(seen)
    }
}

/// The bytes that each worker holds, by worker id, of the memory that [`DeviceMemory::available_bytes`] measures.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held(HashMap<String, u64>);

impl Held {
    /// Reads the bytes held by the live CPU workers among `records`, where the system reports them. Must be called *before* the
    /// host's free memory is read: memory that a worker takes in between is then counted twice, rather than not at all.
    pub fn by(records: &[WorkerRecord]) -> Self {
        let on_cpu = |record: &&WorkerRecord| {
            record.info.status.is_live() && record.info.device.backend == Backend::Cpu
        };
        let held = |record: &WorkerRecord| {
            // A reused pid belongs to another process, which holds none of the worker's memory.
            let identity = record.identity.as_ref().filter(|it| it.is_alive())?;
            Some((record.info.id.clone(), private_bytes(identity.pid)?))
        };
        Self(records.iter().filter(on_cpu).filter_map(held).collect())
    }
}

/// Returns whether two devices share one memory, as the CPU and the GPU of a Mac do.
pub fn shares_memory(a: Device, b: Device) -> bool {
    let unified = |device: Device| matches!(device.backend, Backend::Cpu | Backend::Metal);
    a == b || (unified(a) && unified(b))
}

/// Returns the bytes reserved for live workers in the memory of `device`.
pub fn reserved_bytes(device: Device, records: &[WorkerRecord]) -> u64 {
    beside(device, records)
        .map(WorkerRecord::reserved_bytes)
        .fold(0, u64::saturating_add)
}

/// Returns the memory available to another worker on `device`: the smaller of the unreserved memory, and the unused memory
/// minus what the current workers are still going to use.
pub fn free_bytes(
    memory: DeviceMemory,
    device: Device,
    records: &[WorkerRecord],
    held: &Held,
) -> u64 {
    let to_come = beside(device, records)
        .map(|record| memory.outstanding(record, held))
        .fold(0, u64::saturating_add);
    let unreserved = memory
        .total_bytes
        .saturating_sub(reserved_bytes(device, records));
    memory
        .available_bytes
        .saturating_sub(to_come)
        .min(unreserved)
}

/// Returns the device with the most memory for another worker, or the first of several with equal memory.
pub fn roomiest(
    devices: impl IntoIterator<Item = (Device, DeviceMemory)>,
    records: &[WorkerRecord],
    held: &Held,
) -> Option<(Device, DeviceMemory)> {
    let free =
        |(device, memory): &(Device, DeviceMemory)| free_bytes(*memory, *device, records, held);
    devices.into_iter().reduce(|best, next| {
        if free(&next) > free(&best) {
            next
        } else {
            best
        }
    })
}

/// A worker whose end would free memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopCandidate {
    /// Id of the worker.
    pub id: String,
    /// State of the worker at the time of the choice.
    pub status: WorkerStatus,
    /// Bytes reserved for the worker.
    pub memory_bytes: u64,
}

/// Returns the workers to stop so that `missing_bytes` more are free on `device`. Prefers idle workers to loading or busy ones,
/// then the longest idle, and includes none needlessly. Returns an empty list if stopping all of them would not suffice.
pub fn what_to_stop(
    missing_bytes: u64,
    device: Device,
    records: &[WorkerRecord],
) -> Vec<StopCandidate> {
    let mut candidates: Vec<_> = beside(device, records)
        // A worker that is already stopping frees its memory anyway.
        .filter(|record| record.info.status != WorkerStatus::Draining)
        .collect();
    candidates.sort_by_key(|record| {
        let (info, moments) = (&record.info, record.moments);
        let idle = info.status == WorkerStatus::Ready && info.active == 0;
        (!idle, moments.idle.or(moments.ready).or(moments.created))
    });
    let (mut chosen, mut freed) = (Vec::new(), 0u64);
    for record in candidates {
        if freed >= missing_bytes {
            break;
        }
        freed = freed.saturating_add(record.reserved_bytes());
        chosen.push(record);
    }
    if freed < missing_bytes {
        return Vec::new();
    }
    // A large worker that was added last may make earlier, smaller ones unnecessary.
    chosen.retain(|record| {
        let without = freed - record.reserved_bytes();
        let needed = without < missing_bytes;
        if !needed {
            freed = without;
        }
        needed
    });
    let candidate = |record: &WorkerRecord| StopCandidate {
        id: record.info.id.clone(),
        status: record.info.status,
        memory_bytes: record.reserved_bytes(),
    };
    chosen.into_iter().map(candidate).collect()
}

/// Returns the live workers that share the memory of `device`.
fn beside(device: Device, records: &[WorkerRecord]) -> impl Iterator<Item = &WorkerRecord> {
    records.iter().filter(move |record| {
        record.info.status.is_live() && shares_memory(record.info.device, device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::kit::process::ProcessIdentity;
    use crate::lifecycle::tests::record;
    use crate::worker::WorkerEvent;

    const GB: u64 = 1_000_000_000;

    /// A worker with `predicted` bytes that has measured `measured`.
    fn worker(predicted: u64, measured: Option<u64>) -> WorkerRecord {
        let mut record = record(0);
        record.info.memory.predicted_bytes = predicted;
        record.info.memory.measured_bytes = measured;
        if measured.is_some() {
            record.apply(WorkerEvent::BecameReady).unwrap();
        }
        record
    }

    #[test] // [POOLD-014]
    fn free_is_what_is_neither_used_nor_promised() {
        let memory = DeviceMemory {
            total_bytes: 16 * GB,
            available_bytes: 10 * GB,
            as_of: None,
        };
        let free = |memory, records: &[WorkerRecord]| {
            free_bytes(memory, Device::CPU, records, &Held::default()) / GB
        };
        assert_eq!(
            free(memory, &[]),
            10,
            "memory used by other programs is not free"
        );
        assert_eq!(
            free(memory.limited(Some(4 * GB)), &[]),
            4,
            "the limit counts"
        );
        assert_eq!(
            free(memory.limited(Some(64 * GB)), &[]),
            10,
            "a limit adds no memory"
        );
        assert_eq!(
            free(memory, &[worker(3 * GB, None)]),
            7,
            "a loading worker will still use the rest of its estimate"
        );
        assert_eq!(
            free(memory, &[worker(3 * GB, Some(9 * GB))]),
            7,
            "the measured figure replaces the estimate"
        );
        assert_eq!(
            free(memory, &[worker(3 * GB, Some(20 * GB))]),
            0,
            "an overshoot blocks"
        );
        let mut ended = worker(9 * GB, None);
        ended.apply(WorkerEvent::Died).unwrap();
        assert_eq!(free(memory, &[ended]), 10);
    }

    #[test] // [POOLD-014]
    fn what_a_worker_has_not_touched_yet_is_not_free() {
        let memory = DeviceMemory {
            total_bytes: 16 * GB,
            available_bytes: 10 * GB,
            as_of: None,
        };
        let free = |records: &[WorkerRecord], held| {
            let held = Held([("worker-cpu-0".to_owned(), held * GB)].into());
            free_bytes(memory, Device::CPU, records, &held) / GB
        };
        let ready = [worker(5 * GB, Some(5 * GB))];
        assert_eq!(free(&ready, 1), 6, "4 of its 5 are still to come");
        assert_eq!(free(&ready, 5), 10);
        assert_eq!(
            free(&ready, 7),
            10,
            "use beyond the estimate is not subtracted twice"
        );
        let loading = [worker(5 * GB, None)];
        assert_eq!(
            free(&loading, 2),
            7,
            "memory already taken does not count twice"
        );
    }

    proptest! {
        /// For any use by other programs and any share of memory that the workers have touched: once every worker holds its
        /// full reservation, everything fits into the host and the limit, and no byte was held back.
        #[test] // [POOLD-014] P14
        fn what_is_promised_can_be_kept_and_touching_memory_changes_nothing(
            total in 0..1000u64,
            limit in prop::option::of(0..1000u64),
            others in 0..1000u64,
            workers in prop::collection::vec((0..300u64, 0..400u64, any::<bool>()), 0..5),
        ) {
            let mut records = Vec::new();
            let mut held = Held::default();
            for (number, (reserved, now, ready)) in workers.iter().enumerate() {
                let mut record = worker(*reserved, ready.then_some(*reserved));
                record.info.id = format!("worker-cpu-{number}");
                held.0.insert(record.info.id.clone(), *now);
                records.push(record);
            }
            let sum = |of: fn(&(u64, u64, bool)) -> u64| workers.iter().map(of).sum::<u64>();
            let in_use = others + sum(|(_, now, _)| *now);
            let memory = DeviceMemory {
                total_bytes: total,
                available_bytes: total.saturating_sub(in_use),
                as_of: None,
            }
            .limited(limit);
            let free = free_bytes(memory, Device::CPU, &records, &held);

            let in_the_end = others + sum(|(reserved, now, _)| *reserved.max(now));
            let reserved = sum(|(reserved, ..)| *reserved);
            let most = limit.map_or(total, |limit| limit.min(total));
            if in_use <= total {
                let fits = total.saturating_sub(in_the_end).min(most.saturating_sub(reserved));
                prop_assert_eq!(free, fits);
            } else {
                prop_assert_eq!(free, 0, "nothing is left as it is");
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test] // [POOLD-014]
    fn what_a_process_holds_is_read_and_a_stranger_with_its_pid_holds_nothing() {
        let mut record = worker(GB, Some(GB));
        assert_eq!(Held::by(std::slice::from_ref(&record)), Held::default());
        record.identity = Some(ProcessIdentity::current().unwrap());
        let held = |record: &WorkerRecord| {
            let held = Held::by(std::slice::from_ref(record));
            held.0.get("worker-cpu-0").copied()
        };
        let before = held(&record).expect("the system reports it");
        let touched = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = held(&record).expect("the system reports it");
        assert!(after >= before + (48 << 20), "{before} to {after}");
        drop(touched);
        record.identity.as_mut().unwrap().start_time += 1;
        assert_eq!(held(&record), None);
    }

    #[test] // [POOLD-014]
    fn what_a_worker_took_after_the_reading_is_not_free() {
        // The driver was read at 10 s. One worker was ready before; the other has taken its memory since.
        let at = Duration::from_secs;
        let memory = DeviceMemory {
            total_bytes: 16 * GB,
            available_bytes: 10 * GB,
            as_of: Some(at(10)),
        };
        let mut records = [worker(GB, Some(GB)), worker(3 * GB, Some(3 * GB))];
        records[0].moments.ready = Some(at(9));
        records[1].moments.ready = Some(at(10));
        assert_eq!(
            free_bytes(memory, Device::CPU, &records, &Held::default()),
            7 * GB
        );
    }

    #[test] // [POOLD-093]
    fn the_gpu_of_a_mac_and_its_processors_share_one_memory() {
        let device = |text: &str| text.parse::<Device>().unwrap();
        let (metal, cuda) = (device("metal:0"), device("cuda:0"));
        assert!(shares_memory(metal, Device::CPU) && shares_memory(Device::CPU, metal));
        assert!(!shares_memory(cuda, Device::CPU) && !shares_memory(cuda, device("cuda:1")));
        let memory = DeviceMemory {
            total_bytes: 16 * GB,
            available_bytes: 16 * GB,
            as_of: None,
        };
        let mut records = [worker(3 * GB, Some(3 * GB)), worker(4 * GB, Some(4 * GB))];
        records[1].info.device = metal;
        for device in [Device::CPU, metal] {
            assert_eq!(reserved_bytes(device, &records), 7 * GB);
            assert_eq!(
                free_bytes(memory, device, &records, &Held::default()),
                9 * GB
            );
        }
        assert_eq!(
            free_bytes(memory, cuda, &records, &Held::default()),
            16 * GB
        );
    }

    #[test] // [POOLD-090]
    fn the_roomiest_device_is_taken_and_of_equal_ones_the_first() {
        let device = |index| Device {
            backend: Backend::Cuda,
            index,
        };
        let with = |free: u64| DeviceMemory {
            total_bytes: free,
            available_bytes: free,
            as_of: None,
        };
        let devices = [
            (device(0), with(4)),
            (device(1), with(9)),
            (device(2), with(9)),
        ];
        assert_eq!(roomiest(devices, &[], &Held::default()), Some(devices[1]));
        let mut taken = worker(6, Some(6));
        taken.info.device = device(1);
        assert_eq!(
            roomiest(devices, &[taken], &Held::default()),
            Some(devices[2])
        );
        assert_eq!(roomiest([], &[], &Held::default()), None);
    }

    #[test] // [POOLD-094]
    fn idle_workers_are_to_stop_before_others_the_longest_idle_first_and_none_in_vain() {
        let at = |seconds| Some(Duration::from_secs(seconds));
        let named = |number, bytes, idle_since| {
            let mut record = record(number);
            record.info.memory.measured_bytes = Some(bytes);
            record.apply(WorkerEvent::BecameReady).unwrap();
            (record.moments.ready, record.moments.idle) = (at(1), idle_since);
            record
        };
        let mut busy = named(0, 50 * GB, None);
        busy.info.active = 1;
        busy.apply(WorkerEvent::BecameBusy).unwrap();
        let mut draining = named(4, 90 * GB, at(1));
        draining.apply(WorkerEvent::Drain).unwrap();
        let records = [
            busy,
            named(1, 3 * GB, at(30)),
            named(2, 2 * GB, at(10)),
            named(3, 6 * GB, at(40)),
            draining,
        ];
        let stop = |missing| -> Vec<String> {
            what_to_stop(missing, Device::CPU, &records)
                .into_iter()
                .map(|candidate| candidate.id.replace("worker-cpu-", ""))
                .collect()
        };
        assert_eq!(stop(GB), ["2"], "the longest idle");
        assert_eq!(stop(5 * GB), ["2", "1"]);
        assert_eq!(
            stop(6 * GB),
            ["3"],
            "the small ones before it are unnecessary"
        );
        assert_eq!(
            stop(12 * GB),
            ["0"],
            "a busy one, because the idle ones do not suffice"
        );
        assert_eq!(stop(61 * GB), ["2", "1", "3", "0"]);
        assert!(stop(62 * GB).is_empty(), "all of them do not suffice");
    }
}
