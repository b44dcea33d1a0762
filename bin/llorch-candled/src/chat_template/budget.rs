//! A bound on the memory of a thread, for work that somebody else's text decides.
//!
//! Fuel bounds what the template engine charges for, which is nearly everything: adding lists is not. So the program's
//! allocator counts what a rendering holds. It can't fail a request for memory (that ends the process) nor unwind out
//! of one (that is undefined), but it may keep it waiting: a thread over its budget sleeps for good, and whoever waits for it
//! is told. What it holds is lost, no more than its budget; the processor is not.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a waiting thread looks whether the other ran away.
const LOOK_EVERY: Duration = Duration::from_millis(5);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes this thread may still take; as much as there is for threads without a budget.
    static LEFT: Cell<i64> = const { Cell::new(i64::MAX) };
    /// Set when this thread has to stop, or did. Null for threads without a budget.
    static STOP: Cell<*const AtomicBool> = const { Cell::new(ptr::null()) };
}

#[allow(unsafe_code)]
fn take(bytes: usize) {
    let stop = STOP.get();
    if stop.is_null() {
        return;
    }
    let left = LEFT
        .get()
        .saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    LEFT.set(left);
    // SAFETY: the thread owns a reference to the flag for as long as it runs, and a thread that sleeps for good runs.
    let stop = unsafe { &*stop };
    if left < 0 {
        stop.store(true, Ordering::Release);
    }
    if stop.load(Ordering::Acquire) {
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    }
}

fn give(bytes: usize) {
    if !STOP.get().is_null() {
        LEFT.set(
            LEFT.get()
                .saturating_add(i64::try_from(bytes).unwrap_or(i64::MAX)),
        );
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        // SAFETY: the caller's promises are passed on.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        give(layout.size());
        moved
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What a thread may use.
pub(super) struct Budget {
    /// Memory, beyond its stack.
    pub(super) bytes: u64,
    /// Address space for its stack.
    pub(super) stack_bytes: usize,
    /// Time.
    pub(super) time: Duration,
}

/// Why there is no result.
pub(super) enum NoResult {
    /// The work took too much memory or time. It sleeps now, or will at its next request for memory.
    RanAway,
    /// It panicked, or no thread could be started.
    Failed,
}

/// Runs `work` on a thread with a budget.
pub(super) fn within<T: Send + 'static>(
    budget: &Budget,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoResult> {
    let stop = Arc::new(AtomicBool::new(false));
    let own_stop = Arc::clone(&stop);
    let bytes = i64::try_from(budget.bytes).unwrap_or(i64::MAX);
    let (sender, result) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("chat-template".to_owned())
        .stack_size(budget.stack_bytes)
        .spawn(move || {
            LEFT.set(bytes);
            STOP.set(Arc::as_ptr(&own_stop));
            let outcome = work();
            // From here on the thread takes what it needs to end.
            STOP.set(ptr::null());
            sender.send(outcome).ok();
        })
        .map_err(|_| NoResult::Failed)?;
    let start = Instant::now();
    loop {
        match result.recv_timeout(LOOK_EVERY) {
            Ok(outcome) => return Ok(outcome),
            // The flag outlives a thread that unwinds: its destructors run before that of the closure.
            Err(RecvTimeoutError::Disconnected) => return Err(NoResult::Failed),
            Err(RecvTimeoutError::Timeout) => {
                if start.elapsed() > budget.time {
                    stop.store(true, Ordering::Release);
                }
                if stop.load(Ordering::Acquire) {
                    return Err(NoResult::RanAway);
                }
            }
        }
    }
}
