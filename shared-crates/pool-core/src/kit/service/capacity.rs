//! Bounds derived from the process's resources: descriptors and memory.
//!
//! Every connection, call to another daemon and file takes a descriptor. If clients take all descriptors, a daemon
//! can't answer `/health`, open its database or call a worker, so clients get only the remaining places.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{BindError, ServiceOptions};

/// Fewest descriptors with which a service works, not counting those of its own files.
const FEWEST: usize = 16;
/// Fewest spare places.
const FEWEST_SPARE: usize = 4;
/// Most spare places.
const MOST_SPARE: usize = 128;
/// Fewest connections under a low memory limit.
const FEWEST_BY_MEMORY: usize = 8;
/// Most bytes of request bodies held at once, regardless of available memory.
const MOST_BODY_BYTES: u64 = 256 << 20;
/// Bytes that the kernel buffers for a connection whose client does not read them.
pub(super) const SEND_BUFFER: u32 = 128 << 10;
/// Interval in which at most one refusal of each kind is logged.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Most open files of a process on macOS (`OPEN_MAX`), which rejects a higher limit even if it reports none.
const OPEN_MAX: u64 = 10_240;

/// Resources of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resources {
    /// The limit on open files.
    pub descriptors: usize,
    /// Descriptors that are already open.
    pub open: usize,
    /// Bytes of memory that the process may use at most.
    pub memory_bytes: u64,
}

/// Number of places of each kind, derived from a service's resources and settings. Default 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Places {
    /// Connections for any request.
    pub connections: usize,
    /// Event streams among the connections, so that readers leave room for other requests.
    pub streams: usize,
    /// Connections beyond the limit: they serve requests of the control path and refuse all others.
    pub spare: usize,
    /// Descriptors for the daemon's own calls to other daemons.
    pub calls: usize,
    /// Bytes of request bodies held at once.
    pub body_bytes: usize,
}

impl Resources {
    /// Returns this process's resources, after raising its limit on open files as far as the system allows.
    pub fn of_this_process() -> Self {
        Self {
            descriptors: usize::try_from(raise_descriptor_limit()).unwrap_or(usize::MAX),
            open: open_descriptors(),
            memory_bytes: memory_bytes(),
        }
    }
}

/// Raises the soft limit on open files to the hard one. Returns the limit in force.
///
/// Child processes inherit the raised limit. Workers need it too, and it does no harm to `git` and `hf`, which allocate
/// no table of that size.
fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let now = limit.current.unwrap_or(u64::MAX);
    let wanted = [limit.maximum, Some(OPEN_MAX)];
    for current in wanted.into_iter().flatten().filter(|most| *most > now) {
        let raised = Rlimit {
            current: Some(current),
            ..limit
        };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return current;
        }
    }
    now
}

/// Returns the number of open descriptors, or an estimate if the system does not list them.
fn open_descriptors() -> usize {
    let folder = match cfg!(target_os = "linux") {
        true => "/proc/self/fd",
        false => "/dev/fd",
    };
    // Reading the folder takes one descriptor itself.
    std::fs::read_dir(folder).map_or(FEWEST, |entries| entries.count().saturating_sub(1))
}

/// Returns the bytes of memory available to the process: those of the host, or fewer under a limit of its cgroup, address
/// space or data segment.
fn memory_bytes() -> u64 {
    let host = crate::kit::host_memory::read().map_or(u64::MAX, |memory| memory.total_bytes);
    let limits = [Resource::As, Resource::Data].map(|limit| getrlimit(limit).current);
    limits.into_iter().flatten().fold(host, u64::min)
}

