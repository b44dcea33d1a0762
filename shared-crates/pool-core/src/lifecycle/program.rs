//! The worker program of each backend.

use std::path::{Path, PathBuf};

use crate::kit::programs;
use crate::worker::Backend;

/// Returns the name of the worker program for `backend`. A CUDA build does not even start without the driver's library, so it
/// is separate from the program for the CPU (and, on a Mac, Metal).
pub fn program_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Cpu | Backend::Metal => "llorch-candled",
        Backend::Cuda => "llorch-candled-cuda",
    }
}

/// Finds the worker program for `backend`: in `first`, next to the running program, or on the PATH.
pub fn find_program(backend: Backend, first: Option<&Path>) -> Option<PathBuf> {
    let name = program_name(backend);
    programs::find_in(name, first.map(Path::to_path_buf))
        .or_else(|| programs::find_beside_or_on_path(name))
}
