//! The parser of model references, used by every binary.
//!
//! ```text
//! alias                                  a catalogue id: [a-z0-9][a-z0-9._-]{0,63}
//! hf:ORG/REPO[@REVISION][::file=PATH]    a file on the hub
//! file:/absolute/path.gguf               a file on the pool host
//! ```

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::catalog::Catalog;

/// Maximum length of a model reference in bytes.
pub const MAX_BYTES: usize = 512;

/// A validated model reference. Its text form is used by users and on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModelRef {
    /// The id of a catalogue entry.
    Alias(String),
    /// A file in a repository of the hub.
    Hub {
        /// `ORG/REPO`.
        repo: String,
        /// Branch, tag or commit; `None` for the hub's default.
        revision: Option<String>,
        /// Path of the file inside the repository; `None` for the only GGUF file.
        file: Option<String>,
    },
    /// An absolute path on the pool host.
    File(PathBuf),
}

/// The reason a text is not a model reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{shown}` is not a model reference: {reason}{near}")]
pub struct ModelRefError {
    shown: String,
    reason: &'static str,
    /// Suggested catalogue ids, as the end of a sentence; empty if none is similar.
    near: String,
}

impl ModelRefError {
    /// Returns what to write instead.
    pub fn hint(&self) -> &'static str {
        "write a catalogue id such as `smollm2-135m`, `hf:ORG/REPO[@REVISION][::file=PATH]`, or `file:/absolute/path.gguf`"
    }
}

impl ModelRef {
    /// Returns the catalogue id of an alias, or `None` for other references.
    pub fn alias(&self) -> Option<&str> {
        match self {
            Self::Alias(id) => Some(id),
            _ => None,
        }
    }

    /// Returns whether `asked`, a reference to the hub that may omit revision and file, may refer to this file of the hub.
    pub fn is_meant_by(&self, asked: &Self) -> bool {
        match (self, asked) {
            (
                Self::Hub {
                    repo,
                    revision,
                    file,
                },
                Self::Hub {
                    repo: asked,
                    revision: asked_revision,
                    file: asked_file,
                },
            ) => {
                repo == asked
                    && (asked_revision.is_none() || asked_revision == revision)
                    && (asked_file.is_none() || asked_file == file)
            }
            _ => false,
        }
    }
}

/// Returns whether `text` has the form of a catalogue id: `[a-z0-9][a-z0-9._-]{0,63}`, without `..`.
pub fn is_alias(text: &str) -> bool {
    let bytes = text.as_bytes();
    let first_ok = bytes
        .first()
        .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest_ok = bytes
        .iter()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'));
    first_ok && rest_ok && bytes.len() <= 64 && !text.contains("..")
}

/// Rejects parts that a program could mistake for an option, a parent folder or a terminal command.
fn check_part(part: &str, allowed_extra: &str) -> Result<(), &'static str> {
    if part.is_empty() {
        return Err("a part of it is empty");
    }
    if part.starts_with('-') {
        return Err("a part of it begins with `-`");
    }
    if part.split('/').any(|step| step == ".." || step == ".") {
        return Err("it contains `..` or `.` as a path step");
    }
    let ok = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') || allowed_extra.contains(c)
    };
    if !part.chars().all(ok) {
        return Err("it contains a character not allowed in hub names");
    }
    Ok(())
}

fn parse_hub(rest: &str) -> Result<ModelRef, &'static str> {
    let (place, file) = match rest.split_once("::file=") {
        Some((place, file)) => (place, Some(file)),
        None if rest.contains("::") => return Err("the only option after `::` is `file=`"),
        None => (rest, None),
    };
    let (repo, revision) = match place.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (place, None),
    };
    let (org, name) = repo
        .split_once('/')
        .ok_or("a hub reference needs `ORG/REPO`")?;
    check_part(org, "")?;
    check_part(name, "")?;
    if let Some(revision) = revision {
        check_part(revision, "/")?;
    }
    if let Some(file) = file {
        check_part(file, "/ +")?;
        if file
            .split('/')
            .any(|step| step.is_empty() || step.starts_with('-'))
        {
            return Err("a path step of the file is empty or begins with `-`");
        }
    }
    Ok(ModelRef::Hub {
        repo: repo.to_owned(),
        revision: revision.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}

fn parse_file(rest: &str) -> Result<ModelRef, &'static str> {
    let path = Path::new(rest);
    if !path.is_absolute() {
        return Err("a `file:` path must be absolute");
    }
    if path.components().any(|c| matches!(c, Component::ParentDir)) {
        return Err("it contains `..` as a path step");
    }
    if rest.split('/').any(|step| step.starts_with('-')) {
        return Err("a path step begins with `-`");
    }
    Ok(ModelRef::File(path.to_owned()))
}

/// Returns why a text without `hf:` and `file:` is not a catalogue id.
fn why_no_alias(text: &str) -> &'static str {
    if is_alias(&text.to_ascii_lowercase()) {
        "catalogue ids are lower case"
    } else if text.contains("://") {
        "it is a URL; write a hub repository as `hf:ORG/REPO`"
    } else if text.starts_with(['/', '.', '~']) {
        "write a file as `file:/absolute/path.gguf`"
    } else if text.starts_with('-') {
        "a catalogue id begins with a letter or a digit"
    } else if text.contains("..") {
        "a catalogue id can't contain `..`"
    } else if text.contains('/') {
        "a catalogue id can't contain `/`; write a hub repository as `hf:ORG/REPO`"
    } else if text.contains(':') {
        "a catalogue id can't contain `:` or a tag"
    } else if text.len() > 64 {
        "a catalogue id has at most 64 characters"
    } else {
        "a catalogue id contains only letters, digits, `.`, `_` and `-`, and begins with a letter or a digit"
    }
}