impl Places {
    /// Returns the places that `options` ask for, limited by the resources `has`.
    pub(super) fn of(options: &ServiceOptions, has: Resources) -> Result<Self, BindError> {
        let taken = has.open + options.own_files;
        let free = has.descriptors.saturating_sub(taken);
        if free < FEWEST {
            return Err(BindError::Descriptors {
                limit: has.descriptors,
                needed: taken + FEWEST,
            });
        }
        let spare = (free / 8).clamp(FEWEST_SPARE, MOST_SPARE);
        let rest = free - spare;
        // A relayed stream takes two descriptors.
        let calls = rest / if options.relays { 2 } else { 4 };
        // The head of a request fills at most one buffer, and an unread answer another.
        let per_connection = 2 * options.header_limit as u64 + u64::from(SEND_BUFFER);
        let by_memory = usize::try_from(has.memory_bytes / 4 / per_connection)
            .unwrap_or(usize::MAX)
            .max(FEWEST_BY_MEMORY);
        let connections = options.max_connections.min(rest - calls).min(by_memory);
        let calls = rest - connections;
        // A quarter of the connections is left for short requests.
        let streams = connections - connections / 4;
        let body_limit = options.body_limit as u64;
        let most_bodies = MOST_BODY_BYTES.max(body_limit);
        let body_bytes = (has.memory_bytes / 16).clamp(body_limit, most_bodies);
        Ok(Self {
            connections,
            streams: match options.relays {
                true => streams.min(calls - calls / 4),
                false => streams,
            },
            spare,
            calls,
            body_bytes: usize::try_from(body_bytes).unwrap_or(usize::MAX >> 4),
        })
    }
}

/// The kind of place that a refused request needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    Connections,
    Streams,
    Bodies,
    Calls,
}

/// The places of a service and their use. Clones share the same places.
#[derive(Debug, Clone)]
pub struct Load(Arc<Lanes>);

#[derive(Debug)]
struct Lanes {
    places: Places,
    connections: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    spare: Arc<Semaphore>,
    bodies: Arc<Semaphore>,
    calls: Arc<Semaphore>,
    refused: AtomicU64,
    logged: Mutex<[Option<Instant>; 4]>,
}

