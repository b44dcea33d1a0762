//! The GPUs of this host: bounded readings from a driver, taken in the background.
//!
//! A driver may report nonsense, fail or hang. Each GPU is read on a thread of its own, so that one that hangs does not block
//! anything else: a [`GpuInventory`] answers from memory, with the last readings and their age.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::api::gpu::{GpuInfo, GpuProcess, GpuState};
use crate::config::GpuConfig;
use crate::kit::clock;
use crate::worker::{Backend, Device};

/// Maximum number of GPUs, more than one host has; further ones are ignored.
const MOST_GPUS: u32 = 64;
/// Maximum number of processes listed for one GPU.
const MOST_PROCESSES: usize = 256;
/// Maximum believable memory of a GPU. Larger values are ignored.
const MOST_MEMORY_BYTES: u64 = 4 << 40;
const MOST_CELSIUS: u32 = 200;
const MOST_MILLIWATTS: u32 = 100_000_000;
const MOST_NAME_CHARS: usize = 80;
/// Interval between searches for a missing driver, which may be loaded later, for example during boot.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Sizes of a GPU's memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GpuMemory {
    /// Total bytes.
    pub total_bytes: u64,
    /// Bytes in use by any process.
    pub used_bytes: u64,
    /// Unused bytes.
    pub free_bytes: u64,
}

/// A driver's reading of a GPU at one moment. Unavailable values are `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuReading {
    /// Human-readable name.
    pub name: Option<String>,
    /// Identity of the GPU.
    pub uuid: Option<String>,
    /// Memory sizes.
    pub memory: Option<GpuMemory>,
    /// Percentage of the last sampling period in which the GPU was computing.
    pub utilization_percent: Option<u32>,
    /// Temperature in degrees Celsius.
    pub temperature_c: Option<u32>,
    /// Power draw in milliwatts.
    pub power_milliwatts: Option<u32>,
    /// CUDA compute capability, as major and minor version.
    pub compute_capability: Option<(i32, i32)>,
    /// Version of the driver.
    pub driver_version: Option<String>,
    /// Processes on the GPU, including ours. A process that both computes and draws may be listed twice.
    pub processes: Vec<GpuProcess>,
}

impl GpuReading {
    /// Drops impossible values, and takes the more cautious of two values that contradict each other. If the total differs from
    /// `total_before`, the smaller one counts until two readings agree.
    #[must_use]
    pub fn bounded(self, total_before: Option<u64>) -> Self {
        let memory = self
            .memory
            .filter(|memory| (1..=MOST_MEMORY_BYTES).contains(&memory.total_bytes))
            .map(|memory| {
                let total_bytes = total_before
                    .map_or(memory.total_bytes, |before| before.min(memory.total_bytes));
                let used_bytes = memory.used_bytes.min(total_bytes);
                GpuMemory {
                    total_bytes,
                    used_bytes,
                    free_bytes: memory.free_bytes.min(total_bytes - used_bytes),
                }
            });
        let total_bytes = memory.map(|memory| memory.total_bytes);
        let mut processes: Vec<GpuProcess> = Vec::new();
        for process in self.processes {
            let bytes = process
                .memory_bytes
                .filter(|bytes| total_bytes.is_some_and(|total| *bytes <= total));
            let known = processes.iter().position(|known| known.pid == process.pid);
            match known {
                Some(place) => {
                    processes[place].memory_bytes = processes[place].memory_bytes.max(bytes);
                }
                None if process.pid == 0 || processes.len() == MOST_PROCESSES => {}
                None => processes.push(GpuProcess {
                    pid: process.pid,
                    name: process.name.and_then(|name| plain(&name)),
                    memory_bytes: bytes,
                }),
            }
        }
        Self {
            name: self.name.and_then(|name| plain(&name)),
            uuid: self.uuid.filter(|uuid| is_uuid(uuid)),
            memory,
            utilization_percent: self.utilization_percent.filter(|percent| *percent <= 100),
            temperature_c: self
                .temperature_c
                .filter(|degrees| *degrees <= MOST_CELSIUS),
            power_milliwatts: self.power_milliwatts.filter(|mw| *mw <= MOST_MILLIWATTS),
            compute_capability: self
                .compute_capability
                .filter(|(major, minor)| (1..=99).contains(major) && (0..=9).contains(minor)),
            driver_version: self.driver_version.and_then(|version| plain(&version)),
            processes,
        }
    }
}

