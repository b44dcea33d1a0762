//! Spans of time on the command line.

use std::time::Duration;

use jiff::SignedDuration;

/// A span of time as people write it: `90s`, `5m`, `1h30m`, `250ms`, or a number of seconds. For clap's `value_parser`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().map(Duration::from_secs);
    let written = || {
        let signed: SignedDuration = text.parse().ok()?;
        Duration::try_from(signed).ok()
    };
    seconds
        .or_else(written)
        .ok_or_else(|| "write it like `90s`, `5m` or `1h30m`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-126]
    fn spans_are_read_as_people_write_them() {
        for (text, ms) in [
            ("60", 60_000),
            ("90s", 90_000),
            ("250ms", 250),
            ("1h30m", 5_400_000),
            ("0", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in ["", "-5s", "soon", "5 parsecs", "1d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