impl Load {
    /// Returns the load of a service with these places, all free.
    pub fn new(places: Places) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits));
        Self(Arc::new(Lanes {
            places,
            connections: semaphore(places.connections),
            streams: semaphore(places.streams),
            spare: semaphore(places.spare),
            bodies: semaphore(places.body_bytes.min(Semaphore::MAX_PERMITS)),
            // A quarter of the descriptors is left for short calls, which take no permit.
            calls: semaphore((places.calls - places.calls / 4).min(Semaphore::MAX_PERMITS)),
            refused: AtomicU64::new(0),
            logged: Mutex::default(),
        }))
    }

    /// Returns all places, taken or free.
    pub fn places(&self) -> Places {
        self.0.places
    }

    /// Returns the number of open connections, including spare ones.
    pub fn connections(&self) -> usize {
        let Places {
            connections, spare, ..
        } = self.0.places;
        let free = self.0.connections.available_permits() + self.0.spare.available_permits();
        (connections + spare).saturating_sub(free)
    }

    /// Returns the number of requests refused so far for lack of a place or of room for their bodies.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    pub(super) fn connection(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.connections).try_acquire_owned().ok()
    }

    pub(super) fn spare(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.spare).try_acquire_owned().ok()
    }

    pub(super) fn stream(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.streams).try_acquire_owned().ok()
    }

    /// Reserves a descriptor for a long call to another daemon; `None` if all are taken.
    pub fn call(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.0.calls).try_acquire_owned().ok();
        if place.is_none() {
            self.log(Want::Calls);
        }
        place
    }

    /// Reserves memory for this many bytes of a body; `None` if too little is left.
    pub(super) fn body(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.bodies)
            .try_acquire_many_owned(bytes)
            .ok()
    }

    /// Waits until a new connection would find a place.
    pub(super) async fn a_place(&self) {
        tokio::select! {
            biased;
            _ = self.0.connections.acquire() => {}
            _ = self.0.spare.acquire() => {}
        }
    }

    /// Waits until no connection holds a spare place.
    pub(super) async fn spare_empty(&self) {
        let all = u32::try_from(self.0.places.spare).unwrap_or(u32::MAX);
        let _ = self.0.spare.acquire_many(all).await;
    }

    /// Returns whether connections may be waiting for a spare place.
    pub(super) fn is_pressed(&self) -> bool {
        self.0.spare.available_permits() == 0
    }

    /// Counts a refusal, and logs at most one of each kind a minute.
    pub(super) fn refuse(&self, want: Want) {
        self.0.refused.fetch_add(1, Ordering::Relaxed);
        self.log(want);
    }

    fn log(&self, want: Want) {
        let refused = self.refused();
        let now = Instant::now();
        {
            let mut logged = self.0.logged.lock().unwrap_or_else(PoisonError::into_inner);
            let last = &mut logged[want as usize];
            if last.is_some_and(|last| now.duration_since(last) < LOG_EVERY) {
                return;
            }
            *last = Some(now);
        }
        let places = self.0.places;
        match want {
            Want::Connections => {
                tracing::warn!(limit = places.connections, refused, "too many connections");
            }
            Want::Streams => {
                tracing::warn!(limit = places.streams, refused, "too many event streams");
            }
            Want::Calls => {
                tracing::warn!(
                    limit = places.calls,
                    "no file descriptor left for another worker stream; jobs wait"
                );
            }
            Want::Bodies => {
                tracing::warn!(
                    limit_bytes = places.body_bytes,
                    refused,
                    "too many bytes in request bodies at once"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn places(
        descriptors: usize,
        memory_bytes: u64,
        change: impl FnOnce(&mut ServiceOptions),
    ) -> Result<Places, BindError> {
        let mut options = ServiceOptions::new("testd", "1", 1);
        options.own_files = 20;
        change(&mut options);
        let has = Resources {
            descriptors,
            open: 10,
            memory_bytes,
        };
        Places::of(&options, has)
    }

    #[test] // [POOLCORE-071] [P23]
    fn clients_get_the_descriptors_that_are_left() {
        for (descriptors, connections, streams, spare, calls) in [
            (46, 9, 7, 4, 3),
            (64, 23, 18, 4, 7),
            (256, 149, 112, 28, 49),
            (1024, 653, 490, 124, 217),
            (20_000, 1024, 768, 128, 18_818),
        ] {
            let found = places(descriptors, 64 * GIB, |_| ()).unwrap();
            assert_eq!(
                (found.connections, found.streams, found.spare, found.calls),
                (connections, streams, spare, calls),
                "{descriptors}"
            );
            assert_eq!(
                30 + found.connections + found.spare + found.calls,
                descriptors
            );
        }
        let relay = places(256, 64 * GIB, |options| options.relays = true).unwrap();
        assert!(relay.calls >= relay.streams, "{relay:?}");
        let error = places(45, 64 * GIB, |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the limit of 45 open files is too low: at least 46 are needed"
        );
        assert!(error.hint().unwrap().contains("ulimit -n"));
    }

    #[test] // [POOLCORE-072] [P23]
    fn a_memory_limit_bounds_connections_and_bodies() {
        let found = |memory| places(20_000, memory, |_| ()).unwrap();
        assert_eq!(found(64 * GIB).body_bytes, 256 << 20);
        let small = found(64 << 20);
        assert_eq!((small.connections, small.body_bytes), (64, 4 << 20));
        // One request must be possible even under the lowest limit.
        let least = found(1 << 20);
        assert_eq!((least.connections, least.body_bytes), (8, 4 << 20));
    }

    #[test] // [POOLCORE-071] [P23]
    fn calls_that_stay_open_leave_some_to_short_ones() {
        let load = Load::new(Places {
            calls: 4,
            ..Places::default()
        });
        let held: Vec<_> = std::iter::from_fn(|| load.call()).collect();
        assert_eq!(held.len(), 3);
        drop(held);
        assert!(load.call().is_some());
    }

    #[test] // [POOLCORE-071]
    fn one_connection_can_be_a_stream() {
        let one = places(1024, GIB, |options| options.max_connections = 1).unwrap();
        assert_eq!((one.connections, one.streams), (1, 1));
    }
}
