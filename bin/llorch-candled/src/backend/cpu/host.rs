//! The number of compute threads for this host.

use pool_core::kit::service::threads::processors;

/// Returns the default number of compute threads: one less than the host's processors, and at least one.
///
/// The last processor is for the system and other programs. With one of two processors busy, two threads compute a prompt at
/// 0.7 of the speed of one: a thread that loses its processor in the middle of a unit delays the others.
pub fn default_threads() -> u32 {
    u32::try_from(processors())
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .max(1)
}
