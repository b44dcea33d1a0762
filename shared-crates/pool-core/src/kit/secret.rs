//! Tokens, which are kept out of logs, compared in constant time, and read only from private files.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::kit::hex::hex;

/// A token. Its `Debug` output shows only a fingerprint. It is serialised in the clear, so types that contain a token
/// belong only in 0600 files and authenticated requests.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

/// A token that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// A token file that can't be read.
    #[error("could not read the token file {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A token file that other users can access.
    #[error("the token file {} has mode {mode:04o}: users other than its owner can access it", path.display())]
    Exposed {
        /// Path of the file.
        path: PathBuf,
        /// Permission bits of the file.
        mode: u32,
    },
    /// A token that can't be sent in a header.
    #[error("the token from {origin} is empty or contains characters other than visible ASCII")]
    Malformed {
        /// The source of the token: the environment, or a file's path.
        origin: String,
    },
}

impl SecretError {
    /// Returns a remedy, if there is one.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Read { .. } => None,
            Self::Exposed { .. } => Some(
                "make it private with `chmod 600`, and change the token if others may have read it",
            ),
            Self::Malformed { .. } => Some("make a token with `openssl rand -hex 32`"),
        }
    }
}

/// Most bytes of a token: more than any sensible token has, fewer than a header may have.
const MAX_BYTES: u64 = 4096;

impl Secret {
    /// Returns a token with this text, unchecked.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns a new random token: 256 bits from the operating system, as 64 hexadecimal digits.
    pub fn random() -> Self {
        let mut bytes = [0u8; 32];
        // Without randomness from the system, no token would be secret, so there is no way to continue.
        getrandom::fill(&mut bytes).expect("the operating system provides random bytes");
        Self(hex(&bytes))
    }

    /// Loads a token from the value of an environment variable, otherwise from a file. An empty variable counts as unset;
    /// surrounding white space is dropped. `None` without either.
    pub fn load(
        env_value: Option<String>,
        file: Option<&Path>,
    ) -> Result<Option<Self>, SecretError> {
        if let Some(value) = env_value.filter(|value| !value.trim().is_empty()) {
            return Self::checked(&value, || "the environment".to_owned()).map(Some);
        }
        file.map(Self::from_file).transpose()
    }

    fn from_file(path: &Path) -> Result<Self, SecretError> {
        let read = |source| SecretError::Read {
            path: path.to_path_buf(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let mode = file.metadata().map_err(read)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(SecretError::Exposed {
                path: path.to_path_buf(),
                mode,
            });
        }
        let mut text = String::new();
        // One byte beyond the limit, so that `checked` detects a longer file.
        file.take(MAX_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(read)?;
        Self::checked(&text, || path.display().to_string())
    }

    fn checked(text: &str, origin: impl Fn() -> String) -> Result<Self, SecretError> {
        let text = text.trim();
        let sendable = !text.is_empty()
            && text.len() as u64 <= MAX_BYTES
            && text.bytes().all(|byte| byte.is_ascii_graphic());
        if sendable {
            Ok(Self(text.to_owned()))
        } else {
            Err(SecretError::Malformed { origin: origin() })
        }
    }

    /// Returns the token in the clear, for a header or a child's environment.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns whether `candidate` is this token. The time taken does not reveal how much of it is right.
    pub fn matches(&self, candidate: &str) -> bool {
        // Digests have a fixed length, so not even the token's length is revealed.
        Sha256::digest(&self.0)
            .as_slice()
            .ct_eq(Sha256::digest(candidate).as_slice())
            .into()
    }

    /// Returns the first 8 hexadecimal digits of the token's SHA-256, which may be logged.
    pub fn fingerprint(&self) -> String {
        hex(&Sha256::digest(&self.0)[..4])
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({}...)", self.fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test] // [POOLCORE-020]
    fn printing_shows_only_the_fingerprint() {
        let secret = Secret::new("correct horse");
        assert_eq!(
            format!("{secret:?}"),
            format!("Secret({}...)", secret.fingerprint())
        );
        assert_eq!(secret.fingerprint().len(), 8);
        assert!(secret.matches("correct horse"));
        assert!(!secret.matches("correct horsf") && !secret.matches(""));
    }

    #[test] // [POOLCORE-020]
    fn random_tokens_are_long_and_differ() {
        let (a, b) = (Secret::random(), Secret::random());
        assert_eq!(a.expose().len(), 64);
        assert!(!a.matches(b.expose()));
    }

    #[test] // [POOLCORE-021]
    fn a_token_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "s3cret\n").unwrap();
        for mode in [0o644, 0o640, 0o620, 0o604] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = Secret::load(None, Some(&path)).unwrap_err();
            assert!(
                matches!(error, SecretError::Exposed { mode: seen, .. } if seen == mode),
                "{error}"
            );
        }
        for mode in [0o600, 0o400] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(
                Secret::load(None, Some(&path)).unwrap().unwrap().expose(),
                "s3cret"
            );
        }
    }

    #[test] // [POOLCORE-021]
    fn the_variable_wins_over_the_file_and_must_fit_a_header() {
        let load = |value: &str| Secret::load(Some(value.to_owned()), None);
        assert_eq!(
            Secret::load(Some("abc".into()), Some(Path::new("/missing")))
                .unwrap()
                .unwrap()
                .expose(),
            "abc"
        );
        assert!(load("").unwrap().is_none());
        assert!(matches!(load("a b"), Err(SecretError::Malformed { .. })));
        assert!(matches!(load("é"), Err(SecretError::Malformed { .. })));
        assert!(matches!(
            Secret::load(None, Some(Path::new("/missing"))),
            Err(SecretError::Read { .. })
        ));
    }
}
