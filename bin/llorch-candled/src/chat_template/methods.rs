//! Python's methods of texts and dictionaries, which chat templates call, paid for with fuel.
//!
//! The template engine charges for the result of a method, once the result exists. Before that, a replacement can make
//! gigabytes out of two short texts, and the walk over a repeated list may never end. So the cost of a method is charged here,
//! before the call.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one unit of fuel pays for, as in the template engine.
pub(super) const BYTES_PER_FUEL: usize = 64;
/// Bytes of a list element.
const SLOT_BYTES: usize = 32;
/// Most digits of a number in a format: such a number may be a width, which sets the length of the output.
const MAX_WIDTH_DIGITS: usize = 3;
/// Most bytes of a formatted number or of a text's padding.
const FORMATTED_BYTES: usize = 1000;

/// Calls a method that the engine itself does not have.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => {}
        // Values are immutable, so a mapping is its own copy.
        ValueKind::Map if method == "copy" && args.is_empty() => return Ok(value.clone()),
        ValueKind::Map => return unknown_method_callback(state, value, method, args),
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    }
    let Some(text) = value.as_str() else {
        return Err(Error::from(ErrorKind::UnknownMethod));
    };
    let arg = |index: usize| args.get(index).and_then(Value::as_str);
    let bytes = match method {
        "replace" => {
            let (old, new) = (arg(0).unwrap_or_default(), arg(1).unwrap_or_default());
            let all = text.matches(old).count();
            let limit = args.get(2).and_then(Value::as_usize).unwrap_or(all);
            all.min(limit).saturating_mul(new.len())
        }
        // Each part may become a list element, as may each line below.
        "split" | "rsplit" => {
            let parts = match arg(0) {
                Some(separator) => text.matches(separator).count(),
                None => text.split_whitespace().count(),
            };
            parts.saturating_mul(SLOT_BYTES)
        }
        "splitlines" => text.split(is_line_end).count().saturating_mul(SLOT_BYTES),
        // Each character may be compared with each character of the set.
        "strip" | "lstrip" | "rstrip" => {
            let set = arg(0).unwrap_or_default();
            text.len().saturating_add(4).saturating_mul(set.len())
        }
        // The argument is a text or a list of texts.
        "startswith" | "endswith" => {
            let count = args.first().and_then(Value::len).unwrap_or(0);
            count.saturating_mul(SLOT_BYTES)
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            let width = args.first().and_then(Value::as_usize).unwrap_or(0);
            width.saturating_mul(4)
        }
        "format" => format_bytes(text, args)?,
        _ => 0,
    };
    charge(state, bytes.saturating_add(text.len()))?;
    match method {
        "join" => join(state, value, args),
        "strip" | "lstrip" | "rstrip" => strip(text, method, args),
        "split" | "rsplit" => split(text, method == "rsplit", args),
        "splitlines" => lines(text, args),
        "partition" | "rpartition" => partition(text, method == "rpartition", args),
        "startswith" | "endswith" if args.len() > 1 => {
            let (what, start): (&Value, usize) = from_args(args)?;
            let rest: String = text.chars().skip(start).collect();
            unknown_method_callback(
                state,
                &Value::from(rest),
                method,
                std::slice::from_ref(what),
            )
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "swapcase" => Ok(text.chars().map(swapped).collect::<String>().into()),
        "casefold" => Ok(text.to_lowercase().replace('ß', "ss").into()),
        "isdecimal" => {
            let decimal = !text.is_empty() && text.chars().all(char::is_numeric);
            Ok(decimal.into())
        }
        "index" | "rindex" => {
            let find = if method == "index" { "find" } else { "rfind" };
            let found = unknown_method_callback(state, value, find, args)?;
            match found.as_i64() {
                Some(-1) => Err(invalid("substring not found")),
                _ => Ok(found),
            }
        }
        "zfill" | "ljust" | "rjust" | "center" => pad(text, method, args),
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// Charges fuel for producing this many bytes.
pub(super) fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64 + 1)
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// Returns whether Python counts a character as white space.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Returns whether Python counts a character as the end of a line.
fn is_line_end(c: char) -> bool {
    matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// Joins texts. The engine's own filter charges fuel as it runs, but accepts values that are not texts.
fn join(state: &mut State, separator: &Value, args: &[Value]) -> Result<Value, Error> {
    let (values,): (&Value,) = from_args(args)?;
    for value in values.try_iter()? {
        charge(state, SLOT_BYTES)?;
        if value.as_str().is_none() {
            return Err(invalid("the elements to join must all be strings"));
        }
    }
    state.apply_filter("join", &[values.clone(), separator.clone()])
}

fn strip(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    let is_stripped = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(Value::from(match method {
        "lstrip" => text.trim_start_matches(is_stripped),
        "rstrip" => text.trim_end_matches(is_stripped),
        _ => text.trim_matches(is_stripped),
    }))
}

fn split(text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (args, kwargs): (&[Value], Kwargs) = from_args(args)?;
    let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => kwargs.get::<Option<&str>>("sep")?,
    };
    let most = match most {
        Some(most) => Some(most),
        None => kwargs.get::<Option<i64>>("maxsplit")?,
    };
    kwargs.assert_all_used()?;
    let most = most.and_then(|most| usize::try_from(most).ok());
    let parts = most.map_or(usize::MAX, |most| most.saturating_add(1));
    let mut found: Vec<&str> = match (separator, from_end) {
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(separator), false) => text.splitn(parts, separator).collect(),
        (Some(separator), true) => text.rsplitn(parts, separator).collect(),
        (None, _) => split_at_space(text, parts, from_end),
    };
    if from_end {
        found.reverse();
    }
    Ok(found.into_iter().map(Value::from).collect())
}

