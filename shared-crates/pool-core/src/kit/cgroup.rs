//! Memory cgroup of a process: limit, usage and number of OOM kills.
//!
//! Supports both versions of cgroups, including hosts that mount version 2 next to the memory controller of version 1.
//! On systems without cgroups, and for processes in no cgroup, the functions return `None`.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Values of a version 1 limit from here on mean "no limit": the kernel reports its absence as the largest whole number of
/// pages, in bytes.
const V1_UNLIMITED: u64 = 1 << 62;

/// Version of cgroups, which determines the files to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// The memory cgroup of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryCgroup {
    version: Version,
    /// Mount point of the hierarchy. The limits of all folders from here to `path` apply.
    root: PathBuf,
    path: PathBuf,
}

/// Number of OOM kills in a cgroup at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OomMark {
    /// The cgroup's folder.
    pub path: PathBuf,
    /// Value of the kernel's counter of OOM kills.
    pub kills: u64,
}

impl MemoryCgroup {
    /// Returns the current memory cgroup of the process with this pid.
    pub fn of(pid: u32) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        find(&mounts, &groups)
    }

    /// Returns the memory cgroup of this process.
    pub fn current() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Returns the cgroup's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the limit in bytes for all processes of the cgroup together: the lowest limit up to the root. `None` without a
    /// limit.
    pub fn limit_bytes(&self) -> Option<u64> {
        self.limits().map(|(_, limit)| limit).min()
    }

    /// Returns the bytes that the processes may still allocate: the least that any limit up to the root leaves, because other
    /// cgroups share the limits above. `None` without a limit.
    pub fn left_bytes(&self) -> Option<u64> {
        let left = |(folder, limit): (&Path, u64)| {
            limit.saturating_sub(self.usage_of(folder).unwrap_or(0))
        };
        self.limits().map(left).min()
    }

    /// Returns the folders with a limit, from the cgroup's own upwards, each with the limit in bytes.
    fn limits(&self) -> impl Iterator<Item = (&Path, u64)> {
        // Above `memory.high`, the kernel throttles all processes without killing any, so a worker must fit below it.
        let files: &[&str] = match self.version {
            Version::V1 => &["memory.limit_in_bytes"],
            Version::V2 => &["memory.max", "memory.high"],
        };
        let inside = |folder: &&Path| folder.starts_with(&self.root);
        let folders = self.path.ancestors().take_while(inside);
        folders
            .filter_map(move |folder| {
                let limits = files
                    .iter()
                    .filter_map(|file| number_in(&folder.join(file)));
                Some((folder, limits.min()?))
            })
            .filter(|(_, limit)| *limit < V1_UNLIMITED)
    }

    /// Returns the bytes used by the processes in a folder and below, without the clean page cache.
    ///
    /// The kernel drops clean file pages, on the active list as well as on the inactive one, before it kills for lack of
    /// memory. The file lists contain no shmem (tmpfs), no locked pages and no kernel memory. Mapped pages count as cache; to
    /// match, [`crate::lifecycle::Held`] counts only anonymous memory.
    fn usage_of(&self, folder: &Path) -> Option<u64> {
        let (usage, cached, unwritten) = match self.version {
            Version::V1 => (
                "memory.usage_in_bytes",
                ["total_inactive_file", "total_active_file"],
                ["total_dirty", "total_writeback"],
            ),
            Version::V2 => (
                "memory.current",
                ["inactive_file", "active_file"],
                ["file_dirty", "file_writeback"],
            ),
        };
        let used = number_in(&folder.join(usage))?;
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let sum = |names: [&str; 2]| {
            let fields = names.map(|name| field_of(&stat, name).unwrap_or(0));
            fields.into_iter().fold(0, u64::saturating_add)
        };
        let clean = sum(cached).saturating_sub(sum(unwritten));
        Some(used.saturating_sub(clean))
    }

    /// Returns the number of OOM kills in the cgroup; without its subgroups if the kernel counts those separately.
    pub fn oom_kills(&self) -> Option<u64> {
        kills_in(&self.path)
    }

    /// Returns the current count of [`MemoryCgroup::oom_kills`], for a later comparison.
    pub fn oom_mark(&self) -> Option<OomMark> {
        Some(OomMark {
            path: self.path.clone(),
            kills: self.oom_kills()?,
        })
    }
}