/// Removes control characters, which could move a terminal's cursor. Returns `None` if nothing remains.
fn plain(text: &str) -> Option<String> {
    let kept: String = text
        .chars()
        .filter(|c| !c.is_control())
        .take(MOST_NAME_CHARS)
        .collect();
    let kept = kept.trim();
    (!kept.is_empty()).then(|| kept.to_owned())
}

fn is_uuid(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '/');
    (1..=MOST_NAME_CHARS).contains(&text.len()) && text.chars().all(plain)
}

/// The latest known state of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Identifier with the driver's number, in the order of the bus.
    pub device: Device,
    /// Usability of the GPU.
    pub state: GpuState,
    /// Time of the reading; `None` if the GPU has never answered.
    pub measured_at: Option<Timestamp>,
    /// Time of the reading, measured from the host's boot.
    pub read_at: Option<Duration>,
    /// Last reading, bounded.
    pub reading: GpuReading,
}

impl Gpu {
    /// Returns the human-readable name.
    pub fn name(&self) -> String {
        let nameless = || format!("GPU {}", self.device.index);
        self.reading.name.clone().unwrap_or_else(nameless)
    }

    /// Returns the properties that only GPUs have. `ours` holds the process ids of this pool's workers.
    pub fn info(&self, ours: &HashSet<u32>) -> GpuInfo {
        let reading = &self.reading;
        let foreign = reading
            .processes
            .iter()
            .filter(|process| !ours.contains(&process.pid));
        GpuInfo {
            state: self.state,
            measured_at: self.measured_at,
            uuid: reading.uuid.clone(),
            memory_total_bytes: reading.memory.map(|memory| memory.total_bytes),
            memory_used_bytes: reading.memory.map(|memory| memory.used_bytes),
            memory_free_bytes: reading.memory.map(|memory| memory.free_bytes),
            utilization_percent: reading.utilization_percent,
            temperature_c: reading.temperature_c,
            power_milliwatts: reading.power_milliwatts,
            compute_capability: reading
                .compute_capability
                .map(|(major, minor)| format!("{major}.{minor}")),
            driver_version: reading.driver_version.clone(),
            foreign_processes: foreign.cloned().collect(),
        }
    }
}

/// Removes an identity that two GPUs claim, because it distinguishes neither.
fn without_doubles(mut gpus: Vec<Gpu>) -> Vec<Gpu> {
    let (mut seen, mut doubled) = (HashSet::new(), HashSet::new());
    for uuid in gpus.iter().filter_map(|gpu| gpu.reading.uuid.clone()) {
        if !seen.insert(uuid.clone()) {
            doubled.insert(uuid);
        }
    }
    for gpu in &mut gpus {
        gpu.reading.uuid = gpu
            .reading
            .uuid
            .take()
            .filter(|uuid| !doubled.contains(uuid));
    }
    gpus
}

/// The reason a GPU could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The driver reports the GPU as lost.
    #[error("the driver has lost the GPU")]
    Lost,
    /// The driver currently can't read the GPU.
    #[error("{0}")]
    Failed(String),
}

/// A source of readings, such as a driver's library. Its functions may block indefinitely and are called from several threads.
pub trait GpuSource: Send + Sync {
    /// Returns the backend that computes on these GPUs.
    fn backend(&self) -> Backend;
    /// Returns the number of GPUs.
    fn count(&self) -> Result<u32, String>;
    /// Takes a reading of one GPU.
    fn read(&self, index: u32) -> Result<GpuReading, ReadError>;
}

/// A function that finds the source of readings, or returns why there is none.
type Open = dyn Fn() -> Result<Arc<dyn GpuSource>, String> + Send + Sync;

/// The GPUs of this host, read in the background from the first query on.
pub struct GpuInventory {
    open: Arc<Open>,
    interval: Duration,
    deadline: Duration,
    running: OnceLock<PollThreads>,
}

