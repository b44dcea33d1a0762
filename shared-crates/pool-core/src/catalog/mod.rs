//! Models: the catalogue, GGUF headers and the models folder.
//!
//! The catalogue combines the project's `catalog.toml`, which every binary embeds, with the user's own `catalog.toml` in the
//! configuration folder. The user's entries are added, or replace those with the same id.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::IntoDeserializer;
use serde::{Deserialize, Serialize};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::ModelRef;
use crate::kit::home::Home;
use crate::model_ref::{is_alias, is_invisible};

#[cfg(test)]
#[path = "../../tests/support/gguf_draft.rs"]
mod draft;
pub mod gguf;
pub mod store;
pub mod support;

use support::Unsupported;

const EMBEDDED: &str = include_str!("../../../../catalog.toml");

/// The models known by name, in display order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    entries: Vec<CatalogEntry>,
}

/// A model known by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CatalogEntry {
    /// Id of the model, by which tasks and commands name it.
    pub id: String,
    /// Human-readable name; the id if the catalogue gives none.
    pub name: String,
    /// Architecture as spelled in GGUF files; `None` if unknown.
    pub architecture: Option<String>,
    /// Human-readable quantisation, such as `Q4_K_M`; `None` if unknown.
    pub quantization: Option<String>,
    /// Exact size of the file in bytes; `None` if unknown.
    pub size_bytes: Option<u64>,
    /// SHA-256 of the file in lower-case hexadecimal; `None` if unknown.
    pub sha256: Option<String>,
    /// Tokens of context that the model was trained for; `None` if unknown.
    pub context_length: Option<u32>,
    /// Human-readable licence; `None` if unknown.
    pub license: Option<String>,
    /// True if commands without a model use this one.
    pub default: bool,
    /// Sources of the file in order of preference; all provide the same bytes.
    pub sources: Vec<ModelSource>,
}

/// A place to download a model file from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum ModelSource {
    /// A file in a repository of the hub.
    Hf {
        /// `ORG/REPO`.
        repo: String,
        /// Path of the file inside the repository.
        file: String,
        /// Branch, tag or commit; absent for the hub's default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        revision: Option<String>,
    },
    /// A file inside a wheel of the Python package index.
    Pypi {
        /// `NAME==VERSION`.
        package: String,
        /// Path of the file inside the wheel.
        member: String,
    },
}

impl ModelSource {
    /// Path of the file inside the repository or the wheel.
    pub fn inner_path(&self) -> &str {
        match self {
            Self::Hf { file, .. } => file,
            Self::Pypi { member, .. } => member,
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hf {
                repo,
                file,
                revision: None,
            } => write!(f, "hf:{repo}::file={file}"),
            Self::Hf {
                repo,
                file,
                revision: Some(revision),
            } => write!(f, "hf:{repo}@{revision}::file={file}"),
            Self::Pypi { package, member } => write!(f, "pypi:{package}::member={member}"),
        }
    }
}

impl CatalogEntry {
    /// Returns the name of the file in the models folder: the last component of the first source's path.
    pub fn file_name(&self) -> &str {
        let path = self.sources.first().map_or("", ModelSource::inner_path);
        path.rsplit('/').next().unwrap_or(path)
    }

    /// Returns whether the catalogue contains the hash of the file.
    pub fn is_verified(&self) -> bool {
        self.sha256.is_some()
    }

    /// Returns the similarity of the entry to a name with these spellings, from 0 to 1.
    fn likeness(&self, spellings: &[String]) -> f64 {
        let family = |name: &str| {
            let letters: String = name.chars().take_while(char::is_ascii_alphabetic).collect();
            letters
        };
        let of_spelling = |spelling: &String| {
            let known = self.sources.iter().filter_map(|source| match source {
                ModelSource::Hf { repo, .. } => repo.rsplit('/').next(),
                ModelSource::Pypi { .. } => None,
            });
            let by_repo =
                known.map(|repo| strsim::jaro_winkler(&repo.to_ascii_lowercase(), spelling));
            let by_id = strsim::jaro_winkler(&self.id, spelling);
            let ours = family(&self.id);
            let by_family = if ours.len() > 2 && ours == family(spelling) {
                0.9
            } else {
                0.0
            };
            by_repo.fold(by_id.max(by_family), f64::max)
        };
        spellings.iter().map(of_spelling).fold(0.0, f64::max)
    }

