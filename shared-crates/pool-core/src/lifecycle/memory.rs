//! Memory: what a device has, what workers may still take of it, and what a model will need.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::catalog::gguf::{GgufError, GgufFile};
use crate::catalog::store::ResolvedModel;
use crate::registry::WorkerRecord;
use crate::worker::{Device, ModelFile, WorkerStatus};

/// Context of a sequence where nobody asks for another and the model takes as much.
const DEFAULT_CONTEXT: u64 = 4096;
/// The worker holds its KV cache as 32-bit floats.
const KV_ELEMENT_BYTES: u64 = 4;
/// The program itself, its threads' stacks, and the buffers of a prefill chunk.
const WORKING_BYTES: u64 = 96 << 20;

/// What a device says of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that workers may take in all.
    pub total_bytes: u64,
    /// Bytes that nobody uses now.
    pub available_bytes: u64,
}

impl DeviceMemory {
    /// The same memory, of which workers may take at most `limit`.
    #[must_use]
    pub fn limited(self, limit: Option<u64>) -> Self {
        Self {
            total_bytes: limit.map_or(self.total_bytes, |limit| limit.min(self.total_bytes)),
            ..self
        }
    }
}

/// Memory set aside for the live workers on `device`.
pub fn reserved_bytes(device: Device, records: &[WorkerRecord]) -> u64 {
    sum(records.iter().filter(|record| record.info.device == device))
}

/// Memory that a further worker on `device` may take: the smaller of what is not reserved, and what nobody uses now
/// and no worker that still loads is going to use.
pub fn free_bytes(memory: DeviceMemory, device: Device, records: &[WorkerRecord]) -> u64 {
    let on_device = || records.iter().filter(|record| record.info.device == device);
    let loading = sum(on_device().filter(|record| record.info.status == WorkerStatus::Starting));
    let unreserved = memory.total_bytes.saturating_sub(sum(on_device()));
    memory
        .available_bytes
        .saturating_sub(loading)
        .min(unreserved)
}

fn sum<'a>(records: impl Iterator<Item = &'a WorkerRecord>) -> u64 {
    records
        .map(WorkerRecord::reserved_bytes)
        .fold(0, u64::saturating_add)
}

/// Main memory of this host.
#[cfg(target_os = "linux")]
pub fn cpu_memory() -> io::Result<DeviceMemory> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    parse_meminfo(&text).ok_or_else(|| io::Error::other("/proc/meminfo has an unknown form"))
}

#[cfg(target_os = "linux")]
fn parse_meminfo(text: &str) -> Option<DeviceMemory> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kibibytes.checked_mul(1024)
    };
    Some(DeviceMemory {
        total_bytes: field("MemTotal:")?,
        available_bytes: field("MemAvailable:")?,
    })
}

/// Main memory of this host. Compiled on macOS only, and not run by this project's tests.
#[cfg(target_os = "macos")]
pub fn cpu_memory() -> io::Result<DeviceMemory> {
    let output = |program: &str, args: &[&str]| -> io::Result<String> {
        let output = std::process::Command::new(program).args(args).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let total_bytes = output("/usr/sbin/sysctl", &["-n", "hw.memsize"])?
        .parse()
        .map_err(io::Error::other)?;
    let pages = output("/usr/bin/vm_stat", &[])?;
    let page_bytes: u64 = output("/usr/sbin/sysctl", &["-n", "hw.pagesize"])?
        .parse()
        .map_err(io::Error::other)?;
    let count = |name: &str| -> u64 {
        let line = pages
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default();
        line.trim().trim_end_matches('.').parse().unwrap_or(0)
    };
    let idle = count("Pages free:") + count("Pages inactive:") + count("Pages speculative:");
    Ok(DeviceMemory {
        total_bytes,
        available_bytes: idle.saturating_mul(page_bytes).min(total_bytes),
    })
}

/// What a worker will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Bytes.
    pub needed_bytes: u64,
    /// Tokens of context the model was made for; `None` where the file doesn't say.
    pub model_context: Option<u64>,
}

/// What of a model file decides about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    file_bytes: u64,
    kv_bytes_per_token: u64,
    embedding_bytes: u64,
    context: u64,
}

