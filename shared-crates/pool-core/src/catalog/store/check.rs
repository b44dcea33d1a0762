//! Verification of a model file: size, hash and header.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Against, CheckError, Progress};
use crate::catalog::gguf::GgufFile;
use crate::catalog::support;
use crate::kit::hex::hex;

/// Checks the size, the hash and the header of the file at `path`. Returns its SHA-256.
pub(super) fn check(
    path: &Path,
    size: Option<u64>,
    hash: Option<(&str, Against)>,
    progress: Progress,
) -> Result<String, CheckError> {
    let found = fs::metadata(path)
        .map_err(CheckError::io("inspect", path))?
        .len();
    if let Some(expected) = size.filter(|expected| *expected != found) {
        return Err(CheckError::Size { expected, found });
    }
    let sha256 = hash_file(path, progress)?;
    if let Some((expected, against)) = hash.filter(|(expected, _)| *expected != sha256) {
        return Err(CheckError::Hash {
            expected: expected.to_owned(),
            found: sha256,
            against,
        });
    }
    GgufFile::open(path).map_err(CheckError::Header)?;
    Ok(sha256)
}

/// Fails unless a worker of this version can run the file at `path`, judging by its header.
pub(super) fn check_support(path: &Path) -> Result<(), CheckError> {
    let header = GgufFile::open(path).map_err(CheckError::Header)?;
    support::check_file(path, &header).map_err(CheckError::Unsupported)
}

fn hash_file(path: &Path, progress: Progress) -> Result<String, CheckError> {
    let mut file = File::open(path).map_err(CheckError::io("open", path))?;
    let mut buffer = vec![0; 1 << 20];
    let mut hasher = Sha256::new();
    let mut done = 0;
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CheckError::io("read", path)(error)),
        };
        hasher.update(&buffer[..count]);
        done += count as u64;
        if progress(done).is_break() {
            return Err(CheckError::Stopped);
        }
    }
    Ok(hex(&hasher.finalize()))
}
