//! Integers that every JSON reader preserves. Many readers (JavaScript, `jq` 1.6) store numbers as 64-bit floats, which
//! round integers of more than 53 bits.

/// The largest integer that a 64-bit float and both its neighbours represent exactly: 2^53 - 1.
pub const MAX_EXACT_INTEGER: u64 = (1 << 53) - 1;

/// A `u64` of more than 53 bits, written as a decimal string. A plain number is accepted too: earlier versions wrote
/// numbers.
#[derive(Debug)]
pub struct Decimal;

/// Reads and writes a field as a [`Decimal`]: `#[serde(with = "json_number::decimal")]`.
pub mod decimal {
    use std::fmt;

    use serde::de::{self, Deserializer, Unexpected, Visitor};
    use serde::ser::Serializer;

    use super::Decimal;

    /// Writes `number` as a decimal string.
    pub fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    /// Reads a decimal string or a plain number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_any(Decimal)
    }

    impl Visitor<'_> for Decimal {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an integer from 0 to 2^64 - 1, as a string of decimal digits")
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<u64, E> {
            Ok(number)
        }

        // JSON has only one kind of number: `1.0` is the integer 1.
        fn visit_f64<E: de::Error>(self, number: f64) -> Result<u64, E> {
            const ABOVE_U64: f64 = 18_446_744_073_709_551_616.0;
            if (0.0..ABOVE_U64).contains(&number) && number.fract() == 0.0 {
                // Within these bounds, a float without a fraction converts exactly.
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                return Ok(number as u64);
            }
            Err(E::invalid_value(Unexpected::Float(number), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.then(|| text.parse().ok()).flatten();
            number.ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Record {
        #[serde(with = "super::decimal")]
        at: u64,
    }

    // [POOLCORE-006]
    #[test]
    fn a_large_integer_is_written_as_text_and_read_from_either_form() {
        let record = Record { at: u64::MAX };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(json, r#"{"at":"18446744073709551615"}"#);
        for json in [&json, r#"{"at":18446744073709551615}"#] {
            assert_eq!(serde_json::from_str::<Record>(json).unwrap(), record);
        }
        for wrong in [
            "\"\"",
            "\"+1\"",
            "\"18446744073709551616\"",
            "-1",
            "1.5",
            "null",
        ] {
            let json = format!(r#"{{"at":{wrong}}}"#);
            assert!(serde_json::from_str::<Record>(&json).is_err(), "{wrong}");
        }
    }
}
