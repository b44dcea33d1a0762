//! Settings of every binary: `LLORCH_*` variables override a TOML file, which overrides `Default`.
//!
//! The settings type defines which keys exist: its serialised `Default` is the tree of keys. A field that is `None` by
//! default must be serialised as null (no `skip_serializing_if`), otherwise its key is unknown. A table that is empty by
//! default accepts any key, like a map.

#[cfg(feature = "openapi")]
mod annotated;
mod units;
mod variables;

#[cfg(feature = "openapi")]
pub use annotated::annotated;
#[cfg(all(test, feature = "openapi"))]
pub(crate) use annotated::meanings;
pub use variables::{UnknownVariable, names_in_environment, unknown_variables, variables};

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use toml::de::{DeTable, DeValue};

/// Unusable settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A settings file that can't be read.
    #[error("could not read the settings file {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file that is not TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The parser's message.
        message: String,
    },
    /// A key in the file that matches no setting.
    #[error("{}:{line}: unknown setting `{key}`", path.display())]
    UnknownKey {
        /// Path of the file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key, including its section.
        key: String,
        /// The most similar known key; `None` if none is similar.
        nearest: Option<String>,
    },
    /// A value of the wrong type or outside its range.
    #[error("{origin}: `{key}`: {message}")]
    Invalid {
        /// `FILE:LINE`, or the name of the variable.
        origin: String,
        /// The key, including its section.
        key: String,
        /// The problem with the value.
        message: String,
    },
    /// Defaults that can't be serialised: a bug in the program.
    #[error("the default settings can't be serialised")]
    Defaults(#[source] serde_json::Error),
}

impl SettingsError {
    /// Returns a remedy, if there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKey {
                nearest: Some(nearest),
                ..
            } => Some(format!("did you mean `{nearest}`?")),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some("check the path given with --config".into())
            }
            _ => None,
        }
    }
}

/// The source of a setting's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A key in the settings file.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable, by name.
    Variable(String),
    /// A command-line option, by name.
    Flag(&'static str),
    /// The built-in default.
    Default,
}

impl Origin {
    /// Returns `file`, `variable`, `flag` or `default`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Variable(_) => "variable",
            Self::Flag(_) => "flag",
            Self::Default => "default",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(name) => f.write_str(name),
            Self::Default => f.write_str("default"),
        }
    }
}

/// Settings with the sources of their values.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings, merged from all sources.
    pub value: T,
    /// The keys that don't have their default, with their sources. A later entry overrides an earlier one.
    pub origins: Vec<(String, Origin)>,
}

impl<T> Loaded<T> {
    /// Returns the source of the value of `key`.
    pub fn origin(&self, key: &str) -> Origin {
        let found = self
            .origins
            .iter()
            .rev()
            .find(|(set, _)| path_covers(key, set));
        found.map_or(Origin::Default, |(_, origin)| origin.clone())
    }
}

/// A setting in force.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    /// The key, including its section.
    pub key: String,
    /// The value; null if unset.
    pub value: Value,
    /// `flag`, `variable`, `file` or `default`.
    pub source: &'static str,
    /// Name of the variable or flag, or `FILE:LINE`; `None` for a default.
    pub origin: Option<String>,
}

/// Returns every setting in force, sorted by section and key.
pub fn list<T: Serialize>(loaded: &Loaded<T>) -> Result<Vec<Setting>, SettingsError> {
    let tree = serde_json::to_value(&loaded.value).map_err(SettingsError::Defaults)?;
    let mut settings: Vec<Setting> = leaves(&tree)
        .into_iter()
        .map(|(key, value)| {
            let origin = loaded.origin(&key);
            Setting {
                source: origin.kind(),
                origin: (origin != Origin::Default).then(|| origin.to_string()),
                value: value.clone(),
                key,
            }
        })
        .collect();
    // Keys outside any section sort first.
    settings.sort_by(|a, b| place(&a.key).cmp(&place(&b.key)));
    Ok(settings)
}

