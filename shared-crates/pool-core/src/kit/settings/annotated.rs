//! A settings file that documents itself. Keys and values come from the serialised settings, descriptions from the doc
//! comments of the settings type's fields.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

use super::variables::variable_of;
use super::{Loaded, Origin, SettingsError, list, place};

/// Line width of comments, in bytes.
const WIDTH: usize = 100;

/// Returns the settings as a TOML file that lists and describes every key. A key at its default is commented out, so
/// that a later release may change the default.
pub fn annotated<T: Serialize + ToSchema>(
    loaded: &Loaded<T>,
    aliases: &[(&str, &str)],
) -> Result<String, SettingsError> {
    let meanings = meanings::<T>();
    let mut text = String::new();
    let mut section = "";
    let settings = list(loaded)?;
    for setting in &settings {
        let (inside, name) = place(&setting.key);
        if inside != section {
            section = inside;
            let _ = write!(text, "[{section}]\n\n");
        }
        if let Some(meaning) = meanings.get(&setting.key) {
            comment(&mut text, meaning);
        }
        let long = variable_of(&setting.key);
        let short = aliases.iter().find(|(_, key)| *key == setting.key);
        let also = short.map_or_else(String::new, |(name, _)| format!(" or {name}"));
        comment(&mut text, &format!("Variable: {long}{also}"));
        let origin = loaded.origin(&setting.key);
        if !matches!(origin, Origin::Default | Origin::File { .. }) {
            comment(&mut text, &format!("Set by {origin}"));
        }
        let mark = if origin == Origin::Default { "#" } else { "" };
        let value = toml_text(&setting.value);
        // TOML has no null, so an unset key stays commented out.
        let line = match value {
            Some(value) => format!("{mark}{name} = {value}"),
            None => format!("#{name} ="),
        };
        let _ = write!(text, "{line}\n\n");
    }
    Ok(text)
}

fn toml_text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::Object(fields) if fields.is_empty() => Some("{}".to_owned()),
        // Numbers, booleans and lists of strings have the same form in JSON and TOML.
        value => toml::Value::try_from(value)
            .ok()
            .map(|value| value.to_string()),
    }
}

fn comment(text: &mut String, words: &str) {
    let mut line = String::from("#");
    for word in words.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(text, "{line}");
            line = String::from("#");
        }
        let _ = write!(line, " {word}");
    }
    let _ = writeln!(text, "{line}");
}

/// Returns the doc comment of every key that has one.
pub(crate) fn meanings<T: ToSchema>() -> BTreeMap<String, String> {
    let mut known = Vec::new();
    T::schemas(&mut known);
    let known: BTreeMap<String, Value> = known
        .into_iter()
        .filter_map(|(name, schema)| Some((name, to_json(&schema)?)))
        .collect();
    let mut found = BTreeMap::new();
    if let Some(schema) = to_json(&T::schema()) {
        walk(&schema, "", &known, &mut found);
    }
    found
}

fn to_json(schema: &RefOr<Schema>) -> Option<Value> {
    serde_json::to_value(schema).ok()
}

fn walk(
    schema: &Value,
    prefix: &str,
    known: &BTreeMap<String, Value>,
    found: &mut BTreeMap<String, String>,
) {
    let fields = schema["properties"].as_object();
    for (name, field) in fields.into_iter().flatten() {
        let key = if prefix.is_empty() {
            name.clone()
        } else {
            format!("{prefix}.{name}")
        };
        if let Some(text) = field["description"].as_str() {
            found.insert(key.clone(), text.to_owned());
        }
        // A section is a `$ref` to another schema, alone or inside one of these lists.
        let parts = ["allOf", "oneOf", "anyOf"]
            .into_iter()
            .filter_map(|how| field[how].as_array())
            .flatten();
        for part in std::iter::once(field).chain(parts) {
            let inner = part["$ref"]
                .as_str()
                .and_then(|path| path.rsplit('/').next())
                .and_then(|name| known.get(name));
            walk(inner.unwrap_or(part), &key, known, found);
        }
    }
}