    /// Returns why no worker of this version can run the model, judging only by the entry; `None` if nothing in the entry is
    /// unsupported.
    pub fn unsupported(&self) -> Option<Unsupported> {
        if let Some(architecture) = &self.architecture
            && let Err(refused) = support::check_architecture(architecture)
        {
            return Some(refused);
        }
        support::check_file_name(self.file_name()).err()
    }

    /// Returns the reference that names this entry.
    pub fn model_ref(&self) -> ModelRef {
        ModelRef::Alias(self.id.clone())
    }
}

/// Returns the possible spellings of a name in a catalogue: without the organisation or the tag, or with the tag as a
/// part.
fn spellings(name: &str) -> Vec<String> {
    let lower: String = name
        .chars()
        .take(128)
        .collect::<String>()
        .to_ascii_lowercase();
    let last = lower
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default();
    let base = last.split(':').next().unwrap_or_default();
    vec![base.to_owned(), last.replace(':', "-")]
}

/// The reason a catalogue can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The file can't be read.
    #[error("could not read the catalogue {}", path.display())]
    Read {
        /// Path of the catalogue.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The content of the file is invalid.
    #[error("{origin}:{line}: {}{message}", entry_prefix(.entry.as_deref()))]
    Invalid {
        /// Path or name of the catalogue.
        origin: String,
        /// Line number, from 1.
        line: usize,
        /// Id of the entry, or `number N` if the entry has no id; `None` outside of entries.
        entry: Option<String>,
        /// Description of the problem.
        message: String,
    },
}

fn entry_prefix(entry: Option<&str>) -> String {
    entry.map_or_else(String::new, |entry| format!("model `{entry}`: "))
}

impl CatalogError {
    /// Returns what to try next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read { .. } => "check the file's owner and mode",
            Self::Invalid { .. } => {
                "correct this entry or remove it; without the file `llorch-pool models catalog` shows the embedded ones"
            }
        }
    }
}

impl Catalog {
    /// Returns the catalogue that is part of the program.
    pub fn embedded() -> Self {
        // A unit test parses the embedded text, so a mistake in it never reaches a release.
        Self {
            entries: parse(EMBEDDED, "catalog.toml")
                .expect("the embedded catalogue is checked by a test"),
        }
    }

    /// Loads the embedded catalogue and overlays the user's own `catalog.toml`, if there is one.
    pub fn load(home: &Home) -> Result<Self, CatalogError> {
        let mut catalog = Self::embedded();
        let path = home.config_file("catalog.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => catalog.overlay(&text, &path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(CatalogError::Read { path, source }),
        }
        Ok(catalog)
    }

    /// Adds the entries of `text`. An entry with a known id replaces the old one, and a default entry clears the mark of the
    /// earlier default.
    pub fn overlay(&mut self, text: &str, path: &Path) -> Result<(), CatalogError> {
        for entry in parse(text, &path.display().to_string())? {
            if entry.default {
                self.entries.iter_mut().for_each(|old| old.default = false);
            }
            match self.entries.iter_mut().find(|old| old.id == entry.id) {
                Some(old) => *old = entry,
                None => self.entries.push(entry),
            }
        }
        Ok(())
    }

    /// Returns the entry with this id.
    pub fn get(&self, id: &str) -> Option<&CatalogEntry> {
        self.entries.iter().find(|entry| entry.id == id)
    }

    /// Returns the entry that `model` refers to, by id or as one of the entry's sources on the hub.
    pub fn find(&self, model: &ModelRef) -> Option<&CatalogEntry> {
        match model {
            ModelRef::Alias(id) => self.get(id),
            ModelRef::Hub {
                repo,
                revision,
                file,
            } => self.iter().find(|entry| {
                entry.sources.iter().any(|source| match source {
                    ModelSource::Hf {
                        repo: known,
                        file: known_file,
                        revision: known_revision,
                    } => {
                        known == repo
                            && file.as_ref().is_none_or(|file| file == known_file)
                            && revision
                                .as_ref()
                                .is_none_or(|revision| Some(revision) == known_revision.as_ref())
                    }
                    ModelSource::Pypi { .. } => false,
                })
            }),
            ModelRef::File(_) => None,
        }
    }

