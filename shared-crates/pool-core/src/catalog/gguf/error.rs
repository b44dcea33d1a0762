//! What can be wrong with a GGUF file.

use std::fmt;
use std::io;

/// Where in a file a problem was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Section {
    /// Magic, version and counts.
    Header,
    /// A metadata entry: its number, and its key once that has been read.
    Metadata {
        /// Counted from 0.
        index: u64,
        /// Empty while the key itself is being read.
        key: String,
    },
    /// A tensor's description: its number, and its name once that has been read.
    TensorInfo {
        /// Counted from 0.
        index: u64,
        /// Empty while the name itself is being read.
        name: String,
    },
    /// The tensors' bytes.
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

/// Why a file is not a usable GGUF model.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file could not be opened or read.
    #[error("could not read the file")]
    Io(#[from] io::Error),
    /// The first four bytes are something else.
    #[error(
        "not a GGUF file: it begins with {found:02x?}, a GGUF file with 47 47 55 46 (\"GGUF\")"
    )]
    BadMagic {
        /// The first bytes of the file.
        found: Vec<u8>,
    },
    /// A version this reader does not know.
    #[error("GGUF version {found} is not supported (2 and 3 are)")]
    UnsupportedVersion {
        /// The version the file names.
        found: u32,
    },
    /// The numbers are stored the other way round.
    #[error("the file is big-endian GGUF, only little-endian files are supported")]
    BigEndian,
    /// The file ends before what it announces.
    #[error("truncated: {section} says {needed} bytes are needed, the file has {actual}")]
    Truncated {
        /// What announced the bytes.
        section: Section,
        /// The size the file would need to have, at least.
        needed: u64,
        /// The size it has.
        actual: u64,
    },
    /// A count or length beyond what any real model has.
    #[error("{section} at byte {offset}: {what} is {found}, the limit is {limit}")]
    TooLarge {
        /// Where.
        section: Section,
        /// Offset in the file.
        offset: u64,
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest value accepted.
        limit: u64,
    },
    /// A value the format does not allow.
    #[error("{section} at byte {offset}: {what}")]
    Invalid {
        /// Where.
        section: Section,
        /// Offset in the file.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
    /// Two tensors claim the same bytes.
    #[error(
        "tensors `{first}` and `{second}` overlap: one ends at byte {first_end}, the other begins at {second_start} of the tensor data"
    )]
    Overlap {
        /// The tensor that begins first.
        first: String,
        /// The tensor that begins inside it.
        second: String,
        /// End of the first, counted from the start of the tensor data.
        first_end: u64,
        /// Start of the second.
        second_start: u64,
    },
    /// A metadata key that is needed is not there.
    #[error("the metadata has no `{key}`")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata value has another type or an impossible value.
    #[error("metadata `{key}` is {found}, expected {expected}")]
    WrongValue {
        /// The key.
        key: String,
        /// What a reader wants.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// A product of sizes does not fit 64 bits.
    #[error("the size of {what} overflows 64 bits, so the header must be wrong")]
    SizeOverflow {
        /// What was being computed.
        what: &'static str,
    },
}

impl GgufError {
    /// What to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::BadMagic { .. } => {
                Some("only GGUF model files are supported; look for a `.gguf` variant of the model")
            }
            Self::Truncated { .. } => {
                Some("the download was probably cut off: delete the file and fetch it again")
            }
            Self::UnsupportedVersion { .. } | Self::BigEndian => {
                Some("convert the model again with a current converter")
            }
            Self::Io(_) => None,
            _ => Some(
                "the file is damaged or was made by a faulty converter: fetch it again or take another one",
            ),
        }
    }
}
