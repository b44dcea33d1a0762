//! The time as the database keeps it.

use jiff::Timestamp;

/// Now, in whole microseconds: what is stored reads back equal.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// How long it is until `at`; zero where it has passed.
pub fn until(at: Timestamp) -> std::time::Duration {
    at.duration_since(Timestamp::now())
        .try_into()
        .unwrap_or_default()
}
