//! Python's methods of texts and dictionaries, which chat templates call, paid for with fuel.
//!
//! The template engine charges a method for what it returns, once it exists. A replacement can make gigabytes out of two short
//! texts and a repeated list can be walked for ever before that, so what a method is about to do is charged here first.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one fuel pays for, as in the template engine.
pub(super) const BYTES_PER_FUEL: usize = 64;
/// Bytes of a list's element.
const SLOT_BYTES: usize = 32;

/// Calls a method that the engine itself does not have.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => {}
        ValueKind::Map => return unknown_method_callback(state, value, method, args),
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    }
    let Some(text) = value.as_str() else {
        return Err(Error::from(ErrorKind::UnknownMethod));
    };
    let arg = |index: usize| args.get(index).and_then(Value::as_str);
    let bytes = match method {
        // The engine's own filter does the same and pays as it goes.
        "join" => {
            let values = args.first().cloned().unwrap_or_default();
            return state.apply_filter("join", &[values, value.clone()]);
        }
        // A width is a number in the text, so there is no telling what it makes.
        "format" => return Err(Error::from(ErrorKind::UnknownMethod)),
        "replace" => {
            let (old, new) = (arg(0).unwrap_or_default(), arg(1).unwrap_or_default());
            let all = text.matches(old).count();
            let limit = args.get(2).and_then(Value::as_usize).unwrap_or(all);
            all.min(limit).saturating_mul(new.len())
        }
        "split" => {
            let parts = match arg(0) {
                Some(separator) => text.matches(separator).count(),
                None => text.split_whitespace().count(),
            };
            parts.saturating_mul(SLOT_BYTES)
        }
        "splitlines" => text.lines().count().saturating_mul(SLOT_BYTES),
        // Each character may be compared with each of those to take away.
        "strip" | "lstrip" | "rstrip" => {
            let set = arg(0).unwrap_or_default();
            text.len().saturating_add(4).saturating_mul(set.len())
        }
        // One text, or a list of them.
        "startswith" | "endswith" => {
            let count = args.first().and_then(Value::len).unwrap_or(0);
            count.saturating_mul(SLOT_BYTES)
        }
        _ => 0,
    };
    charge(state, bytes.saturating_add(text.len()))?;
    unknown_method_callback(state, value, method, args)
}

fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64 + 1)
}