/// Returns the keys whose values differ between two settings.
pub fn differences<T: Serialize>(one: &T, other: &T) -> Vec<String> {
    let trees = [one, other].map(|settings| serde_json::to_value(settings).unwrap_or_default());
    let [one, other] = trees.each_ref().map(leaves);
    let lacks = |leaves: &[(String, &Value)], (key, value): &(String, &Value)| {
        !leaves
            .iter()
            .any(|(found, other)| found == key && other == value)
    };
    let changed = one.iter().filter(|leaf| lacks(&other, leaf));
    let added = other.iter().filter(|leaf| lacks(&one, leaf));
    let mut keys: Vec<String> = changed.chain(added).map(|(key, _)| key.clone()).collect();
    keys.sort();
    keys.dedup();
    keys
}

/// Splits a key into its section (empty for none) and its name.
fn place(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or(("", key))
}

/// Loads settings: `env` overrides the TOML file, which overrides `T::default()`.
///
/// `file` is the file named by the user, and must exist; without it, `default_file` is read if it exists. Every key has
/// the variable `LLORCH_SECTION_KEY`; `aliases` adds shorter names as (variable, dotted key), which the long name
/// overrides. An empty variable counts as unset. A list is written with commas, or as TOML if it begins with `[`. A key
/// whose name ends in a unit accepts a number in that unit, or text with any unit: `body_limit_bytes = "64 KiB"`.
pub fn load<T: Serialize + DeserializeOwned + Default>(
    file: Option<&Path>,
    default_file: &Path,
    env: &dyn Fn(&str) -> Option<String>,
    aliases: &[(&str, &str)],
) -> Result<T, SettingsError> {
    load_traced(file, default_file, env, aliases).map(|loaded| loaded.value)
}

/// Like [`load`], but also returns the source of each setting.
pub fn load_traced<T: Serialize + DeserializeOwned + Default>(
    file: Option<&Path>,
    default_file: &Path,
    env: &dyn Fn(&str) -> Option<String>,
    aliases: &[(&str, &str)],
) -> Result<Loaded<T>, SettingsError> {
    let defaults = serde_json::to_value(T::default()).map_err(SettingsError::Defaults)?;
    let mut merged = defaults.clone();
    let mut origins = Vec::new();

    if let Some((path, text)) = read(file, default_file)? {
        let source = SettingsText {
            path: &path,
            text: &text,
        };
        let table = DeTable::parse(&text).map_err(|error| source.syntax(&error))?;
        source.merge(table.get_ref(), &defaults, &mut merged, "", &mut origins)?;
    }

    for (key, default) in leaves(&defaults) {
        let long = variables::variable_of(&key);
        let short = aliases
            .iter()
            .filter(|(_, aliased)| *aliased == key)
            .map(|(name, _)| *name);
        let set = std::iter::once(long.as_str())
            .chain(short)
            .find_map(|name| {
                env(name)
                    .filter(|value| !value.is_empty())
                    .map(|value| (name.to_owned(), value))
            });
        let Some((name, text)) = set else { continue };
        let invalid = |message| SettingsError::Invalid {
            origin: name.clone(),
            key: key.clone(),
            message,
        };
        let candidates: Vec<Value> = match units::number(&key, Value::String(text.clone())) {
            Ok(Value::String(_)) => readings(&text, default),
            Ok(number) => vec![number],
            Err(message) => return Err(invalid(message)),
        };
        // A default of `None` does not reveal the setting's type, so try every possible meaning of the text, and take
        // the first that the settings type accepts.
        let fitting = candidates.iter().find(|value| {
            let mut trial = merged.clone();
            put(&mut trial, &key, (*value).clone());
            match serde_path_to_error::deserialize::<_, T>(trial) {
                Ok(_) => true,
                Err(error) => !path_covers(&error.path().to_string(), &key),
            }
        });
        let value = fitting
            .or(candidates.first())
            .cloned()
            .unwrap_or(Value::String(text));
        put(&mut merged, &key, value);
        origins.push((key, Origin::Variable(name)));
    }

    let value = serde_path_to_error::deserialize(merged).map_err(|error| {
        let key = error.path().to_string();
        let origin = origins
            .iter()
            .rev()
            .find(|(set, _)| path_covers(&key, set) || path_covers(set, &key));
        SettingsError::Invalid {
            origin: origin.map_or_else(|| "settings".to_owned(), |(_, origin)| origin.to_string()),
            key,
            message: error.into_inner().to_string(),
        }
    })?;
    Ok(Loaded { value, origins })
}