impl OomMark {
    /// Returns the mark of the process with this pid; `None` if it is in no memory cgroup that counts OOM kills.
    pub fn of(pid: u32) -> Option<Self> {
        MemoryCgroup::of(pid)?.oom_mark()
    }

    /// Returns whether there were OOM kills in the cgroup since the mark; `false` if the counter is no longer readable.
    pub fn has_risen(&self) -> bool {
        kills_in(&self.path).is_some_and(|now| now > self.kills)
    }
}

/// Returns the limit in bytes on the main memory of this process and its workers, set by its cgroup; `None` without a limit.
pub fn memory_limit() -> Option<u64> {
    MemoryCgroup::current()?.limit_bytes()
}

/// Returns the bytes of main memory that this process's cgroup still leaves to it and its workers; `None` without a limit.
pub fn memory_left() -> Option<u64> {
    MemoryCgroup::current()?.left_bytes()
}

/// Returns the memory cgroup of a process, from its cgroups (`/proc/PID/cgroup`) and the mounts (`/proc/self/mountinfo`).
fn find(mounts: &str, groups: &str) -> Option<MemoryCgroup> {
    let group = |wanted: &dyn Fn(&str) -> bool| {
        groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            wanted(controllers).then_some(path)
        })
    };
    let memory = |list: &str| list.split(',').any(|name| name == "memory");
    // A controller belongs to one version only, so prefer version 1 if it has the memory controller.
    let (version, path) = match group(&memory) {
        Some(path) => (Version::V1, path),
        None => (Version::V2, group(&str::is_empty)?),
    };
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ');
        let (mounted_part, mount_point) = (fields.nth(3)?, fields.next()?);
        let mut fields = after.split(' ');
        let (kind, options) = (fields.next()?, fields.nth(1)?);
        let fits = match version {
            Version::V1 => kind == "cgroup" && memory(options),
            Version::V2 => kind == "cgroup2",
        };
        if !fits {
            return None;
        }
        let root = PathBuf::from(unescape(mount_point));
        // A container may see only its own part of the hierarchy, mounted under the name that the part has outside.
        let inside = Path::new(path)
            .strip_prefix(unescape(mounted_part))
            .or_else(|_| Path::new(path).strip_prefix("/"))
            .ok()?;
        if inside.components().any(|step| step == Component::ParentDir) {
            return None;
        }
        Some(MemoryCgroup {
            version,
            path: root.join(inside),
            root,
        })
    })
}

/// Decodes the octal escapes that mountinfo uses for white space and backslashes in paths.
fn unescape(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(path.to_owned(), |path, (code, text)| {
        path.replace(code, text)
    })
}

/// Returns the number of OOM kills of the cgroup in this folder: version 1's counter, otherwise version 2's.
fn kills_in(folder: &Path) -> Option<u64> {
    ["memory.oom_control", "memory.events.local", "memory.events"]
        .iter()
        .find_map(|file| field_in(&folder.join(file), "oom_kill"))
}

