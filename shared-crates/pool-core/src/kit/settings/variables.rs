//! Detection of `LLORCH_*` variables that no program reads, most of them mistyped.

use std::fmt;

use serde::Serialize;

use super::{SettingsError, leaves};

/// Variables without a setting that our programs read.
const OTHER: [&str; 6] = [
    "LLORCH_HOME",
    "LLORCH_LOG",
    "LLORCH_API_TOKEN",
    "LLORCH_POOL_TOKEN",
    "LLORCH_ORCHESTRATOR_URL",
    "LLORCH_POOL_URL",
];
/// Variables that our programs pass to each other. A name that ends in `_` is a prefix, for tests, benchmarks and
/// demonstrations.
const INTERNAL: [&str; 6] = [
    "LLORCH_WORKER_SECRET",
    "LLORCH_WORKER_NONCE",
    "LLORCH_CRASH_AT",
    "LLORCH_TEST_",
    "LLORCH_BENCH_",
    "LLORCH_DEMO_",
];

/// A `LLORCH_*` variable that no program reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnknownVariable {
    /// The variable's name, unescaped.
    pub name: String,
    /// The most similar known name; `None` if none is similar.
    pub nearest: Option<String>,
}

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name may contain control characters.
        write!(f, "unknown variable {}", self.name.escape_debug())?;
        match &self.nearest {
            Some(nearest) => write!(f, ": did you mean {nearest}?"),
            None => Ok(()),
        }
    }
}

/// Returns the name of the variable that sets a key.
pub(super) fn variable_of(key: &str) -> String {
    format!("LLORCH_{}", key.replace('.', "_").to_uppercase())
}

/// Returns the variables that set a key of `T`, including `aliases` (see [`super::load`]).
pub fn variables<T: Serialize + Default>(
    aliases: &[(&str, &str)],
) -> Result<Vec<String>, SettingsError> {
    let defaults = serde_json::to_value(T::default()).map_err(SettingsError::Defaults)?;
    let long = leaves(&defaults)
        .into_iter()
        .map(|(key, _)| variable_of(&key));
    let short = aliases.iter().map(|(name, _)| (*name).to_owned());
    Ok(long.chain(short).collect())
}

/// Returns the `LLORCH_*` variables among the names in `set` that no program reads: neither this program, whose
/// variables are `own`, nor those that may share its environment, whose variables are `others` (a name that ends in
/// `_` is a prefix).
pub fn unknown_variables(
    set: impl IntoIterator<Item = String>,
    own: &[String],
    others: &[&str],
) -> Vec<UnknownVariable> {
    let own: Vec<&str> = own.iter().map(String::as_str).chain(OTHER).collect();
    let known = |name: &str| {
        let is =
            |known: &&str| name == *known || (known.ends_with('_') && name.starts_with(*known));
        own.iter().chain(others).chain(&INTERNAL).any(is)
    };
    let mut unknown: Vec<_> = set
        .into_iter()
        .filter(|name| name.starts_with("LLORCH_") && !known(name))
        .map(|name| UnknownVariable {
            nearest: nearest(&name, &own),
            name,
        })
        .collect();
    unknown.sort_by(|a, b| a.name.cmp(&b.name));
    unknown
}

/// Returns the names of all variables in this process's environment.
pub fn names_in_environment() -> impl Iterator<Item = String> {
    std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned())
}

fn nearest(name: &str, known: &[&str]) -> Option<String> {
    let typed = name.strip_prefix("LLORCH_")?;
    let (distance, best) = known
        .iter()
        .filter_map(|known| {
            let rest = known.strip_prefix("LLORCH_")?;
            Some((strsim::damerau_levenshtein(rest, typed), *known))
        })
        .min()?;
    // A name that differs in more than half of its characters would be a guess, not a suggestion.
    (distance * 2 <= typed.chars().count()).then(|| best.to_owned())
}