fn read(
    file: Option<&Path>,
    default_file: &Path,
) -> Result<Option<(PathBuf, String)>, SettingsError> {
    let path = file.unwrap_or(default_file);
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.to_path_buf(), text))),
        Err(error) if file.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SettingsError::Read {
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// The settings file being read. Its text turns an offset into a line number for errors.
struct SettingsText<'a> {
    path: &'a Path,
    text: &'a str,
}

impl SettingsText<'_> {
    fn line(&self, span: Range<usize>) -> usize {
        self.text.as_bytes()[..span.start.min(self.text.len())]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            + 1
    }

    fn syntax(&self, error: &toml::de::Error) -> SettingsError {
        SettingsError::Syntax {
            path: self.path.to_path_buf(),
            line: self.line(error.span().unwrap_or_default()),
            message: error.message().to_owned(),
        }
    }

    fn merge(
        &self,
        table: &DeTable<'_>,
        known: &Value,
        into: &mut Value,
        prefix: &str,
        origins: &mut Vec<(String, Origin)>,
    ) -> Result<(), SettingsError> {
        for (name, value) in table {
            let key = if prefix.is_empty() {
                name.get_ref().to_string()
            } else {
                format!("{prefix}.{}", name.get_ref())
            };
            let line = self.line(name.span());
            let Some(expected) = known.get(name.get_ref().as_ref()) else {
                return Err(SettingsError::UnknownKey {
                    path: self.path.to_path_buf(),
                    line,
                    nearest: nearest(known, name.get_ref(), prefix),
                    key,
                });
            };
            match (value.get_ref(), expected) {
                (DeValue::Table(inner), Value::Object(fields)) if !fields.is_empty() => {
                    self.merge(
                        inner,
                        expected,
                        &mut into[name.get_ref().as_ref()],
                        &key,
                        origins,
                    )?;
                }
                (_, Value::Object(fields)) if !fields.is_empty() => {
                    return Err(SettingsError::Invalid {
                        origin: format!("{}:{line}", self.path.display()),
                        message: format!("is a section: write `[{key}]` and its keys below"),
                        key,
                    });
                }
                (value, _) => {
                    let value = units::number(&key, json(value)).map_err(|message| {
                        SettingsError::Invalid {
                            origin: format!("{}:{line}", self.path.display()),
                            key: key.clone(),
                            message,
                        }
                    })?;
                    into[name.get_ref().as_ref()] = value;
                    let path = self.path.to_path_buf();
                    origins.push((key, Origin::File { path, line }));
                }
            }
        }
        Ok(())
    }
}

/// Returns the known key or section most similar to a mistyped one; `None` if none is similar enough.
fn nearest(known: &Value, typed: &str, prefix: &str) -> Option<String> {
    let candidates = known.as_object()?.keys();
    let (distance, best) = candidates
        .map(|key| (strsim::damerau_levenshtein(key, typed), key))
        .min()?;
    // A key that differs in more than half of its characters would be a guess, not a suggestion.
    (distance * 2 <= typed.chars().count().max(2)).then(|| {
        if prefix.is_empty() {
            best.clone()
        } else {
            format!("{prefix}.{best}")
        }
    })
}

