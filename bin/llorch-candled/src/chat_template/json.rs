//! The filter `tojson` as the `transformers` library defines it: Python's `json.dumps`. Jinja's own filter escapes for HTML and
//! sorts keys.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State};

use super::methods::charge;

/// Longest indentation in bytes. `json.dumps` accepts any.
const MAX_INDENT: usize = 64;

/// The format of the written JSON.
struct Style {
    ensure_ascii: bool,
    /// Indentation per level, with each element on a line of its own; `None` for a single line.
    indent: Option<String>,
    between_elements: String,
    after_key: String,
    sort_keys: bool,
}

/// Positional arguments after the value.
type Arguments = (Option<Value>, Option<Value>, Option<Value>, Option<Value>);

/// Implements the filter `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    args: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    let args = args.into_values();
    let (args, kwargs): (&[Value], Kwargs) = from_args(&args)?;
    let (ensure_ascii, indent, separators, sort_keys): Arguments = from_args(args)?;
    let named = |given: Option<Value>, name: &str| match given {
        Some(value) => Ok(Some(value)),
        None => kwargs.get::<Option<Value>>(name),
    };
    let ensure_ascii = named(ensure_ascii, "ensure_ascii")?;
    let indent = named(indent, "indent")?.filter(|indent| !indent.is_none());
    let separators = named(separators, "separators")?.filter(|pair| !pair.is_none());
    let sort_keys = named(sort_keys, "sort_keys")?;
    kwargs.assert_all_used()?;
    let indent = indent.as_ref().map(indentation).transpose()?;
    let (between_elements, after_key) = match separators {
        Some(pair) => pair_of_texts(&pair)?,
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: ensure_ascii.is_some_and(|value| value.is_true()),
        indent,
        between_elements,
        after_key,
        sort_keys: sort_keys.is_some_and(|value| value.is_true()),
    };
    let mut json = String::new();
    style.write(state, value, 0, &mut json)?;
    Ok(Value::from(json))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn indentation(value: &Value) -> Result<String, Error> {
    let text = match value.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let spaces = value.as_i64().ok_or_else(|| {
                invalid("`indent` of tojson must be a number or a string".to_owned())
            })?;
            " ".repeat(usize::try_from(spaces).unwrap_or(0).min(MAX_INDENT + 1))
        }
    };
    match text.len() {
        0..=MAX_INDENT => Ok(text),
        _ => Err(invalid(format!("`indent` of tojson exceeds {MAX_INDENT}"))),
    }
}

fn pair_of_texts(pair: &Value) -> Result<(String, String), Error> {
    let texts: Vec<String> = pair
        .try_iter()?
        .filter_map(|text| text.as_str().map(str::to_owned))
        .take(3)
        .collect();
    <[String; 2]>::try_from(texts)
        .map(|[first, second]| (first, second))
        .map_err(|_| invalid("`separators` of tojson must be two strings".to_owned()))
}

impl Style {
    fn write(
        &self,
        state: &State,
        value: &Value,
        depth: usize,
        json: &mut String,
    ) -> Result<(), Error> {
        let start = json.len();
        match value.kind() {
            ValueKind::None => json.push_str("null"),
            ValueKind::Bool => json.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => json.push_str(&value.to_string()),
            ValueKind::Number => json.push_str(&json_number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), json),
            ValueKind::Seq | ValueKind::Iterable => {
                let elements = value.try_iter()?;
                return self.list(state, elements, depth, json);
            }
            ValueKind::Map => return self.mapping(state, value, depth, json),
            other => return Err(invalid(format!("{other} can't be written as JSON"))),
        }
        charge(state, json.len() - start)
    }

    fn list(
        &self,
        state: &State,
        elements: impl Iterator<Item = Value>,
        depth: usize,
        json: &mut String,
    ) -> Result<(), Error> {
        json.push('[');
        let mut any = false;
        for element in elements {
            self.next(state, any, depth, json)?;
            any = true;
            self.write(state, &element, depth + 1, json)?;
        }
        self.close(any, depth, ']', json);
        Ok(())
    }

    fn mapping(
        &self,
        state: &State,
        value: &Value,
        depth: usize,
        json: &mut String,
    ) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            charge(state, size_of::<(Value, Value)>())?;
            let entry = value.get_item(&key)?;
            entries.push((key, entry));
        }
        if self.sort_keys {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        json.push('{');
        let any = !entries.is_empty();
        for (index, (key, entry)) in entries.into_iter().enumerate() {
            self.next(state, index > 0, depth, json)?;
            self.text(&key_text(&key)?, json);
            json.push_str(&self.after_key);
            self.write(state, &entry, depth + 1, json)?;
        }
        self.close(any, depth, '}', json);
        Ok(())
    }

    /// Writes the separator and the line break before an element.
    fn next(&self, state: &State, any: bool, depth: usize, json: &mut String) -> Result<(), Error> {
        let start = json.len();
        if any {
            json.push_str(&self.between_elements);
        }
        self.line(depth + 1, json);
        charge(state, json.len() - start)
    }

    fn close(&self, any: bool, depth: usize, bracket: char, json: &mut String) {
        if any {
            self.line(depth, json);
        }
        json.push(bracket);
    }

    fn line(&self, depth: usize, json: &mut String) {
        if let Some(indent) = &self.indent {
            json.push('\n');
            (0..depth).for_each(|_| json.push_str(indent));
        }
    }

    fn text(&self, text: &str, json: &mut String) {
        json.push('"');
        for c in text.chars() {
            match c {
                '"' => json.push_str("\\\""),
                '\\' => json.push_str("\\\\"),
                '\n' => json.push_str("\\n"),
                '\r' => json.push_str("\\r"),
                '\t' => json.push_str("\\t"),
                '\u{8}' => json.push_str("\\b"),
                '\u{c}' => json.push_str("\\f"),
                c if c < ' ' || self.ensure_ascii && !(' '..='~').contains(&c) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        json.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => json.push(c),
            }
        }
        json.push('"');
    }
}

/// Returns a key as the text of a JSON name.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.to_string().to_lowercase()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(json_number(key)),
        other => Err(invalid(format!("{other} can't be a key in JSON"))),
    }
}

/// Formats a fractional number as Python writes it in JSON.
fn json_number(value: &Value) -> String {
    match number(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        number => number.to_owned(),
    }
}

/// Formats a fractional number as Python prints it.
pub(super) fn number(value: &Value) -> String {
    let Ok(number) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !number.is_finite() {
        return number.to_string().to_lowercase();
    }
    // Rust and Python both write the shortest digits that read back as the same number. They differ in when they use an
    // exponent.
    let scientific = format!("{number:e}");
    match scientific.split_once('e') {
        Some((digits, exponent)) => match exponent.parse::<i32>() {
            Ok(power) if number != 0.0 && !(-4..16).contains(&power) => {
                let sign = if power < 0 { '-' } else { '+' };
                format!("{digits}e{sign}{:02}", power.abs())
            }
            _ => format!("{number:?}"),
        },
        None => scientific,
    }
}
