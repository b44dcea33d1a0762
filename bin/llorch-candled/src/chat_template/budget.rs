//! A memory limit for a thread whose work is controlled by untrusted text.
//!
//! Fuel bounds what the template engine charges for, which is nearly everything, but not the addition of lists. So the
//! program's allocator counts the memory that a rendering holds. The allocator can't fail an allocation (that ends the process)
//! nor unwind out of one (that is undefined behaviour), but it may delay one: a thread over its budget sleeps forever, and its
//! caller gets an error. Such a thread keeps its memory, at most its budget, but takes no processor time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Interval at which the caller checks whether the thread exceeded its budget.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes that this thread may still allocate; the maximum for threads without a budget.
    static LEFT: Cell<i64> = const { Cell::new(i64::MAX) };
    /// Flag that is set once this thread must stop. Null for threads without a budget.
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
    // SAFETY: the pointer is set only while a `Limited` borrows the flag, and a thread that sleeps forever still borrows it.
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

// SAFETY: every call is forwarded to the system's allocator unchanged.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old block may exist until the new one is filled, so the new size is taken in full first.
        take(size);
        // SAFETY: the caller upholds the contract of `GlobalAlloc::realloc`.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        give(layout.size());
        moved
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller upholds the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// A period in which a thread's memory is limited. Once it is over, even in a panic, the thread may allocate whatever it needs to
/// end.
struct Limited<'a>(PhantomData<&'a AtomicBool>);

impl<'a> Limited<'a> {
    fn begin(bytes: i64, stop: &'a AtomicBool) -> Self {
        LEFT.set(bytes);
        STOP.set(stop);
        Self(PhantomData)
    }
}

impl Drop for Limited<'_> {
    fn drop(&mut self) {
        STOP.set(ptr::null());
    }
}

/// The limits of a thread.
pub(super) struct Budget {
    /// Bytes of memory, without the stack.
    pub(super) bytes: u64,
    /// Bytes of address space for the stack.
    pub(super) stack_bytes: usize,
    /// Longest time that the work may take.
    pub(super) time: Duration,
}

/// Reason why there is no result.
pub(super) enum NoResult {
    /// The work took too much memory or time. Its thread sleeps now, or will at its next allocation.
    RanAway,
    /// The work panicked, or no thread could be started.
    Failed,
}

/// Runs `work` on a separate thread with a budget.
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
            let limited = Limited::begin(bytes, &own_stop);
            let outcome = work();
            drop(limited);
            sender.send(outcome).ok();
        })
        .map_err(|_| NoResult::Failed)?;
    let start = Instant::now();
    loop {
        match result.recv_timeout(CHECK_INTERVAL) {
            Ok(outcome) => return Ok(outcome),
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

#[cfg(test)]
mod tests {
    use std::panic;

    use super::*;

    const BUDGET: Budget = Budget {
        bytes: 256 << 10,
        stack_bytes: 256 << 10,
        time: Duration::from_secs(60),
    };

    /// Allocates more than the budget when its thread ends.
    struct Last(mpsc::SyncSender<usize>);

    impl Drop for Last {
        fn drop(&mut self) {
            let bytes = vec![1_u8; 1 << 20];
            let _ = self.0.send(bytes.len());
        }
    }

    thread_local!(static LAST: Cell<Option<Last>> = const { Cell::new(None) });

    // [CAND-112] The flag is gone by then: a thread that still looked at it would read freed memory.
    #[test]
    fn a_thread_whose_work_panicked_ends_without_a_budget() {
        let (sender, ended) = mpsc::sync_channel(1);
        let result = within::<()>(&BUDGET, move || {
            LAST.set(Some(Last(sender)));
            // Without the hook, which may print a backtrace and so go over the budget by itself.
            panic::resume_unwind(Box::new(()));
        });
        assert!(matches!(result, Err(NoResult::Failed)));
        assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(1 << 20));
    }

    #[test]
    fn work_over_its_budget_has_no_result() {
        let within_budget = within(&BUDGET, || vec![1_u8; 1000].len());
        assert!(matches!(within_budget, Ok(1000)));
        let beyond = within(&BUDGET, || vec![1_u8; 1 << 20].len());
        assert!(matches!(beyond, Err(NoResult::RanAway)));
    }
}