fn json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Datetime(value) => Value::String(value.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .ok()
            .and_then(serde_json::Number::from_i128)
            .map_or_else(|| Value::String(number.to_string()), Value::Number),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .ok()
            .and_then(serde_json::Number::from_f64)
            .map_or_else(|| Value::String(number.to_string()), Value::Number),
        DeValue::Array(items) => items.iter().map(|item| json(item.get_ref())).collect(),
        DeValue::Table(table) => {
            let fields = table
                .iter()
                .map(|(key, value)| (key.get_ref().to_string(), json(value.get_ref())));
            Value::Object(fields.collect::<Map<_, _>>())
        }
    }
}

/// Returns the dotted path and default of every key in the tree.
fn leaves(tree: &Value) -> Vec<(String, &Value)> {
    fn walk<'a>(prefix: &str, value: &'a Value, out: &mut Vec<(String, &'a Value)>) {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                for (key, value) in fields {
                    walk(
                        &if prefix.is_empty() {
                            key.clone()
                        } else {
                            format!("{prefix}.{key}")
                        },
                        value,
                        out,
                    );
                }
            }
            _ => out.push((prefix.to_owned(), value)),
        }
    }
    let mut out = Vec::new();
    if tree.as_object().is_some_and(|fields| !fields.is_empty()) {
        walk("", tree, &mut out);
    }
    out
}

/// Returns the possible values of a variable's text for a setting with this default, the likeliest first.
fn readings(text: &str, default: &Value) -> Vec<Value> {
    let string = Value::String(text.to_owned());
    // Variables may use the same syntax as the file, which covers every kind of value.
    let as_toml = || {
        let document = format!("value = {text}");
        let table = DeTable::parse(&document).ok()?;
        // The text must not smuggle in a second line with another key.
        (table.get_ref().len() == 1).then(|| {
            table
                .get_ref()
                .get("value")
                .map(|value| json(value.get_ref()))
        })?
    };
    match default {
        Value::String(_) => vec![string],
        Value::Array(_) if !text.trim_start().starts_with('[') => {
            vec![
                text.split(',')
                    .map(|item| item.trim().to_owned())
                    .filter(|item| !item.is_empty())
                    .collect(),
            ]
        }
        Value::Null => std::iter::once(string).chain(as_toml()).collect(),
        _ => as_toml()
            .into_iter()
            .chain(std::iter::once(string))
            .collect(),
    }
}

fn put(tree: &mut Value, key: &str, value: Value) {
    let mut place = tree;
    for part in key.split('.') {
        place = &mut place[part];
    }
    *place = value;
}

