//! Filters and tests that Python's Jinja and the template engine define differently.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, State, escape_formatter};

use super::json;
use super::methods::charge;

/// Adds the filters and tests to an environment.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("wordcount", wordcount);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_test("callable", is_callable);
    environment.set_formatter(|output, state, value| match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            output.write_str(&json::number(value)).map_err(Error::from)
        }
        _ => escape_formatter(output, state, value),
    });
}

/// Returns whether a value is a sequence. In Python, every value with a length and an index is a sequence, including texts and
/// mappings.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined | ValueKind::String | ValueKind::Map | ValueKind::Seq
    )
}

/// Returns whether a value is iterable. In Python, `none` isn't.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn is_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain && value.as_object().is_some()
}

fn wordcount(state: &State, text: &str) -> Result<usize, Error> {
    charge(state, text.len())?;
    Ok(text.split_whitespace().count())
}

/// Converts a value to an integer. A value that isn't a number becomes the default, or 0.
fn int(value: &Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default_of(default, &kwargs, Value::from(0))?;
    if value.is_integer() {
        return Ok(value.clone());
    }
    let text = value.as_str().map(str::trim);
    if let Some(Ok(number)) = text.map(str::parse::<i64>) {
        return Ok(number.into());
    }
    Ok(match number_of(value) {
        #[allow(clippy::cast_possible_truncation)]
        // As in Python, except for numbers beyond 64 bits, which no template has.
        Some(number) if number.is_finite() => Value::from(number.trunc() as i64),
        _ => default,
    })
}

fn float(value: &Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default_of(default, &kwargs, Value::from(0.0))?;
    Ok(number_of(value).map_or(default, Value::from))
}

fn default_of(given: Option<Value>, kwargs: &Kwargs, otherwise: Value) -> Result<Value, Error> {
    let named = kwargs.get::<Option<Value>>("default")?;
    kwargs.assert_all_used()?;
    Ok(given.or(named).unwrap_or(otherwise))
}

fn number_of(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    }
}