    /// Returns the known id closest to `id`, for "did you mean" hints.
    pub fn nearest(&self, id: &str) -> Option<&str> {
        self.nearest_ids(id).first().copied()
    }

    /// Returns at most three known ids that `name` may refer to, closest first. Accepts spellings of other programs and of the
    /// hub: `llama3.2:1b`, `org/Repo-GGUF`.
    pub fn nearest_ids(&self, name: &str) -> Vec<&str> {
        let spellings = spellings(name);
        let mut scored: Vec<_> = self
            .iter()
            .map(|entry| (entry.likeness(&spellings), entry.id.as_str()))
            .filter(|(score, _)| *score > 0.8)
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        let best = scored.first().map_or(0.0, |(score, _)| *score);
        scored
            .into_iter()
            .take_while(|(score, _)| *score >= best - 0.1)
            .take(3)
            .map(|(_, id)| id)
            .collect()
    }

    /// Returns the entry for commands that name no model: the one marked as default, or else the first.
    pub fn default_entry(&self) -> &CatalogEntry {
        self.entries
            .iter()
            .find(|entry| entry.default)
            .unwrap_or(&self.entries[0])
    }

    /// Returns all entries in order.
    pub fn iter(&self) -> std::slice::Iter<'_, CatalogEntry> {
        self.entries.iter()
    }
}

impl<'a> IntoIterator for &'a Catalog {
    type Item = &'a CatalogEntry;
    type IntoIter = std::slice::Iter<'a, CatalogEntry>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// An entry as written. Each value has its position, so that an error can name the line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    id: Spanned<String>,
    name: Option<Spanned<String>>,
    architecture: Option<Spanned<String>>,
    quantization: Option<Spanned<String>>,
    size_bytes: Option<Spanned<u64>>,
    sha256: Option<Spanned<String>>,
    context_length: Option<Spanned<u32>>,
    license: Option<Spanned<String>>,
    default: Option<Spanned<bool>>,
    sources: Spanned<Vec<Spanned<RawSource>>>,
}

/// A source as written. A tagged enum would parse it too, but would lose the positions of the values.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSource {
    kind: Spanned<String>,
    repo: Option<String>,
    file: Option<String>,
    revision: Option<String>,
    package: Option<String>,
    member: Option<String>,
}

/// A problem and its position in the text.
struct Problem {
    span: Range<usize>,
    message: String,
}

impl Problem {
    fn at(span: Range<usize>, message: impl Into<String>) -> Self {
        Self {
            span,
            message: message.into(),
        }
    }
}

impl From<toml::de::Error> for Problem {
    fn from(error: toml::de::Error) -> Self {
        Self {
            span: error.span().unwrap_or(0..0),
            message: error.message().to_owned(),
        }
    }
}

fn parse(text: &str, origin: &str) -> Result<Vec<CatalogEntry>, CatalogError> {
    let fail = |entry: Option<String>, problem: Problem| CatalogError::Invalid {
        origin: origin.to_owned(),
        line: 1 + text
            .bytes()
            .take(problem.span.start)
            .filter(|byte| *byte == b'\n')
            .count(),
        entry,
        message: problem.message,
    };
    let document = DeTable::parse(text)
        .map_err(|error| fail(None, error.into()))?
        .into_inner();
    let mut entries: Vec<CatalogEntry> = Vec::new();
    for (key, value) in document {
        if key.get_ref() != "models" {
            let message = format!(
                "unknown key `{}`: a catalogue has only `[[models]]`",
                key.get_ref()
            );
            return Err(fail(None, Problem::at(key.span(), message)));
        }
        let span = value.span();
        let DeValue::Array(models) = value.into_inner() else {
            return Err(fail(
                None,
                Problem::at(span, "`models` must be a list: write `[[models]]`"),
            ));
        };
        for (number, model) in models.into_iter().enumerate() {
            let named = Some(id_of(&model).unwrap_or_else(|| format!("number {}", number + 1)));
            let span = model.span();
            let entry = read_entry(model).map_err(|problem| fail(named.clone(), problem))?;
            if entries.iter().any(|other| other.id == entry.id) {
                return Err(fail(named, Problem::at(span, "duplicate id")));
            }
            if entry.default && entries.iter().any(|other| other.default) {
                return Err(fail(
                    named,
                    Problem::at(span, "a second entry has `default = true`"),
                ));
            }
            entries.push(entry);
        }
    }
    Ok(entries)
}

