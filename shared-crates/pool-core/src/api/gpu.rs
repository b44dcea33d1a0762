//! GPUs, as a pool reports them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The usability of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum GpuState {
    /// The readings are current.
    Ok,
    /// The driver does not answer in time or returns errors; the readings are the last known ones.
    Unresponsive,
    /// The driver reports the GPU as lost, for example because it fell off the bus.
    Lost,
}

impl GpuState {
    /// Returns the name on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unresponsive => "unresponsive",
            Self::Lost => "lost",
        }
    }
}

/// The properties of a GPU that other devices do not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GpuInfo {
    /// Usability of the GPU.
    pub state: GpuState,
    /// Time of the reading; `None` if the GPU has never answered.
    pub measured_at: Option<Timestamp>,
    /// Identity of the GPU, which is stable even if its number changes.
    pub uuid: Option<String>,
    /// Total memory in bytes; `None` if the driver reports none, or an impossible value.
    pub memory_total_bytes: Option<u64>,
    /// Memory in use by any process, in bytes.
    pub memory_used_bytes: Option<u64>,
    /// Unused memory in bytes.
    pub memory_free_bytes: Option<u64>,
    /// Percentage of the last sampling period in which the GPU was computing.
    pub utilization_percent: Option<u32>,
    /// Temperature of the chip in degrees Celsius.
    pub temperature_c: Option<u32>,
    /// Power draw in milliwatts.
    pub power_milliwatts: Option<u32>,
    /// CUDA compute capability, such as `9.0`.
    pub compute_capability: Option<String>,
    /// Version of the driver, such as `550.54.15`.
    pub driver_version: Option<String>,
    /// Processes on the GPU that are not workers of this pool.
    pub foreign_processes: Vec<GpuProcess>,
}

/// A process that uses a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GpuProcess {
    /// Process id.
    pub pid: u32,
    /// Name of the program; `None` if it can't be read.
    pub name: Option<String>,
    /// GPU memory in use by the process, in bytes; `None` if the driver does not report it.
    pub memory_bytes: Option<u64>,
}