/// Splits a text into at most `parts` words, of which the last is the rest of the text. With `from_end`, the words are taken
/// from the end and come in reverse order.
fn split_at_space(text: &str, parts: usize, from_end: bool) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_matches(is_space);
    while !rest.is_empty() {
        let border = match (words.len() + 1 < parts, from_end) {
            (false, _) => None,
            (true, false) => rest.find(is_space),
            (true, true) => rest.rfind(is_space),
        };
        let Some(border) = border else {
            words.push(rest);
            break;
        };
        let (before, after) = rest.split_at(border);
        if from_end {
            words.push(after.trim_start_matches(is_space));
            rest = before.trim_end_matches(is_space);
        } else {
            words.push(before);
            rest = after.trim_start_matches(is_space);
        }
    }
    words
}

fn lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (args, kwargs): (&[Value], Kwargs) = from_args(args)?;
    let (keep,): (Option<bool>,) = from_args(args)?;
    let keep = match keep {
        Some(keep) => keep,
        None => kwargs.get::<Option<bool>>("keepends")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_line_end).unwrap_or(rest.len());
        let ending = match rest[end..].starts_with("\r\n") {
            true => 2,
            false => rest[end..].chars().next().map_or(0, char::len_utf8),
        };
        lines.push(Value::from(&rest[..end + if keep { ending } else { 0 }]));
        rest = &rest[end + ending..];
    }
    Ok(Value::from(lines))
}

fn partition(text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    let parts = match (text.split_once(separator), from_end) {
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
        (Some((before, after)), false) => [before, separator, after],
        (Some(_), true) => match text.rsplit_once(separator) {
            Some((before, after)) => [before, separator, after],
            None => ["", "", text],
        },
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn swapped(c: char) -> String {
    match c.is_uppercase() {
        true => c.to_lowercase().collect(),
        false => c.to_uppercase().collect(),
    }
}

fn pad(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    let fill = if method == "zfill" {
        "0"
    } else {
        fill.unwrap_or(" ")
    };
    let missing = width.saturating_sub(text.chars().count());
    // Python's own rule for uneven padding.
    let left = match method {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, digits) = match method {
        "zfill" if text.starts_with(['+', '-']) => text.split_at(1),
        _ => ("", text),
    };
    let (before, after) = (fill.repeat(left), fill.repeat(missing - left));
    Ok(Value::from(format!("{sign}{before}{digits}{after}")))
}

/// Returns the most bytes that a format can produce. Refuses formats without a useful bound: long numbers, widths taken from
/// arguments, and arguments that are neither texts nor numbers.
fn format_bytes(text: &str, args: &[Value]) -> Result<usize, Error> {
    let digits = text.split(|c: char| !c.is_ascii_digit());
    if digits.map(str::len).max() > Some(MAX_WIDTH_DIGITS) {
        return Err(invalid("a number in the format is too large"));
    }
    if takes_width(text) {
        return Err(invalid("a format can't take a width from its arguments"));
    }
    let (args, kwargs): (&[Value], Kwargs) = from_args(args)?;
    let named = kwargs.args().map(|name| kwargs.peek::<Value>(name));
    let mut longest = FORMATTED_BYTES;
    for value in args.iter().map(|value| Ok(value.clone())).chain(named) {
        let value: Value = value?;
        match value.kind() {
            ValueKind::String => longest = longest.max(value.as_str().map_or(0, str::len)),
            ValueKind::Number | ValueKind::Bool | ValueKind::None => {}
            _ => return Err(invalid("format accepts only strings and numbers")),
        }
    }
    let fields = text.matches('{').count();
    Ok(fields.saturating_mul(longest + FORMATTED_BYTES))
}

/// Returns whether a field of a format contains another field.
fn takes_width(text: &str) -> bool {
    let mut open = 0usize;
    text.replace("{{", "").replace("}}", "").chars().any(|c| {
        match c {
            '{' => open += 1,
            '}' => open = open.saturating_sub(1),
            _ => {}
        }
        open > 1
    })
}
