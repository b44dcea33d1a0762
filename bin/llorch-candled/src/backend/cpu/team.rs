//! A team of threads that compute together.
//!
//! A section of work is a number of units, which the caller and the team's threads claim one by one. A thread that the system
//! doesn't run at the moment claims nothing and delays no other thread: the caller waits only for threads that are in the
//! middle of a unit. No result depends on which thread computes a unit.

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Time for which a thread spins on the state before it sleeps: longer than the gaps between the sections of a token.
const SPIN_TIME: Duration = Duration::from_micros(100);

/// Bit of the state that is set while the section can be entered.
const OPEN: u64 = 1 << 31;
/// Lowest bit of the section number, in the upper half of the state.
const SECTION: u64 = 1 << 32;
/// Mask of the number of threads in the section, in the lower half of the state.
const INSIDE: u64 = OPEN - 1;

/// The work of a section. Only [`Team::run`] knows the lifetime of the function.
#[derive(Clone, Copy)]
struct Work {
    units: usize,
    unit: *const (dyn Fn(usize, usize) + Sync),
}

/// The state that the threads of a team share.
struct TeamState {
    /// Number of the section, [`OPEN`], and number of threads in the section.
    state: AtomicU64,
    work: UnsafeCell<Option<Work>>,
    /// Next unit to claim.
    next: AtomicUsize,
    panicked: AtomicBool,
    ending: AtomicBool,
    asleep: Vec<AtomicBool>,
}

// SAFETY: `work` is written only while the section is closed and no thread is inside, and read only inside. The transitions of
// `state` order both. The function that it points to is `Sync`.
unsafe impl Sync for TeamState {}
// SAFETY: as for `Sync`.
unsafe impl Send for TeamState {}

impl TeamState {
    /// Claims and computes units until none are left.
    fn work(&self, thread: usize, work: Work) {
        // SAFETY: the caller of `Team::run` keeps the function alive until no thread is inside.
        let unit = unsafe { &*work.unit };
        loop {
            let claimed = self.next.fetch_add(1, Ordering::Relaxed);
            if claimed >= work.units {
                return;
            }
            unit(thread, claimed);
        }
    }

    /// Enters the section if it is open and its number is not `seen`. Returns its number.
    fn enter(&self, seen: u64) -> Option<u64> {
        let state = self.state.load(Ordering::Acquire);
        if state & OPEN == 0 || state / SECTION == seen {
            return None;
        }
        self.state
            .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
            .ok()
            .map(|state| state / SECTION)
    }

