//! SQLite's errors in terms of the seam.

use crate::state::{Outage, OutageKind, StoreError};

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // A statement that violates the schema is a bug in this program and fails alone. Any other error is blamed on the disk.
        let broke_a_rule = error.as_database_error().is_some_and(|database| {
            database.is_unique_violation()
                || database.is_check_violation()
                || database.is_foreign_key_violation()
        });
        if broke_a_rule
            || matches!(
                error,
                sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_)
            )
        {
            Self::corrupt(error)
        } else {
            unavailable(&error)
        }
    }
}

/// Returns the error for a store that can't be used because of `error`.
pub(super) fn unavailable(error: &sqlx::Error) -> StoreError {
    StoreError::Unavailable(Outage {
        kind: kind(error),
        message: error.to_string(),
    })
}

fn kind(error: &sqlx::Error) -> OutageKind {
    const BUSY: i32 = 5;
    const NOMEM: i32 = 7;
    const CORRUPT: i32 = 11;
    const NOT_A_DATABASE: i32 = 26;
    const IOERR_FSYNC: i32 = 1034;
    const IOERR_DIR_FSYNC: i32 = 1290;
    let code = error.as_database_error().and_then(|error| error.code());
    let Some(code) = code.and_then(|code| code.parse::<i32>().ok()) else {
        return OutageKind::Other;
    };
    // The low byte of an extended result code is the primary one.
    match (code, code & 0xff) {
        (IOERR_FSYNC | IOERR_DIR_FSYNC, _) => OutageKind::SyncFailed,
        (_, BUSY) => OutageKind::Locked,
        (_, NOMEM) => OutageKind::OutOfMemory,
        (_, CORRUPT | NOT_A_DATABASE) => OutageKind::Damaged,
        _ => OutageKind::Other,
    }
}

/// Maps an error to its meaning while the database is being opened. This process does not use the file yet, so a lock is
/// another process's, and a retry would not help.
pub(super) fn while_opening(error: StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(outage) => match outage.kind {
            OutageKind::Locked => StoreError::Locked,
            OutageKind::Damaged => StoreError::Damaged(outage.message),
            _ => StoreError::Unavailable(outage),
        },
        error => error,
    }
}