impl Shape {
    fn of(file: &GgufFile) -> Result<Self, GgufError> {
        Ok(Self {
            file_bytes: file.file_size(),
            kv_bytes_per_token: file.kv_cache_bytes(1, KV_ELEMENT_BYTES)?,
            // The embedding table is unpacked to 32-bit floats, so that single rows of it can be taken.
            embedding_bytes: file
                .vocab_size()?
                .saturating_mul(file.embedding_length()?)
                .saturating_mul(4),
            context: file.context_length()?,
        })
    }

    fn needed_bytes(self, context: Option<u32>, slots: u32) -> u64 {
        let tokens = context
            .map_or(self.context.min(DEFAULT_CONTEXT), u64::from)
            .saturating_mul(slots.into());
        [
            self.file_bytes,
            self.kv_bytes_per_token.saturating_mul(tokens),
            self.embedding_bytes,
            WORKING_BYTES,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

/// Estimates memory from the headers of model files, and remembers them for as long as the files stay as they are.
#[derive(Debug, Default)]
pub struct MemoryEstimator {
    shapes: Mutex<HashMap<PathBuf, (ModelFile, Option<Shape>)>>,
}

impl MemoryEstimator {
    /// What a worker with this model needs. A file whose header can't be read gets a rough guess: it is the worker
    /// that refuses it, with the reason, like any other bad file.
    pub fn estimate(
        &self,
        model: &ResolvedModel,
        context: Option<u32>,
        slots: u32,
    ) -> MemoryEstimate {
        match self.shape(model) {
            Some(shape) => MemoryEstimate {
                needed_bytes: shape.needed_bytes(context, slots),
                model_context: Some(shape.context),
            },
            None => {
                let size = model.file.size_bytes;
                MemoryEstimate {
                    needed_bytes: size.saturating_add(size / 4).saturating_add(WORKING_BYTES),
                    model_context: None,
                }
            }
        }
    }

    fn shape(&self, model: &ResolvedModel) -> Option<Shape> {
        // A panic while the lock was held can't have left half an entry.
        let known = || self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((file, shape)) = known().get(&model.path)
            && *file == model.file
        {
            return *shape;
        }
        let shape = GgufFile::open(&model.path)
            .and_then(|file| Shape::of(&file))
            .ok();
        known().insert(model.path.clone(), (model.file.clone(), shape));
        shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        };
        let free = |memory, records: &[WorkerRecord]| free_bytes(memory, Device::CPU, records) / GB;
        assert_eq!(free(memory, &[]), 10, "what others use is not free");
        assert_eq!(
            free(memory.limited(Some(4 * GB)), &[]),
            4,
            "the limit counts"
        );
        assert_eq!(
            free(memory.limited(Some(64 * GB)), &[]),
            10,
            "a limit makes no memory"
        );
        assert_eq!(
            free(memory, &[worker(3 * GB, None)]),
            7,
            "a worker that loads will use what it has not taken yet"
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
    fn the_estimate_counts_weights_cache_and_working_memory() {
        // SmolLM2 135M: 30 blocks, 3 KV heads of 64, keys and values, 4 bytes: 46,080 bytes a token.
        let shape = Shape {
            file_bytes: 98_362_432,
            kv_bytes_per_token: 46_080,
            embedding_bytes: 49_152 * 576 * 4,
            context: 8192,
        };
        let fixed = 98_362_432 + 49_152 * 576 * 4 + WORKING_BYTES;
        assert_eq!(shape.needed_bytes(None, 1), fixed + 4096 * 46_080);
        assert_eq!(shape.needed_bytes(Some(100), 3), fixed + 300 * 46_080);
        assert_eq!(
            Shape {
                context: 512,
                ..shape
            }
            .needed_bytes(None, 1),
            fixed + 512 * 46_080
        );
        assert_eq!(
            Shape {
                kv_bytes_per_token: u64::MAX,
                ..shape
            }
            .needed_bytes(Some(u32::MAX), 256),
            u64::MAX
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_its_memory() {
        let memory = cpu_memory().unwrap();
        assert!(memory.available_bytes > 0 && memory.available_bytes <= memory.total_bytes);
        assert_eq!(
            parse_meminfo("MemTotal: 2 kB\nMemAvailable: 1 kB\n")
                .unwrap()
                .available_bytes,
            1024
        );
        assert_eq!(parse_meminfo("MemTotal: many\n"), None);
    }
}
