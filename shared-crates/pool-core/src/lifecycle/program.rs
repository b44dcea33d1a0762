//! Which program serves a backend, and where it is.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

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
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.to_path_buf()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = first
        .map(Path::to_path_buf)
        .into_iter()
        .chain(beside)
        .chain(std::env::split_paths(&path));
    find_in(program_name(backend), folders)
}

fn find_in(name: &str, folders: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let runnable = |path: &PathBuf| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    // A relative or empty step of the PATH would mean whatever folder the program happens to stand in.
    folders
        .into_iter()
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(runnable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test] // [POOLD-011]
    fn the_first_folder_with_a_program_that_can_run_wins() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
        for folder in [&first, &second] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("tool"), "#!/bin/sh\n").unwrap();
        }
        let allow = |folder: &Path| {
            fs::set_permissions(folder.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
        };
        let found = || find_in("tool", [PathBuf::from("."), first.clone(), second.clone()]);
        assert_eq!(found(), None);
        allow(&second);
        assert_eq!(found(), Some(second.join("tool")));
        allow(&first);
        assert_eq!(found(), Some(first.join("tool")));
    }
}