impl GpuInventory {
    /// Creates an inventory of the GPUs that `open` finds.
    pub fn new(
        config: &GpuConfig,
        open: impl Fn() -> Result<Arc<dyn GpuSource>, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            open: Arc::new(open),
            interval: Duration::from_millis(config.poll_interval_ms),
            deadline: Duration::from_millis(config.deadline_ms),
            running: OnceLock::new(),
        }
    }

    /// Returns the last known state of all GPUs, in order of their numbers. Does not block.
    pub fn now(&self) -> Vec<Gpu> {
        let Some(found) = self.running().found() else {
            return Vec::new();
        };
        let now = Instant::now();
        let gpus = found.slots.iter().zip(0..).map(|(slot, index)| {
            let slot = lock(slot);
            Gpu {
                device: Device {
                    backend: found.backend,
                    index,
                },
                state: slot.state(now, self.deadline),
                measured_at: slot.last.as_ref().map(|(_, at)| *at),
                read_at: slot.read_at,
                reading: slot
                    .last
                    .as_ref()
                    .map(|(reading, _)| reading.clone())
                    .unwrap_or_default(),
            }
        });
        without_doubles(gpus.collect())
    }

    /// Returns the state of all GPUs like [`GpuInventory::now`], after each has answered once or the deadline has passed.
    pub fn settled(&self) -> Vec<Gpu> {
        let until = Instant::now() + self.deadline;
        let shared = &self.running().shared;
        let mut board = lock(&shared.board);
        while !board.is_settled() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = shared.news.wait_timeout(board, left);
            board = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(board);
        self.now()
    }

    fn running(&self) -> &PollThreads {
        self.running
            .get_or_init(|| PollThreads::start(Arc::clone(&self.open), self.interval))
    }
}

impl std::fmt::Debug for GpuInventory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuInventory").finish_non_exhaustive()
    }
}

/// The polling threads. Dropping this value ends them as soon as their current driver call returns.
struct PollThreads {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    board: Mutex<Board>,
    news: Condvar,
}

/// The shared results of the polling threads.
#[derive(Default)]
struct Board {
    stop: bool,
    /// True once the first search for a driver has finished.
    looked: bool,
    found: Option<DetectedGpus>,
    /// Number of GPUs that have answered or failed at least once.
    answered: usize,
}

#[derive(Clone)]
struct DetectedGpus {
    backend: Backend,
    slots: Arc<[Mutex<Slot>]>,
}

/// The state of one GPU.
#[derive(Debug, Default)]
struct Slot {
    /// Last reading and its time.
    last: Option<(GpuReading, Timestamp)>,
    /// Time of the reading, measured from the host's boot.
    read_at: Option<Duration>,
    /// Total bytes of the last reading, as reported by the driver.
    total_said: Option<u64>,
    /// Start of the driver call in progress; `None` between calls.
    asked_at: Option<Instant>,
    /// Result of the last call if it failed.
    failed: Option<GpuState>,
}

impl Slot {
    fn state(&self, now: Instant, deadline: Duration) -> GpuState {
        let overdue = |at: Instant| now.saturating_duration_since(at) >= deadline;
        if self.asked_at.is_some_and(overdue) {
            return GpuState::Unresponsive;
        }
        // A GPU that has never answered has no current readings.
        let so_far = match self.last {
            Some(_) => GpuState::Ok,
            None => GpuState::Unresponsive,
        };
        self.failed.unwrap_or(so_far)
    }

    fn answer(&mut self, outcome: Result<GpuReading, ReadError>, at: Timestamp) {
        self.asked_at = None;
        match outcome {
            Ok(reading) => {
                let total_before = self.total_said;
                self.total_said = reading.memory.map(|memory| memory.total_bytes);
                self.last = Some((reading.bounded(total_before), at));
                self.read_at = Some(clock::since_boot());
                self.failed = None;
            }
            Err(ReadError::Lost) => self.failed = Some(GpuState::Lost),
            Err(ReadError::Failed(_)) => self.failed = Some(GpuState::Unresponsive),
        }
    }
}

impl Board {
    fn is_settled(&self) -> bool {
        self.looked
            && self
                .found
                .as_ref()
                .is_none_or(|found| self.answered >= found.slots.len())
    }
}

impl PollThreads {
    fn start(open: Arc<Open>, interval: Duration) -> Self {
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        spawn("gpus", move || find(&open, interval, &theirs));
        Self { shared }
    }

    fn found(&self) -> Option<DetectedGpus> {
        lock(&self.shared.board).found.clone()
    }
}

impl Drop for PollThreads {
    fn drop(&mut self) {
        lock(&self.shared.board).stop = true;
        self.shared.news.notify_all();
    }
}

