//! Checks for any llama-orch host: settings, folders, disk, ports.

use std::error::Error;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::Finding;
use crate::kit::errors::with_causes;
use crate::kit::terminal::human_bytes;

/// Returns a path quoted as one word of a shell command.
pub fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Reports whether the settings in `file` are usable; `broken` is the error, with its hint, if they are not.
pub fn settings(file: &Path, broken: Option<(&dyn Error, Option<String>)>) -> Finding {
    let Some((error, hint)) = broken else {
        let message = match file.exists() {
            true => format!("usable ({})", file.display()),
            false => format!("using the defaults: {} does not exist", file.display()),
        };
        return Finding::ok("settings", message);
    };
    let edit = format!("edit {}", quoted(file));
    let fix = hint.map_or(edit.clone(), |hint| format!("{edit}: {hint}"));
    Finding::fail("settings", with_causes(error), fix)
}

/// Checks that a folder is writable for this user and closed to others. A missing folder is no problem.
pub fn private_folder(check: &'static str, path: &Path) -> Finding {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Finding::fail(
            check,
            format!("{shown} is not a folder"),
            format!("mv {0} {0}.old", quoted(path)),
        ),
        Ok(_) if tempfile::tempfile_in(path).is_err() => Finding::fail(
            check,
            format!("{shown} is not writable"),
            format!(
                "sudo chown -R \"$USER\" {0} && chmod u+rwx {0}",
                quoted(path)
            ),
        ),
        Ok(found) if found.permissions().mode() & 0o077 != 0 => {
            let mode = found.permissions().mode() & 0o777;
            Finding::warn(
                check,
                format!("{shown} is accessible to other users ({mode:04o})"),
                format!("chmod 700 {}", quoted(path)),
            )
        }
        Ok(_) => Finding::ok(check, shown.to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Finding::ok(check, format!("{shown} will be created when needed"))
        }
        Err(error) => Finding::fail(
            check,
            format!("{shown}: {error}"),
            "check its owner and mode, or set LLORCH_HOME",
        ),
    }
}

/// Checks that all files below `folder` belong to this user and are closed to others. Names the first offending file.
pub fn private_files(check: &'static str, folder: &Path) -> Finding {
    let ours = rustix::process::geteuid().as_raw();
    let mut todo = vec![folder.to_path_buf()];
    let mut open = None;
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else {
                continue;
            };
            if found.uid() != ours {
                return Finding::fail(
                    check,
                    format!("{} belongs to another user", entry.path().display()),
                    format!("sudo chown -R \"$USER\" {}", quoted(folder)),
                );
            }
            if found.is_dir() {
                todo.push(entry.path());
            } else if found.is_file() && found.mode() & 0o077 != 0 && open.is_none() {
                open = Some((entry.path(), found.mode() & 0o777));
            }
        }
    }
    match open {
        None => Finding::ok(
            check,
            format!("all files in {} are private", folder.display()),
        ),
        Some((file, mode)) => Finding::warn(
            check,
            format!(
                "{} is accessible to other users ({mode:04o})",
                file.display()
            ),
            format!("chmod -R go= {}", quoted(folder)),
        ),
    }
}

/// Limits on the free space of a disk.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Fewer free bytes are a warning.
    pub warn_bytes: u64,
    /// Fewer free bytes are a failure.
    pub fail_bytes: u64,
}

/// Checks the free space of the disk that holds `path`, or will hold it once created. `what` names the content.
pub fn disk(path: &Path, what: &str, room: Room, fix: &str) -> Finding {
    let Some(existing) = path.ancestors().find(|path| path.exists()) else {
        return Finding::warn(
            "disk",
            format!("no part of {} exists", path.display()),
            "set LLORCH_HOME to a folder that llama-orch may use",
        );
    };
    let free = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => {
            return Finding::warn(
                "disk",
                format!("{}: {error}", existing.display()),
                "check the disk",
            );
        }
    };
    let message = format!(
        "{} free for {what} at {}",
        human_bytes(free),
        existing.display()
    );
    if free < room.fail_bytes {
        Finding::fail("disk", message, fix)
    } else if free < room.warn_bytes {
        Finding::warn("disk", message, fix)
    } else {
        Finding::ok("disk", message)
    }
}