/// Returns similar ids of the embedded catalogue, as the end of the sentence that rejects the name.
fn known_instead(text: &str) -> String {
    let catalog = Catalog::embedded();
    let quoted = |ids: Vec<&str>| {
        let ids: Vec<_> = ids.into_iter().map(|id| format!("`{id}`")).collect();
        ids.join(", ")
    };
    match catalog.nearest_ids(text) {
        near if near.is_empty() => {
            let all = catalog.iter().map(|entry| entry.id.as_str()).collect();
            format!(". The catalogue has {}", quoted(all))
        }
        near => format!(". The nearest in the catalogue: {}", quoted(near)),
    }
}

impl FromStr for ModelRef {
    type Err = ModelRefError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| ModelRefError {
            shown: text.chars().take(80).flat_map(char::escape_debug).collect(),
            reason,
            near: String::new(),
        };
        if text.is_empty() {
            return Err(refuse("it is empty"));
        }
        if text.len() > MAX_BYTES {
            return Err(refuse("it is longer than 512 bytes"));
        }
        if text.chars().any(|c| c.is_control() || is_invisible(c)) {
            return Err(refuse("it contains a control character"));
        }
        let parsed = if let Some(rest) = text.strip_prefix("hf:") {
            parse_hub(rest)
        } else if let Some(rest) = text.strip_prefix("file:") {
            parse_file(rest)
        } else if is_alias(text) {
            Ok(Self::Alias(text.to_owned()))
        } else {
            return Err(ModelRefError {
                near: known_instead(text),
                ..refuse(why_no_alias(text))
            });
        };
        parsed.map_err(refuse)
    }
}

/// Returns whether `c` changes the display of the text around it: bidirectional marks and overrides, zero-width joiners.
pub fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alias(id) => f.write_str(id),
            Self::Hub {
                repo,
                revision,
                file,
            } => {
                write!(f, "hf:{repo}")?;
                if let Some(revision) = revision {
                    write!(f, "@{revision}")?;
                }
                if let Some(file) = file {
                    write!(f, "::file={file}")?;
                }
                Ok(())
            }
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl Serialize for ModelRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelRef, ModelRefError> {
        text.parse()
    }

    // [POOLCORE-001]
    #[test]
    fn every_form_survives_a_round_trip() {
        for text in [
            "smollm2-135m",
            "a",
            "hf:TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF",
            "hf:org/repo@main",
            "hf:org/repo@refs/pr/1::file=sub/model.gguf",
            "file:/srv/models/a.gguf",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    // [POOLCORE-003]
    #[test]
    fn names_as_other_programs_write_them_get_the_nearest_ids() {
        for (text, near) in [
            ("llama3.2:1b", "The nearest in the catalogue: `llama3`"),
            ("qwen2.5:0.5b", "The nearest in the catalogue: `qwen`"),
            ("phi3:mini", "The nearest in the catalogue: `phi3`"),
            (
                "smollm2:135m",
                "The nearest in the catalogue: `smollm2-135m`",
            ),
            ("mistral:7b-instruct", "`mistral`"),
            ("TinyLlama", "`tinyllama`"),
            (
                "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF",
                "as `hf:ORG/REPO`. The nearest in the catalogue: `tinyllama`",
            ),
            ("meta-llama/Llama-3.1-8B-Instruct", "`llama3`"),
            (
                "https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct-GGUF",
                "`qwen`",
            ),
            (
                "gemma:2b",
                "The catalogue has `smollm2-135m`, `tinyllama`, ",
            ),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(near), "{error}");
            assert!(!error.contains("[a-z0-9]"), "{error}");
        }
    }

    // [POOLCORE-002]
    #[test]
    fn hostile_names_are_refused_with_the_reason() {
        let long = "a".repeat(10_000);
        for (text, reason) in [
            ("", "empty"),
            ("SmolLM2-135M", "lower case"),
            ("-rf", "begins with a letter"),
            ("a..b", "can't contain `..`"),
            ("a/b", "write a hub repository as `hf:ORG/REPO`"),
            ("a\0b", "control"),
            ("a\u{202e}b", "control"),
            ("hf:org", "ORG/REPO"),
            ("hf:--x/repo", "begins with `-`"),
            ("hf:org/repo@--upload-pack=x", "begins with `-`"),
            ("hf:org/repo::file=../../etc/passwd", "`..`"),
            ("hf:org/repo::file=a/-b", "begins with `-`"),
            ("hf:org/repo::file=", "empty"),
            ("hf:org/repo::path=x", "`file=`"),
            ("hf:org/re po", "character"),
            ("file:relative.gguf", "absolute"),
            ("file:/a/../etc/passwd", "`..`"),
            (long.as_str(), "512 bytes"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.to_string().contains(reason), "{text:?}: {error}");
        }
    }
}