    fn thread(&self, thread: usize) {
        let mut seen = 0;
        let mut since = Instant::now();
        while !self.ending.load(Ordering::Acquire) {
            if let Some(section) = self.enter(seen) {
                // SAFETY: this thread is inside.
                let work = unsafe { *self.work.get() };
                let run = || work.into_iter().for_each(|work| self.work(thread, work));
                if catch_unwind(AssertUnwindSafe(run)).is_err() {
                    self.panicked.store(true, Ordering::Release);
                }
                self.state.fetch_sub(1, Ordering::AcqRel);
                seen = section;
                since = Instant::now();
            } else if since.elapsed() < SPIN_TIME {
                for _ in 0..32 {
                    std::hint::spin_loop();
                }
            } else {
                let asleep = &self.asleep[thread - 1];
                asleep.store(true, Ordering::SeqCst);
                // A section that opened just before the store above may not have woken this thread, so look again before
                // sleeping.
                let state = self.state.load(Ordering::SeqCst);
                if state & OPEN == 0 && !self.ending.load(Ordering::SeqCst) {
                    thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
                since = Instant::now();
            }
        }
    }
}

/// A fixed number of threads, including the caller, that compute together.
pub struct Team {
    shared: Arc<TeamState>,
    threads: Vec<(Thread, JoinHandle<()>)>,
}

impl Team {
    /// Starts a team of `threads`, including the caller.
    ///
    /// # Errors
    ///
    /// Fails if the system refuses a thread.
    pub fn new(threads: usize) -> io::Result<Self> {
        let others = threads.saturating_sub(1);
        let shared = Arc::new(TeamState {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            asleep: (0..others).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut team = Self {
            shared,
            threads: Vec::with_capacity(others),
        };
        for thread in 1..=others {
            let shared = Arc::clone(&team.shared);
            let handle = thread::Builder::new()
                .name(format!("compute-{thread}"))
                .spawn(move || shared.thread(thread))?;
            team.threads.push((handle.thread().clone(), handle));
        }
        Ok(team)
    }

    /// Returns the number of threads, including the caller.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Computes units 0 to `units` − 1, each once, on any thread. Calls `unit` with the number of the thread, below
    /// [`threads`](Self::threads), and the number of the unit.
    ///
    /// # Panics
    ///
    /// Panics if a unit panics.
    pub fn run(&mut self, units: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
        let shared = &*self.shared;
        if units <= 1 || self.threads.is_empty() {
            (0..units).for_each(|claimed| unit(0, claimed));
            return;
        }
        // SAFETY: only the lifetime changes. No thread is inside when this function returns or unwinds.
        let unit: *const (dyn Fn(usize, usize) + Sync + 'static) =
            unsafe { std::mem::transmute(std::ptr::from_ref(unit)) };
        let work = Work { units, unit };
        // SAFETY: the section is closed and no thread is inside: the previous call waited for that, and `&mut self` excludes a
        // concurrent call.
        unsafe { *shared.work.get() = Some(work) };
        shared.next.store(0, Ordering::Relaxed);
        let before = shared.state.load(Ordering::Relaxed);
        // This store and the loads of `asleep` below are sequentially consistent, as are the store of `asleep` and the load of
        // `state` in a thread that is about to sleep. So either this thread sees the sleeper, or the sleeper sees the section.
        shared
            .state
            .store(before.wrapping_add(SECTION) | OPEN, Ordering::SeqCst);
        for (asleep, (thread, _)) in shared.asleep.iter().zip(&self.threads) {
            if asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.work(0, work)));
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut waited = 0u32;
        while shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            waited += 1;
            if waited.is_multiple_of(1 << 12) {
                // Another thread has a unit, but perhaps no processor.
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        assert!(
            !shared.panicked.swap(false, Ordering::AcqRel),
            "a compute thread panicked"
        );
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        for (thread, handle) in self.threads.drain(..) {
            thread.unpark();
            // A panic was already reported when it happened.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn every_unit_is_computed_once() {
        for threads in [1, 2, 3, 8] {
            let mut team = Team::new(threads).unwrap();
            for units in [0, 1, 2, 3, 7, 100, 1_000] {
                for _ in 0..200 {
                    let counts: Vec<_> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                    team.run(units, &|thread, unit| {
                        assert!(thread < threads);
                        counts[unit].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        counts
                            .iter()
                            .all(|count| count.load(Ordering::Relaxed) == 1)
                    );
                }
            }
        }
    }

    #[test]
    fn sleeping_threads_are_woken() {
        let mut team = Team::new(3).unwrap();
        for _ in 0..20 {
            thread::sleep(3 * SPIN_TIME);
            let seen: Vec<_> = (0..3).map(|_| AtomicUsize::new(0)).collect();
            let all = Barrier::new(3);
            team.run(3, &|thread, _| {
                seen[thread].fetch_add(1, Ordering::Relaxed);
                // No thread can claim a second unit before the others have woken up and claimed theirs.
                all.wait();
            });
            assert!(seen.iter().all(|seen| seen.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_continues() {
        let mut team = Team::new(2).unwrap();
        for bad in [0, 50] {
            let run = AssertUnwindSafe(|| {
                team.run(100, &|_, unit| assert!(unit != bad, "unit {unit}"));
            });
            assert!(catch_unwind(run).is_err());
        }
        let count = AtomicUsize::new(0);
        team.run(100, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 100);
    }
}
