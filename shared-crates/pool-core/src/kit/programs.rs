//! Search for programs.

use std::path::PathBuf;

use rustix::fs::{Access, access};

/// Returns the path of the executable `name` in the first of `folders` that has it. Skips relative and empty folders: in a
/// PATH, they would depend on the current directory.
pub fn find_in(name: &str, folders: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let runnable = |path: &PathBuf| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    folders
        .into_iter()
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(runnable)
}

/// Returns the path of the program `name` on the PATH.
pub fn find_on_path(name: &str) -> Option<PathBuf> {
    find_in(name, path_folders())
}

/// Returns the path of the program `name`, in the folder of the running program or else on the PATH.
pub fn find_beside_or_on_path(name: &str) -> Option<PathBuf> {
    find_in(
        name,
        folder_of_this_program().into_iter().chain(path_folders()),
    )
}

fn folder_of_this_program() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_path_buf())
}

fn path_folders() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

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

    #[test]
    fn a_relative_folder_is_passed_over() {
        // `cargo` runs tests in the crate's folder, which contains this file.
        assert!(Path::new("src/kit/programs.rs").exists());
        assert_eq!(find_in("programs.rs", [PathBuf::from("src/kit")]), None);
        assert_eq!(find_in("kit", [PathBuf::from("src")]), None);
    }
}
