//! Settings with a unit: a key whose name ends in a unit accepts text such as `"30s"` or `"4 GiB"` for its number.

use serde_json::Value;

use crate::kit::units::{parse_bytes, parse_ms, parse_seconds};

/// Returns a setting's value, with text converted to a number if the key's name ends in a unit.
pub(super) fn number(key: &str, value: Value) -> Result<Value, String> {
    let Value::String(text) = &value else {
        return Ok(value);
    };
    let read = match key.rsplit_once('_') {
        Some((_, "bytes")) => parse_bytes(text),
        Some((_, "ms")) if text.bytes().all(|byte| byte.is_ascii_digit()) => return whole(text),
        Some((_, "ms")) => parse_ms(text),
        Some((_, "s")) => parse_seconds(text),
        _ => return Ok(value),
    };
    match read {
        Ok(number) => Ok(number.into()),
        // Leave negative and too large numbers to the setting's own type: its error states the accepted range.
        Err(_) if text.parse::<i128>().is_ok() => whole(text),
        Err(reason) => Err(format!("`{text}`: {reason}")),
    }
}

/// Parses a bare number in the key's own unit.
fn whole(text: &str) -> Result<Value, String> {
    let number = text.parse::<i128>().ok();
    let number = number.and_then(serde_json::Number::from_i128);
    Ok(number.map_or_else(|| Value::String(text.to_owned()), Value::Number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test] // [POOLCORE-129]
    fn a_key_that_ends_in_a_unit_takes_texts_with_one() {
        for (key, value, expected) in [
            (
                "memory.cpu_limit_bytes",
                json!("4 GiB"),
                json!(4_294_967_296u64),
            ),
            ("memory.cpu_limit_bytes", json!("65536"), json!(65_536)),
            ("workers.stop_timeout_s", json!("2m"), json!(120)),
            ("workers.stop_timeout_s", json!("90"), json!(90)),
            ("workers.stop_timeout_s", json!("-1"), json!(-1)),
            ("heartbeat_interval_ms", json!("15s"), json!(15_000)),
            // A bare number is in the key's unit.
            ("heartbeat_interval_ms", json!("15000"), json!(15_000)),
            ("heartbeat_interval_ms", json!(15_000), json!(15_000)),
            ("workers.threads", json!("4"), json!("4")),
            ("models.dir", json!("/s"), json!("/s")),
        ] {
            assert_eq!(number(key, value.clone()), Ok(expected), "{key} {value}");
        }
        for (key, text) in [
            ("a_bytes", "much"),
            ("a_s", "soon"),
            ("a_s", "0.5"),
            ("a_ms", "soon"),
        ] {
            assert!(number(key, json!(text)).is_err(), "{key} {text}");
        }
    }
}