fn id_of(model: &Spanned<DeValue<'_>>) -> Option<String> {
    let id = model.get_ref().as_table()?.get("id")?.get_ref().as_str()?;
    Some(id.chars().take(64).flat_map(char::escape_debug).collect())
}

fn read_entry(model: Spanned<DeValue<'_>>) -> Result<CatalogEntry, Problem> {
    // The deserialiser reports no position for a missing key, so use the start of the entry.
    let span = model.span();
    let raw = RawEntry::deserialize(model.into_deserializer()).map_err(|error| {
        let problem = Problem::from(error);
        if problem.span == (0..0) {
            Problem { span, ..problem }
        } else {
            problem
        }
    })?;
    if !is_alias(raw.id.get_ref()) {
        return Err(Problem::at(
            raw.id.span(),
            "an id must match `[a-z0-9][a-z0-9._-]{0,63}` and not contain `..`",
        ));
    }
    if let Some(zero) = raw.size_bytes.as_ref().filter(|size| *size.get_ref() == 0) {
        return Err(Problem::at(zero.span(), "`size_bytes` must be more than 0"));
    }
    if let Some(zero) = raw
        .context_length
        .as_ref()
        .filter(|length| *length.get_ref() == 0)
    {
        return Err(Problem::at(
            zero.span(),
            "`context_length` must be more than 0",
        ));
    }
    if let Some(hash) = raw
        .sha256
        .as_ref()
        .filter(|hash| !is_sha256(hash.get_ref()))
    {
        return Err(Problem::at(
            hash.span(),
            "`sha256` must be 64 lower-case hexadecimal digits",
        ));
    }
    let sources_span = raw.sources.span();
    let sources = raw
        .sources
        .into_inner()
        .into_iter()
        .map(read_source)
        .collect::<Result<Vec<_>, _>>()?;
    if sources.is_empty() {
        return Err(Problem::at(sources_span, "it needs at least one source"));
    }
    let id = raw.id.into_inner();
    Ok(CatalogEntry {
        name: text("name", raw.name)?.unwrap_or_else(|| id.clone()),
        architecture: text("architecture", raw.architecture)?,
        quantization: text("quantization", raw.quantization)?,
        license: text("license", raw.license)?,
        size_bytes: raw.size_bytes.map(Spanned::into_inner),
        sha256: raw.sha256.map(Spanned::into_inner),
        context_length: raw.context_length.map(Spanned::into_inner),
        default: raw.default.is_some_and(Spanned::into_inner),
        sources,
        id,
    })
}

fn read_source(raw: Spanned<RawSource>) -> Result<ModelSource, Problem> {
    let span = raw.span();
    let raw = raw.into_inner();
    let bad = |message: String| Problem::at(span.clone(), message);
    let source = match raw.kind.get_ref().as_str() {
        "hf" => {
            let (Some(repo), Some(file), None, None) =
                (raw.repo, raw.file, raw.package, raw.member)
            else {
                return Err(bad(
                    "a source of kind `hf` has `repo`, `file` and optionally `revision`".into(),
                ));
            };
            let source = ModelSource::Hf {
                repo,
                file,
                revision: raw.revision,
            };
            // The parser of model references decides which values may be passed to `hf`. A part that contains another part's
            // separator is parsed differently, which the comparison detects.
            match (&source, source.to_string().parse::<ModelRef>()) {
                (
                    ModelSource::Hf {
                        repo,
                        file,
                        revision,
                    },
                    Ok(parsed),
                ) if parsed
                    == ModelRef::Hub {
                        repo: repo.clone(),
                        revision: revision.clone(),
                        file: Some(file.clone()),
                    } => {}
                (_, Err(error)) => return Err(bad(error.to_string())),
                (_, Ok(_)) => return Err(bad(
                    "`repo`, `revision` or `file` contains a character not allowed in hub names"
                        .into(),
                )),
            }
            source
        }
        "pypi" => {
            let (Some(package), Some(member), None, None, None) =
                (raw.package, raw.member, raw.repo, raw.file, raw.revision)
            else {
                return Err(bad(
                    "a source of kind `pypi` has `package` and `member`".into()
                ));
            };
            if !is_pinned_package(&package) {
                return Err(bad("`package` must be `NAME==VERSION`".into()));
            }
            if !is_member(&member) {
                return Err(bad(
                    "`member` must be a relative path of plain names without `..`".into(),
                ));
            }
            ModelSource::Pypi { package, member }
        }
        other => {
            let message = format!(
                "a source's kind is `hf` or `pypi`, not `{}`",
                other.escape_debug()
            );
            return Err(Problem::at(raw.kind.span(), message));
        }
    };
    if !source.inner_path().ends_with(".gguf") {
        return Err(bad("the file must be a `.gguf`".into()));
    }
    Ok(source)
}

