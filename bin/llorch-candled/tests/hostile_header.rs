//! The memory that a hostile header can make the reader allocate. A separate test binary, because it counts all allocations.

#[allow(dead_code)]
#[path = "support/tiny_model.rs"]
mod tiny_model;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use pool_core::catalog::gguf::GgufFile;

/// The system's allocator, with a record of each thread's largest request.
struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is forwarded to the system's allocator unchanged.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// [GGUF-009]
#[test]
fn no_length_in_a_header_makes_the_reader_take_more_than_the_file_has() {
    let whole = tiny_model::TinyModel::default().bytes();
    let header = whole
        .windows(8)
        .position(|w| w == b"token_em")
        .expect("the first tensor's name");
    for at in 0..header {
        for nasty in [1u64 << 31, 1 << 33, 1 << 40, u64::MAX] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&nasty.to_le_bytes());
            LARGEST.set(0);
            let _ = GgufFile::read(&bytes[..], bytes.len() as u64);
            assert!(
                LARGEST.get() <= 2 * bytes.len(),
                "{nasty} at byte {at}: {} bytes at once",
                LARGEST.get()
            );
        }
    }
}