fn number_in(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Returns the number after `name` in a file of lines `name number`.
fn field_in(path: &Path, name: &str) -> Option<u64> {
    field_of(&fs::read_to_string(path).ok()?, name)
}

fn field_of(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(key, value)| (key == name).then(|| value.trim().parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "11 32 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
        14 35 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        20 41 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    fn path_of(mounts: &str, groups: &str) -> Option<(Version, String)> {
        find(mounts, groups).map(|found| (found.version, found.path.display().to_string()))
    }

    #[test] // [POOLCORE-130]
    fn the_memory_cgroup_is_found_in_either_version_and_in_containers() {
        let found = |version, path: &str| Some((version, path.to_owned()));
        assert_eq!(
            path_of(V1, "8:pids:/\n4:memory:/a/b\n0::/c\n"),
            found(Version::V1, "/sys/fs/cgroup/memory/a/b")
        );
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            path_of(v2, "0::/system.slice/with:colon\n"),
            found(Version::V2, "/sys/fs/cgroup/system.slice/with:colon")
        );
        let container =
            "14 35 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        assert_eq!(
            path_of(container, "4:memory:/docker/1f/mine\n"),
            found(Version::V1, "/sys/fs/cgroup/memory/mine")
        );
        assert_eq!(
            path_of(v2, "0::/../other\n"),
            None,
            "outside the visible hierarchy"
        );
        assert_eq!(path_of("", "0::/\n"), None);
        assert_eq!(path_of(v2, ""), None);
    }

    #[test] // [POOLCORE-130]
    fn limit_usage_and_kills_are_read_with_the_folders_above() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let cgroup = |version| MemoryCgroup {
            version,
            root: dir.path().to_path_buf(),
            path: inner.clone(),
        };
        let v2 = cgroup(Version::V2);
        assert_eq!(
            (v2.limit_bytes(), v2.left_bytes(), v2.oom_mark()),
            (None, None, None)
        );
        write("outer/memory.max", "1000\n");
        write("outer/inner/memory.max", "max\n");
        write("outer/inner/memory.current", "700\n");
        write("outer/inner/memory.stat", "anon 1\ninactive_file 200\n");
        write("outer/inner/memory.events", "oom 9\noom_kill 4\n");
        assert_eq!(
            (v2.limit_bytes(), v2.left_bytes(), v2.oom_kills()),
            (Some(1000), Some(1000), Some(4)),
            "without the usage of the group that sets it, the whole limit counts as free"
        );
        write("outer/memory.current", "950\n");
        write("outer/memory.stat", "inactive_file 50\n");
        assert_eq!(v2.left_bytes(), Some(100), "the neighbours use 400");
        write("outer/inner/memory.max", "560\n");
        assert_eq!((v2.limit_bytes(), v2.left_bytes()), (Some(560), Some(60)));
        let mark = v2.oom_mark().unwrap();
        assert!(!mark.has_risen());
        write("outer/inner/memory.events", "oom 9\noom_kill 5\n");
        assert!(mark.has_risen());
        // The counter of the cgroup alone takes precedence over the one that includes subgroups.
        write("outer/inner/memory.events.local", "oom_kill 1\n");
        assert_eq!(v2.oom_kills(), Some(1));
        fs::remove_dir_all(&inner).unwrap();
        assert!(
            !mark.has_risen(),
            "an unreadable counter is not evidence of a kill"
        );

        fs::create_dir_all(&inner).unwrap();
        let v1 = cgroup(Version::V1);
        write("outer/inner/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(v1.limit_bytes(), None);
        write("outer/memory.limit_in_bytes", "4096\n");
        write(
            "outer/inner/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        );
        assert_eq!((v1.limit_bytes(), v1.oom_kills()), (Some(4096), Some(3)));
    }

    #[test] // [POOLCORE-131]
    fn clean_page_cache_is_free_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let left = |version, files: &[(&str, &str)]| {
            for (name, text) in files {
                fs::write(dir.path().join(name), text).unwrap();
            }
            let (root, path) = (dir.path().to_path_buf(), dir.path().to_path_buf());
            let cgroup = MemoryCgroup {
                version,
                root,
                path,
            };
            cgroup.left_bytes()
        };
        // 300 active and 100 inactive bytes of files, of which 30 are dirty and 20 under writeback. `memory.current`
        // includes shmem, locked pages and kernel memory; `file` includes shmem and the locked pages of files.
        let stat = "anon 200\nfile 550\nkernel 80\nslab_reclaimable 60\nshmem 100\nfile_mapped 90\n\
            file_dirty 30\nfile_writeback 20\ninactive_anon 100\nactive_anon 200\ninactive_file 100\n\
            active_file 300\nunevictable 50\n";
        let v2 = [
            ("memory.max", "1000\n"),
            ("memory.current", "830\n"),
            ("memory.stat", stat),
        ];
        assert_eq!(left(Version::V2, &v2), Some(1000 - (830 - 350)));
        assert_eq!(
            left(Version::V2, &[("memory.high", "900\n")]),
            Some(900 - (830 - 350)),
            "above `memory.high` the kernel throttles every process"
        );
        let stat = "cache 1\ninactive_file 1\nactive_file 1\ndirty 1\ntotal_cache 550\ntotal_rss 200\n\
            total_shmem 100\ntotal_mapped_file 90\ntotal_dirty 30\ntotal_writeback 20\n\
            total_inactive_file 100\ntotal_active_file 300\ntotal_unevictable 50\n";
        let v1 = [
            ("memory.limit_in_bytes", "1000\n"),
            ("memory.usage_in_bytes", "830\n"),
            ("memory.stat", stat),
        ];
        assert_eq!(left(Version::V1, &v1), Some(1000 - (830 - 350)));
        // A dirty count above the sum of the lists (the kernel updates them at different times) frees nothing.
        let ahead = "total_dirty 900\ntotal_inactive_file 100\n";
        assert_eq!(left(Version::V1, &[("memory.stat", ahead)]), Some(170));
    }
}
