//! A small disk that is easily filled. The tests of `llorch-pool` use it as well.

use std::path::PathBuf;
use std::process::Command;

/// A small disk of its own, unmounted when dropped.
pub struct Disk(pub PathBuf);

impl Disk {
    /// Mounts a disk of `bytes` at `folder`. Fails without the right to mount, with the reason.
    pub fn new(folder: PathBuf, bytes: u64) -> Result<Self, String> {
        std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "llorch-test"])
            .arg(&folder)
            .output()
            .map_err(|error| error.to_string())?;
        if mounted.status.success() {
            Ok(Self(folder))
        } else {
            Err(String::from_utf8_lossy(&mounted.stderr).trim().to_owned())
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
