//! Which program serves a backend, and where it is.

use std::path::{Path, PathBuf};

use crate::programs;
use crate::worker::Backend;

/// The name of the worker program for `backend`. A CUDA build does not even start without the driver's library, so it
/// is a program of its own beside the one for the CPU (and, on a Mac, Metal).
pub fn program_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Cpu | Backend::Metal => "llorch-candled",
        Backend::Cuda => "llorch-candled-cuda",
    }
}

/// Finds the worker program for `backend`: in `first`, beside the running program, then on the PATH.
pub fn find_program(backend: Backend, first: Option<&Path>) -> Option<PathBuf> {
    let name = program_name(backend);
    programs::find_in(name, first.map(Path::to_path_buf))
        .or_else(|| programs::find_beside_or_on_path(name))
}
