//! A common notation for durations, sizes and counts, in every program's output, options and settings.

use std::time::Duration;

use jiff::SignedDuration;

const BYTE_UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Formats bytes in human-readable form, rounded to the nearest: `93.8 MiB`, `324 MiB`, `1.5 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    show_bytes(bytes, f64::round)
}

/// Formats bytes like [`human_bytes`], rounded up: for a requirement, next to an available amount from [`human_bytes_down`].
pub fn human_bytes_up(bytes: u64) -> String {
    show_bytes(bytes, f64::ceil)
}

/// Formats bytes like [`human_bytes`], rounded down.
pub fn human_bytes_down(bytes: u64) -> String {
    show_bytes(bytes, f64::floor)
}

#[allow(clippy::cast_precision_loss)] // At most four digits are shown.
fn show_bytes(bytes: u64, round: fn(f64) -> f64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    let shown = |value: f64| {
        // Three or four digits are enough for a comparison.
        let scale = if value < 100.0 { 10.0 } else { 1.0 };
        round(value * scale) / scale
    };
    while unit + 1 < BYTE_UNITS.len() && shown(value) >= 1024.0 {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", shown(value), BYTE_UNITS[unit])
}

/// Formats a duration in its two largest units: `850ms`, `3.2s`, `1m15s`, `2h05m`, `3d04h`. Omits a second unit of zero: `2s`,
/// `30s`, `10m`.
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let pair = |large: u64, unit: char, small: u64, rest: char| match small {
        0 => format!("{large}{unit}"),
        small => format!("{large}{unit}{small:02}{rest}"),
    };
    match seconds {
        0 if duration.is_zero() => "0s".to_owned(),
        0 => format!("{}ms", duration.as_millis()),
        1..=9 => match duration.subsec_millis() / 100 {
            0 => format!("{seconds}s"),
            tenths => format!("{seconds}.{tenths}s"),
        },
        10..=59 => format!("{seconds}s"),
        60..=3599 => pair(seconds / 60, 'm', seconds % 60, 's'),
        3600..=86_399 => pair(seconds / 3600, 'h', seconds / 60 % 60, 'm'),
        _ => pair(seconds / 86_400, 'd', seconds / 3600 % 24, 'h'),
    }
}

/// Formats milliseconds like [`human_duration`].
pub fn human_ms(ms: u64) -> String {
    human_duration(Duration::from_millis(ms))
}

/// Formats seconds like [`human_duration`]; a negative number counts as 0.
pub fn human_seconds(seconds: i64) -> String {
    human_duration(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Formats a number with separated thousands: `1,234`.
pub fn human_count(count: u64) -> String {
    let digits = count.to_string();
    let mut shown = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// Parses a duration as formatted by [`human_duration`]: `90s`, `5m`, `1h30m`, `250ms`, `7d`, or a number of seconds. For
/// clap's `value_parser`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    read_duration(text).ok_or_else(|| "write it like `90s`, `5m`, `1h30m` or `7d`".to_owned())
}

fn read_duration(text: &str) -> Option<Duration> {
    if text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Duration::try_from_secs_f64(text.parse().ok()?).ok();
    }
    // The library has no unit for days, because calendar days differ in length; here a day has 24 hours.
    let (days, rest) = match text.split_once('d') {
        Some((days, rest)) if days.bytes().all(|byte| byte.is_ascii_digit()) => {
            (days.parse().ok()?, rest)
        }
        _ => (0u64, text),
    };
    let rest = match rest {
        "" if text.is_empty() => return None,
        "" => Duration::ZERO,
        rest => Duration::try_from(rest.parse::<SignedDuration>().ok()?).ok()?,
    };
    Duration::from_secs(days.checked_mul(86_400)?).checked_add(rest)
}

/// Parses a duration of whole milliseconds. For clap's `value_parser`.
pub fn parse_ms(text: &str) -> Result<u64, String> {
    let ms = parse_duration(text)?.as_millis();
    u64::try_from(ms).map_err(|_| "it is too long".to_owned())
}

/// Parses a duration of whole seconds.
pub fn parse_seconds(text: &str) -> Result<u64, String> {
    let duration = parse_duration(text)?;
    if duration.subsec_nanos() == 0 {
        Ok(duration.as_secs())
    } else {
        Err("it must be a whole number of seconds".to_owned())
    }
}

/// Parses a size as formatted by [`human_bytes`]: `324 MiB`, `1.5GiB`, `500 MB`, or a number of bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    read_bytes(text).ok_or_else(|| "write it like `512 MiB`, `1.5 GiB` or `500 MB`".to_owned())
}

fn read_bytes(text: &str) -> Option<u64> {
    let end = text
        .bytes()
        .position(|byte| !(byte.is_ascii_digit() || byte == b'.'))
        .unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim_start().to_ascii_lowercase());
    let factor: u64 = match unit.as_str() {
        "" | "b" => return number.parse().ok(),
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "p" | "pi" | "pib" => 1 << 50,
        "e" | "ei" | "eib" => 1 << 60,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor);
    }
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    number
        .parse::<f64>()
        .ok()
        .map(|value| (value * factor as f64).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-126]
    fn spans_are_read_as_people_write_them_and_as_they_are_shown() {
        for (text, ms) in [
            ("60", 60_000),
            ("0.5", 500),
            ("90s", 90_000),
            ("250ms", 250),
            ("1.5s", 1_500),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("7d", 604_800_000),
            ("0", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in [
            "",
            ".",
            "-5s",
            "soon",
            "5 parsecs",
            "d",
            "1.5d",
            "99999999999999999999d",
            "1e300",
            "NaN",
            "inf",
            "-1",
            "1s2",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        for ms in [
            0,
            1,
            850,
            2_000,
            3_200,
            59_000,
            60_000,
            75_000,
            3_600_000,
            7_500_000,
            86_400_000,
            273_600_000,
        ] {
            assert_eq!(parse_ms(&human_ms(ms)), Ok(ms), "{}", human_ms(ms));
        }
        assert_eq!(
            (parse_seconds("2m"), parse_seconds("0.5").is_err()),
            (Ok(120), true)
        );
    }

    #[test] // [POOLCORE-126]
    fn durations_are_short() {
        let durations = [
            0,
            850,
            2_050,
            3_250,
            30_000,
            59_900,
            75_000,
            600_000,
            7_500_000,
            273_600_000,
        ]
        .map(human_ms);
        assert_eq!(
            durations,
            [
                "0s", "850ms", "2s", "3.2s", "30s", "59s", "1m15s", "10m", "2h05m", "3d04h"
            ]
        );
    }

    #[test] // [POOLCORE-127]
    fn sizes_are_short_and_are_read_as_they_are_shown() {
        let sizes = [
            0,
            1_023,
            1_024,
            98_362_432,
            339_738_624,
            1_048_575,
            1_610_612_736,
            u64::MAX,
        ]
        .map(human_bytes);
        assert_eq!(
            sizes,
            [
                "0 B", "1023 B", "1 KiB", "93.8 MiB", "324 MiB", "1 MiB", "1.5 GiB", "16 EiB"
            ]
        );
        assert_eq!(
            (human_bytes_up(104_857_601), human_bytes_down(104_857_599)),
            ("101 MiB".into(), "99.9 MiB".into())
        );
        for (text, bytes) in [
            ("0", 0),
            ("98362432", 98_362_432),
            ("324 MiB", 339_738_624),
            ("324MiB", 339_738_624),
            ("1.5 GiB", 1_610_612_736),
            ("512m", 536_870_912),
            ("4g", 4_294_967_296),
            ("98.4 MB", 98_400_000),
            ("1 B", 1),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "MiB", "-1", "1.5", "1 mile", "20 EiB", "1..5 GiB", "inf",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn counts_have_their_thousands_apart() {
        let counts = [0, 999, 1_000, 12_345_678].map(human_count);
        assert_eq!(counts, ["0", "999", "1,000", "12,345,678"]);
    }
}