/// Reads a short human-readable text. Rejects characters that could upset a terminal or a table.
fn text(key: &str, value: Option<Spanned<String>>) -> Result<Option<String>, Problem> {
    let Some(value) = value else { return Ok(None) };
    let plain = !value.get_ref().trim().is_empty()
        && value.get_ref().chars().count() <= 100
        && !value
            .get_ref()
            .chars()
            .any(|c| c.is_control() || is_invisible(c));
    if !plain {
        return Err(Problem::at(
            value.span(),
            format!("`{key}` must have 1 to 100 printable characters"),
        ));
    }
    Ok(Some(value.into_inner()))
}

/// Returns whether `text` is a SHA-256 in lower-case hexadecimal.
fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns whether `text` is `NAME==VERSION`, limited to the characters of package names and versions so that pip can't mistake
/// it for anything else.
fn is_pinned_package(text: &str) -> bool {
    let Some((name, version)) = text.split_once("==") else {
        return false;
    };
    let ends_ok = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
    };
    let made_of = |part: &str, extra: &str| {
        part.chars()
            .all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
    };
    text.len() <= 128
        && ends_ok(name)
        && ends_ok(version)
        && made_of(name, "._-")
        && made_of(version, ".+!")
}

fn is_member(text: &str) -> bool {
    let step_ok = |step: &str| {
        !step.is_empty()
            && !matches!(step, "." | "..")
            && !step.starts_with('-')
            && step
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-+ ".contains(c))
    };
    text.len() <= 256 && text.split('/').all(step_ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

    fn read(text: &str) -> Result<Vec<CatalogEntry>, String> {
        parse(text, "catalog.toml").map_err(|error| error.to_string())
    }

    fn with(entry: &str, source: &str) -> String {
        format!("[[models]]\nid = \"m\"\n{entry}\n[[models.sources]]\n{source}\n")
    }

    const GOOD: &str = "kind = \"pypi\"\npackage = \"a==1\"\nmember = \"a/b.gguf\"";

    #[test] // [CATALOG-001]
    fn the_embedded_catalogue_has_what_a_user_expects() {
        let catalog = Catalog::embedded();
        for id in [
            "smollm2-135m",
            "tinyllama",
            "qwen",
            "phi3",
            "llama3",
            "mistral",
        ] {
            assert!(catalog.get(id).is_some(), "{id}");
        }
        let default = catalog.default_entry();
        assert_eq!(default.id, "smollm2-135m");
        assert_eq!(default.sha256.as_deref(), Some(HASH));
        assert_eq!(default.file_name(), "SmolLM2-135M-Instruct.Q4_1.gguf");
    }

    #[test] // [CATALOG-002]
    fn a_users_entries_add_and_replace() {
        let mut catalog = Catalog::embedded();
        let before = catalog.iter().count();
        let own = format!(
            "{}{}",
            with("name = \"Mine\"\ndefault = true", GOOD),
            "[[models]]\nid = \"tinyllama\"\n[[models.sources]]\nkind = \"hf\"\nrepo = \"a/b\"\nrevision = \"main\"\nfile = \"x/y.gguf\"\n"
        );
        catalog.overlay(&own, Path::new("own.toml")).unwrap();
        assert_eq!(catalog.iter().count(), before + 1);
        assert_eq!(catalog.default_entry().name, "Mine");
        assert_eq!(catalog.iter().filter(|entry| entry.default).count(), 1);
        let replaced = catalog.get("tinyllama").unwrap();
        assert_eq!(
            (replaced.name.as_str(), replaced.file_name()),
            ("tinyllama", "y.gguf")
        );
        assert_eq!(replaced.context_length, None, "an entry is replaced whole");
        let by_hub_name = catalog
            .find(&"hf:a/b@main::file=x/y.gguf".parse().unwrap())
            .unwrap();
        assert_eq!(by_hub_name.id, "tinyllama");
        assert!(catalog.find(&"hf:a/b@other".parse().unwrap()).is_none());
        assert_eq!(catalog.nearest("tinylama"), Some("tinyllama"));
    }

    #[test] // [CATALOG-003]
    fn a_mistake_is_named_with_file_line_and_entry() {
        let error = |entry: &str, source: &str| read(&with(entry, source)).unwrap_err();
        insta::assert_snapshot!([
            error("sha256 = \"abc\"", GOOD),
            error("sice_bytes = 3", GOOD),
            error("size_bytes = 0", GOOD),
            error("name = \"a\\u001b[31m\"", GOOD),
            error("context_length = \"big\"", GOOD),
            error("", "kind = \"ftp\""),
            error("", "kind = \"pypi\"\npackage = \"a\"\nmember = \"a.gguf\""),
            error("", "kind = \"pypi\"\npackage = \"--index-url==1\"\nmember = \"a.gguf\""),
            error("", "kind = \"pypi\"\npackage = \"a==1\"\nmember = \"../a.gguf\""),
            error("", "kind = \"pypi\"\npackage = \"a==1\"\nmember = \"a.bin\""),
            error("", "kind = \"hf\"\nrepo = \"--x/y\"\nfile = \"a.gguf\""),
            error("", "kind = \"hf\"\nrepo = \"x/y@z\"\nfile = \"a.gguf\""),
            error("", "kind = \"hf\"\nrepo = \"x/y\"\nfile = \"../a.gguf\""),
            error("", "kind = \"hf\"\nfile = \"a.gguf\""),
            read("[[models]]\nid = \"m\"\n").unwrap_err(),
            read("[[models]]\nid = \"m\"\nsources = []\n").unwrap_err(),
            read("[[models]]\nid = \"A B\"\nsources = []\n").unwrap_err(),
            read("\n\n[models]\nid = \"m\"\n").unwrap_err(),
            read("[[model]]\nid = \"m\"\n").unwrap_err(),
            read(&format!("{0}{0}", with("", GOOD))).unwrap_err(),
            read("[[models]]\nid = = 3\n").unwrap_err(),
        ].join("\n"), @r#"
        catalog.toml:3: model `m`: `sha256` must be 64 lower-case hexadecimal digits
        catalog.toml:3: model `m`: unknown field `sice_bytes`, expected one of `id`, `name`, `architecture`, `quantization`, `size_bytes`, `sha256`, `context_length`, `license`, `default`, `sources`
        catalog.toml:3: model `m`: `size_bytes` must be more than 0
        catalog.toml:3: model `m`: `name` must have 1 to 100 printable characters
        catalog.toml:3: model `m`: invalid type: string "big", expected u32
        catalog.toml:5: model `m`: a source's kind is `hf` or `pypi`, not `ftp`
        catalog.toml:4: model `m`: `package` must be `NAME==VERSION`
        catalog.toml:4: model `m`: `package` must be `NAME==VERSION`
        catalog.toml:4: model `m`: `member` must be a relative path of plain names without `..`
        catalog.toml:4: model `m`: the file must be a `.gguf`
        catalog.toml:4: model `m`: `hf:--x/y::file=a.gguf` is not a model reference: a part of it begins with `-`
        catalog.toml:4: model `m`: `repo`, `revision` or `file` contains a character not allowed in hub names
        catalog.toml:4: model `m`: `hf:x/y::file=../a.gguf` is not a model reference: it contains `..` or `.` as a path step
        catalog.toml:4: model `m`: a source of kind `hf` has `repo`, `file` and optionally `revision`
        catalog.toml:1: model `m`: missing field `sources`
        catalog.toml:3: model `m`: it needs at least one source
        catalog.toml:2: model `A B`: an id must match `[a-z0-9][a-z0-9._-]{0,63}` and not contain `..`
        catalog.toml:3: `models` must be a list: write `[[models]]`
        catalog.toml:1: unknown key `model`: a catalogue has only `[[models]]`
        catalog.toml:8: model `m`: duplicate id
        catalog.toml:2: extra `=`, expected nothing
        "#);
    }
}