impl Shared {
    /// Waits for the interval to pass. Returns true if the thread must end.
    fn pause(&self, how_long: Duration) -> bool {
        let board = lock(&self.board);
        let waited = self
            .news
            .wait_timeout_while(board, how_long, |board| !board.stop);
        waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }

    fn tell(&self, change: impl FnOnce(&mut Board)) {
        change(&mut lock(&self.board));
        self.news.notify_all();
    }
}

/// Searches for the driver until there is one, then starts a thread for each of its GPUs.
fn find(open: &Arc<Open>, interval: Duration, shared: &Arc<Shared>) {
    let mut said = None;
    let (count, source) = loop {
        let found = open().and_then(|source| Ok((source.count()?, source)));
        match found {
            Ok(found) => break found,
            Err(reason) => {
                if said.as_ref() != Some(&reason) {
                    tracing::info!(reason, "no GPUs found");
                    said = Some(reason);
                }
                shared.tell(|board| board.looked = true);
            }
        }
        if shared.pause(LOOK_AGAIN) {
            return;
        }
    };
    if count > MOST_GPUS {
        tracing::warn!(
            count,
            "the driver reports too many GPUs; using the first {MOST_GPUS}"
        );
    }
    let slots: Arc<[Mutex<Slot>]> = (0..count.min(MOST_GPUS))
        .map(|_| Mutex::default())
        .collect();
    let found = DetectedGpus {
        backend: source.backend(),
        slots: Arc::clone(&slots),
    };
    shared.tell(|board| {
        board.found = Some(found);
        board.looked = true;
    });
    for index in 0..slots.len() {
        let (source, slots, shared) = (Arc::clone(&source), Arc::clone(&slots), Arc::clone(shared));
        spawn(&format!("gpu-{index}"), move || {
            ask(&*source, index, &slots[index], interval, &shared);
        });
    }
}

/// Reads one GPU repeatedly.
fn ask(
    source: &dyn GpuSource,
    index: usize,
    slot: &Mutex<Slot>,
    interval: Duration,
    shared: &Shared,
) {
    let mut first = true;
    let mut said = None;
    loop {
        lock(slot).asked_at = Some(Instant::now());
        let outcome = source.read(u32::try_from(index).unwrap_or(u32::MAX));
        let trouble = outcome.as_ref().err().cloned();
        lock(slot).answer(outcome, Timestamp::now());
        if trouble != said {
            match &trouble {
                Some(error) => tracing::warn!(gpu = index, %error, "could not read a GPU"),
                None => tracing::info!(gpu = index, "a GPU is readable again"),
            }
            said = trouble;
        }
        if std::mem::take(&mut first) {
            shared.tell(|board| board.answered += 1);
        }
        if shared.pause(interval) {
            return;
        }
    }
}

/// Starts a thread. On failure there are simply no GPUs, which is appropriate for a host that has no threads to spare.
fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(work) {
        tracing::error!(%error, "could not start a GPU polling thread");
    }
}

