//! The errors of reading a GGUF file.

use std::fmt;
use std::io;

/// The part of a file that an error refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Section {
    /// Magic, version and counts.
    Header,
    /// One metadata entry.
    Metadata {
        /// Position of the entry, from 0.
        index: u64,
        /// Key of the entry; empty until the key has been read.
        key: String,
    },
    /// One tensor's description.
    TensorInfo {
        /// Position of the tensor, from 0.
        index: u64,
        /// Name of the tensor; empty until the name has been read.
        name: String,
    },
    /// The data of the tensors.
    TensorData,
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => write!(f, "header"),
            Self::Metadata { index, key } if key.is_empty() => write!(f, "metadata entry {index}"),
            Self::Metadata { index, key } => write!(f, "metadata entry {index} (`{key}`)"),
            Self::TensorInfo { index, name } if name.is_empty() => write!(f, "tensor {index}"),
            Self::TensorInfo { index, name } => write!(f, "tensor {index} (`{name}`)"),
            Self::TensorData => write!(f, "tensor data"),
        }
    }
}

/// The reason a file is not a usable GGUF model.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file could not be opened or read.
    #[error("could not read the file")]
    Io(#[from] io::Error),
    /// The first four bytes are not the magic number.
    #[error("not a GGUF file: it begins with {found:02x?}, expected 47 47 55 46 (\"GGUF\")")]
    BadMagic {
        /// First bytes of the file, up to four.
        found: Vec<u8>,
    },
    /// The reader does not support this version.
    #[error("GGUF version {found} is not supported (2 and 3 are)")]
    UnsupportedVersion {
        /// Version number in the file.
        found: u32,
    },
    /// The file is in the opposite byte order.
    #[error("the file is big-endian GGUF, but only little-endian files are supported")]
    BigEndian,
    /// The file is shorter than its header requires.
    #[error("truncated: {section} says {needed} bytes are needed, the file has {actual}")]
    Truncated {
        /// Part of the file that requires the bytes.
        section: Section,
        /// Minimum size of a complete file, in bytes.
        needed: u64,
        /// Size of the file, in bytes.
        actual: u64,
    },
    /// A count or length exceeds the reader's limit, which is beyond any real model.
    #[error("{section} at byte {offset}: {what} is {found}, the limit is {limit}")]
    TooLarge {
        /// Part of the file.
        section: Section,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Name of the number.
        what: &'static str,
        /// Number in the file.
        found: u64,
        /// Largest accepted number.
        limit: u64,
    },
    /// The format does not allow a value.
    #[error("{section} at byte {offset}: {what}")]
    Invalid {
        /// Part of the file.
        section: Section,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Description of the problem.
        what: String,
    },
    /// Two tensors overlap.
    #[error(
        "tensors `{first}` and `{second}` overlap: one ends at byte {first_end}, the other begins at {second_start} of the tensor data"
    )]
    Overlap {
        /// Name of the tensor that starts first.
        first: String,
        /// Name of the tensor that starts within it.
        second: String,
        /// End of the first tensor, relative to the start of the tensor data.
        first_end: u64,
        /// Start of the second tensor, relative to the start of the tensor data.
        second_start: u64,
    },
    /// A required metadata key is missing.
    #[error("the metadata has no `{key}`")]
    MissingKey {
        /// Name of the missing key.
        key: String,
    },
    /// A metadata value has the wrong type or is out of range.
    #[error("metadata `{key}` is {found}, expected {expected}")]
    WrongValue {
        /// Key of the value.
        key: String,
        /// Description of the expected value.
        expected: String,
        /// Description of the value in the file.
        found: String,
    },
    /// A product of sizes overflows 64 bits.
    #[error("the size of {what} overflows 64 bits, so the header must be wrong")]
    SizeOverflow {
        /// Name of the computed size.
        what: &'static str,
    },
}

impl GgufError {
    /// Returns what to try next, if anything is known to help.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::BadMagic { .. } => {
                Some("only GGUF model files are supported; look for a `.gguf` variant of the model")
            }
            Self::Truncated { .. } => {
                Some("the download was probably interrupted: delete the file and download it again")
            }
            Self::UnsupportedVersion { .. } | Self::BigEndian => {
                Some("convert the model again with a current converter")
            }
            Self::Io(_) => None,
            _ => Some(
                "the file is damaged or was made by a faulty converter: download it again or use another file",
            ),
        }
    }
}