/// Returns whether `path` is `key` or inside it (`a.b`, `a.b.c` and `a.b[0]` for the key `a.b`).
fn path_covers(path: &str, key: &str) -> bool {
    path.strip_prefix(key)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::fs;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Settings {
        bind: String,
        pool_id: Option<String>,
        limit: Option<u64>,
        hosts: Vec<String>,
        queue: Queue,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Queue {
        capacity: i64,
        fair: bool,
        ratio: f64,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self {
                bind: "127.0.0.1:8080".into(),
                pool_id: None,
                limit: None,
                hosts: vec![],
                queue: Queue::default(),
            }
        }
    }

    impl Default for Queue {
        fn default() -> Self {
            Self {
                capacity: 100,
                fair: true,
                ratio: 0.5,
            }
        }
    }

    const ALIASES: &[(&str, &str)] = &[("LLORCH_POOL_BIND", "bind")];

    fn load_with(file: Option<&str>, vars: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("settings.toml");
        if let Some(text) = file {
            fs::write(&path, text).unwrap();
        }
        let env = |name: &str| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        load(None, &path, &env, ALIASES)
    }

    /// Returns the error's text without the folder, which differs from run to run.
    fn message(error: &SettingsError) -> String {
        let text = error.to_string();
        text.split_once("settings.toml")
            .map_or(text.clone(), |(_, rest)| format!("settings.toml{rest}"))
    }

    #[test] // [POOLCORE-040]
    fn variables_win_over_the_file_and_the_file_over_defaults() {
        assert_eq!(load_with(None, &[]).unwrap(), Settings::default());
        let settings = load_with(
            Some("bind = '0.0.0.0:1'\nhosts = ['a']\n[queue]\ncapacity = 7\nratio = 1.0\n"),
            &[
                ("LLORCH_QUEUE_CAPACITY", "-1"),
                ("LLORCH_QUEUE_FAIR", "false"),
                ("LLORCH_HOSTS", "b, c"),
                ("LLORCH_BIND", ""),
            ],
        )
        .unwrap();
        assert_eq!(settings.bind, "0.0.0.0:1");
        assert_eq!(settings.hosts, ["b", "c"]);
        assert_eq!(
            settings.queue,
            Queue {
                capacity: -1,
                fair: false,
                ratio: 1.0
            }
        );
    }

    #[test] // [POOLCORE-040]
    fn aliases_and_optional_settings_are_read_as_their_type_needs() {
        let settings = load_with(
            None,
            &[
                ("LLORCH_POOL_BIND", "127.0.0.1:0"),
                ("LLORCH_POOL_ID", "1234"),
                ("LLORCH_LIMIT", "1234"),
                ("LLORCH_QUEUE_RATIO", "2"),
            ],
        )
        .unwrap();
        assert_eq!(settings.bind, "127.0.0.1:0");
        assert_eq!(settings.pool_id.as_deref(), Some("1234"));
        assert_eq!(settings.limit, Some(1234));
        assert_eq!(settings.queue.ratio, 2.0);
    }

    #[test] // [POOLCORE-041]
    fn an_unknown_key_is_refused_with_its_line_and_the_nearest_one() {
        let error = load_with(Some("\n[queue]\ncapcity = 3\n"), &[]).unwrap_err();
        assert_eq!(
            message(&error),
            "settings.toml:3: unknown setting `queue.capcity`"
        );
        assert_eq!(error.hint().unwrap(), "did you mean `queue.capacity`?");

        let error = load_with(Some("[queu]\n"), &[]).unwrap_err();
        assert_eq!(error.hint().unwrap(), "did you mean `queue`?");
        let error = load_with(Some("entirely_different = 1\n"), &[]).unwrap_err();
        assert_eq!(error.hint(), None);
    }

    #[test] // [POOLCORE-041]
    fn a_wrong_value_names_where_it_was_set() {
        let error = load_with(Some("\n[queue]\ncapacity = 'many'\n"), &[]).unwrap_err();
        assert_eq!(
            message(&error),
            "settings.toml:3: `queue.capacity`: invalid type: string \"many\", expected i64"
        );
        let error = load_with(None, &[("LLORCH_QUEUE_CAPACITY", "many")]).unwrap_err();
        assert_eq!(
            message(&error),
            "LLORCH_QUEUE_CAPACITY: `queue.capacity`: invalid type: string \"many\", expected i64"
        );
        let error = load_with(None, &[("LLORCH_LIMIT", "-1")]).unwrap_err();
        assert!(
            message(&error).starts_with("LLORCH_LIMIT: `limit`: "),
            "{error}"
        );
        let error = load_with(Some("queue = 3\n"), &[]).unwrap_err();
        assert!(
            message(&error).starts_with("settings.toml:1: `queue`: "),
            "{error}"
        );
        let error = load_with(Some("bind = \n"), &[]).unwrap_err();
        assert!(message(&error).starts_with("settings.toml:1: "), "{error}");
    }

    #[test] // [POOLCORE-042]
    fn a_file_that_the_user_named_must_exist() {
        let error = load::<Settings>(
            Some(Path::new("/no/such.toml")),
            Path::new("/unused"),
            &|_| None,
            &[],
        )
        .unwrap_err();
        assert!(matches!(error, SettingsError::Read { .. }) && error.hint().is_some());
    }
}