/// Locks a mutex, even if it is poisoned. A panic leaves a consistent value behind, because every change is a single assignment
/// after the code that may panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn memory(total: u64, used: u64, free: u64) -> Option<GpuMemory> {
        Some(GpuMemory {
            total_bytes: total,
            used_bytes: used,
            free_bytes: free,
        })
    }

    fn reading(total: u64, used: u64, free: u64) -> GpuReading {
        GpuReading {
            memory: memory(total, used, free),
            ..GpuReading::default()
        }
    }

    #[test] // [POOLD-092]
    fn of_figures_that_contradict_each_other_the_careful_one_counts() {
        for (said, before, believed) in [
            ((80, 10, 70), None, memory(80, 10, 70)),
            ((80, 10, 60), None, memory(80, 10, 60)),
            ((80, 90, 70), None, memory(80, 80, 0)),
            ((80, 10, 90), None, memory(80, 10, 70)),
            ((0, 0, 0), None, None),
            ((u64::MAX, 1, 1), None, None),
            // A total that grows or shrinks is believed once two readings agree.
            ((80, 10, 70), Some(40), memory(40, 10, 30)),
            ((40, 10, 30), Some(80), memory(40, 10, 30)),
        ] {
            let (total, used, free) = said;
            assert_eq!(
                reading(total, used, free).bounded(before).memory,
                believed,
                "{said:?}"
            );
        }
    }

    #[test] // [POOLD-092]
    fn texts_counts_and_processes_are_bounded() {
        let process = |pid, memory_bytes| GpuProcess {
            pid,
            name: Some(format!("p{pid}\n")),
            memory_bytes,
        };
        let mut said = reading(80, 10, 70);
        said.name = Some(format!("\u{1b}]0;x\u{7} {}", "n".repeat(500)));
        said.uuid = Some("GPU-\u{1b}[2J".into());
        said.driver_version = Some("\n\t".into());
        said.compute_capability = Some((-1, 0));
        said.processes = vec![process(0, None), process(7, Some(5)), process(7, Some(9))];
        said.processes
            .extend((10..1000).map(|pid| process(pid, Some(81))));
        let kept = said.bounded(None);
        let name = kept.name.unwrap();
        assert!(name.chars().count() <= MOST_NAME_CHARS && !name.contains(char::is_control));
        assert_eq!(
            (kept.uuid, kept.driver_version, kept.compute_capability),
            (None, None, None)
        );
        assert_eq!(kept.processes.len(), MOST_PROCESSES);
        assert_eq!(
            kept.processes[0],
            GpuProcess {
                pid: 7,
                name: Some("p7".into()),
                memory_bytes: Some(9)
            }
        );
        assert_eq!(
            kept.processes[1].memory_bytes, None,
            "more than the GPU has"
        );
    }

    #[test] // [POOLD-091]
    fn a_gpu_is_unresponsive_from_the_deadline_until_it_answers() {
        let (deadline, now) = (Duration::from_millis(500), Instant::now());
        let mut slot = Slot {
            asked_at: Some(now),
            ..Slot::default()
        };
        assert_eq!(slot.state(now, deadline), GpuState::Unresponsive);
        slot.last = Some((reading(80, 10, 70), Timestamp::UNIX_EPOCH));
        let later = |ms| now + Duration::from_millis(ms);
        assert_eq!(slot.state(later(499), deadline), GpuState::Ok);
        assert_eq!(slot.state(later(500), deadline), GpuState::Unresponsive);
        slot.answer(Ok(reading(80, 10, 70)), Timestamp::UNIX_EPOCH);
        assert_eq!(slot.state(later(9000), deadline), GpuState::Ok);
        slot.answer(Err(ReadError::Lost), Timestamp::UNIX_EPOCH);
        assert_eq!(slot.state(now, deadline), GpuState::Lost);
        assert!(slot.last.is_some(), "the last reading stays");
        slot.answer(Err(ReadError::Failed("?".into())), Timestamp::UNIX_EPOCH);
        assert_eq!(slot.state(now, deadline), GpuState::Unresponsive);
    }

    /// A source with one GPU that counts its readings.
    struct CountingGpuSource(Arc<AtomicU32>);

    impl GpuSource for CountingGpuSource {
        fn backend(&self) -> Backend {
            Backend::Cuda
        }

        fn count(&self) -> Result<u32, String> {
            Ok(1)
        }

        fn read(&self, _: u32) -> Result<GpuReading, ReadError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(reading(80, 10, 70))
        }
    }

    #[test] // [POOLD-090]
    fn the_driver_is_not_queried_before_the_first_request() {
        let asked = Arc::new(AtomicU32::new(0));
        let theirs = Arc::clone(&asked);
        let inventory = GpuInventory::new(&GpuConfig::default(), move || {
            Ok(Arc::new(CountingGpuSource(Arc::clone(&theirs))) as Arc<dyn GpuSource>)
        });
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        let gpus = inventory.settled();
        assert_eq!((gpus.len(), gpus[0].name().as_str()), (1, "GPU 0"));
        assert!(gpus[0].measured_at.is_some());
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[test] // [POOLD-091]
    fn a_driver_that_hangs_while_it_is_loaded_is_not_waited_for() {
        let config = GpuConfig {
            deadline_ms: 50,
            ..GpuConfig::default()
        };
        let (_never, waits) = std::sync::mpsc::channel::<()>();
        let waits = Mutex::new(waits);
        let inventory = GpuInventory::new(&config, move || {
            let _ = lock(&waits).recv();
            Err("the test is over".to_owned())
        });
        assert!(inventory.settled().is_empty());
        assert!(inventory.now().is_empty());
    }
}