/// Fails with the reason if `address` can't be listened on. The reason names the present listener if the system reveals
/// it.
pub fn port_free(address: SocketAddr) -> Result<(), String> {
    match TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(match listener(address.port()) {
                Some(holder) => format!("{address} is taken by {holder}"),
                None => format!("{address} is taken by another program"),
            })
        }
        Err(error) => Err(format!("could not listen on {address}: {error}")),
    }
}

/// Returns the process that listens on a TCP port, as `NAME (pid N)`. Only Linux reveals it, and only for processes of
/// this user unless it is root.
fn listener(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let sockets: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| sockets_of(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if sockets.is_empty() {
        return None;
    }
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name();
        let Some(pid) = pid.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let files = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten();
        let holds = files.flatten().any(|file| {
            fs::read_link(file.path())
                .is_ok_and(|goal| sockets.iter().any(|socket| goal == Path::new(socket)))
        });
        if holds {
            let name = fs::read_to_string(process.path().join("comm")).ok()?;
            return Some(format!("{} (pid {pid})", name.trim()));
        }
    }
    None
}

/// Returns the inode numbers of the sockets that listen on `port`, from a table in `/proc/net`.
fn sockets_of(table: &str, port: u16) -> Vec<String> {
    const LISTENING: &str = "0A";
    let port = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let listens = columns.get(1)?.ends_with(&port) && *columns.get(3)? == LISTENING;
            listens.then(|| columns.get(9).map(|inode| (*inode).to_owned()))?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::terminal::doctor::CheckStatus;

    #[test] // [POOLCORE-151]
    fn a_folder_that_others_can_read_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mode =
            |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        mode(0o700);
        assert_eq!(private_folder("f", dir.path()).status, CheckStatus::Ok);
        let missing = dir.path().join("missing");
        assert_eq!(private_folder("f", &missing).status, CheckStatus::Ok);
        mode(0o755);
        let open = private_folder("f", dir.path());
        let fix = format!("chmod 700 {}", dir.path().display());
        assert_eq!((open.status, open.fix), (CheckStatus::Warn, Some(fix)));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(private_folder("f", &file).status, CheckStatus::Fail);
    }

    #[test] // [POOLCORE-151]
    fn a_file_that_others_can_read_is_found() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        let file = dir.path().join("in/it's");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(private_files("f", dir.path()).status, CheckStatus::Ok);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let found = private_files("f", dir.path());
        assert_eq!(found.status, CheckStatus::Warn);
        assert!(
            found
                .message
                .contains("it's is accessible to other users (0640)"),
            "{}",
            found.message
        );
        assert_eq!(
            found.fix,
            Some(format!("chmod -R go= {}", dir.path().display()))
        );
        assert_eq!(
            quoted(&file),
            format!("'{}/in/it'\\''s'", dir.path().display())
        );
    }

    #[test] // [POOLCORE-151]
    fn a_taken_port_is_found_with_its_holder() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let reason = port_free(address).unwrap_err();
        assert!(reason.contains("is taken by"), "{reason}");
        if cfg!(target_os = "linux") {
            assert!(
                reason.contains(&format!("(pid {})", std::process::id())),
                "{reason}"
            );
        }
        drop(taken);
        port_free("127.0.0.1:0".parse().unwrap()).unwrap();
    }

    #[test] // [POOLCORE-151]
    fn a_disk_is_judged_by_what_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let judged = |warn_bytes, fail_bytes| {
            let room = Room {
                warn_bytes,
                fail_bytes,
            };
            disk(&dir.path().join("not/yet"), "jobs", room, "make room").status
        };
        assert_eq!(judged(0, 0), CheckStatus::Ok);
        assert_eq!(judged(u64::MAX, 0), CheckStatus::Warn);
        assert_eq!(judged(u64::MAX, u64::MAX), CheckStatus::Fail);
    }
}
