//! Identity of a host together with its pool's state folder.

use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::kit::files;
use crate::kit::hex::hex;
use crate::kit::secret::Secret;

/// File in the pool's state folder that holds the random half of the identity.
const FILE: &str = "host-id";
/// Files with the operating system's identity, which is stable across restarts and not part of a copied state folder.
const MACHINE_IDS: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];

/// Returns the identity of this host with the state folder `state`: 32 hexadecimal digits, the same at every call. The
/// first call writes the random half into the folder.
pub fn host_id(state: &Path) -> io::Result<String> {
    let machine = MACHINE_IDS
        .iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .unwrap_or_default();
    host_id_on(state, machine.trim())
}

fn host_id_on(state: &Path, machine: &str) -> io::Result<String> {
    let path = state.join(FILE);
    let own = match fs::read_to_string(&path) {
        Ok(own) if !own.trim().is_empty() => own.trim().to_owned(),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {
            let own = Secret::random().expose().to_owned();
            files::write_atomic(&path, &own, 0o600)?;
            own
        }
    };
    // The machine id is confidential, so only a hash leaves the host.
    let mut hash = Sha256::new();
    for part in ["llorch-pool-host", machine, &own] {
        hash.update(part);
        hash.update([0]);
    }
    Ok(hex(&hash.finalize()[..16]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-161]
    fn a_host_keeps_its_identity_and_a_copied_folder_on_another_host_has_another() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = host_id_on(here.path(), "machine-1").unwrap();
        assert_eq!(id.len(), 32);
        assert_eq!(host_id_on(here.path(), "machine-1").unwrap(), id);
        assert_ne!(host_id_on(there.path(), "machine-1").unwrap(), id);
        fs::copy(here.path().join(FILE), there.path().join(FILE)).unwrap();
        assert_ne!(host_id_on(there.path(), "machine-2").unwrap(), id);
    }
}
