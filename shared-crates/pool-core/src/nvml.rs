//! NVIDIA's management library, which reports the state of GPUs without using them.

use std::ffi::OsStr;
use std::path::Path;

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};

use crate::api::gpu::GpuProcess;
use crate::gpu::{GpuMemory, GpuReading, GpuSource, ReadError};
use crate::worker::Backend;

/// The library's name as drivers install it. Only development packages provide the name without a number.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Maximum number of processes on one GPU to ask for, because the wrapper allocates memory for as many as the driver reports.
const MOST_PROCESSES: u32 = 4096;

/// A source of readings backed by the loaded library.
pub struct NvmlSource {
    nvml: Nvml,
}

impl NvmlSource {
    /// Loads the library, from `path` if given, or else from the system's library path. The error is one sentence.
    pub fn open(path: Option<&Path>) -> Result<Self, String> {
        let library = path.map_or(OsStr::new(LIBRARY), Path::as_os_str);
        let nvml = Nvml::builder().lib_path(library).init();
        match nvml {
            Ok(nvml) => Ok(Self { nvml }),
            Err(error) => Err(format!(
                "{} can't be used: {error}",
                library.to_string_lossy()
            )),
        }
    }
}

impl GpuSource for NvmlSource {
    fn backend(&self) -> Backend {
        Backend::Cuda
    }

    fn count(&self) -> Result<u32, String> {
        self.nvml.device_count().map_err(|error| error.to_string())
    }

    fn read(&self, index: u32) -> Result<GpuReading, ReadError> {
        let device = self.nvml.device_by_index(index).map_err(failed)?;
        if let Some(other) = optional(device.index())?.filter(|other| *other != index) {
            return Err(ReadError::Failed(format!(
                "the driver returned GPU {other} instead of GPU {index}"
            )));
        }
        let capability = optional(device.cuda_compute_capability())?;
        Ok(GpuReading {
            name: optional(device.name())?,
            uuid: optional(device.uuid())?,
            memory: memory(&device)?,
            utilization_percent: optional(device.utilization_rates())?.map(|rates| rates.gpu),
            temperature_c: optional(device.temperature(TemperatureSensor::Gpu))?,
            power_milliwatts: optional(device.power_usage())?,
            compute_capability: capability.map(|found| (found.major, found.minor)),
            driver_version: optional(self.nvml.sys_driver_version())?,
            processes: processes(&device)?,
        })
    }
}

fn memory(device: &Device<'_>) -> Result<Option<GpuMemory>, ReadError> {
    Ok(optional(device.memory_info())?.map(|memory| GpuMemory {
        total_bytes: memory.total,
        used_bytes: memory.used,
        free_bytes: memory.free,
    }))
}

fn processes(device: &Device<'_>) -> Result<Vec<GpuProcess>, ReadError> {
    let few = |count: Option<u32>| count.is_some_and(|count| count <= MOST_PROCESSES);
    let mut found = Vec::new();
    if few(optional(device.running_compute_processes_count())?) {
        found.extend(optional(device.running_compute_processes())?.unwrap_or_default());
    }
    if few(optional(device.running_graphics_processes_count())?) {
        found.extend(optional(device.running_graphics_processes())?.unwrap_or_default());
    }
    Ok(found.into_iter().map(process).collect())
}

fn process(found: ProcessInfo) -> GpuProcess {
    GpuProcess {
        pid: found.pid,
        name: std::fs::read_to_string(format!("/proc/{}/comm", found.pid)).ok(),
        memory_bytes: match found.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    }
}

/// Converts an unavailable value to `None`. Fails only if the GPU is lost, since it has no values at all.
fn optional<T>(outcome: Result<T, NvmlError>) -> Result<Option<T>, ReadError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(NvmlError::GpuLost) => Err(ReadError::Lost),
        Err(_) => Ok(None),
    }
}

fn failed(error: NvmlError) -> ReadError {
    match error {
        NvmlError::GpuLost => ReadError::Lost,
        error => ReadError::Failed(error.to_string()),
    }
}
