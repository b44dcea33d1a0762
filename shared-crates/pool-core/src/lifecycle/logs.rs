//! The last lines of a worker's log.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// Maximum number of bytes read from the end of a log, even if they hold fewer lines than requested.
const MAX_BYTES: u64 = 1 << 20;

/// Returns the last `lines` lines of the file, or none if there is no file. Omits a line that begins before the last mebibyte,
/// unless it is the only one.
pub fn log_tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    log_tail_from(path, 0, lines)
}

/// Returns the last lines like [`log_tail`], but only from the part after the first `start` bytes.
pub(super) fn log_tail_from(path: &Path, start: u64, lines: usize) -> io::Result<Vec<String>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let skipped = file
        .metadata()?
        .len()
        .saturating_sub(start)
        .saturating_sub(MAX_BYTES);
    file.seek(SeekFrom::Start(start + skipped))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole = match text.split_once('\n') {
        Some((_, rest)) if skipped > 0 && !rest.is_empty() => rest,
        _ => &text,
    };
    let all: Vec<&str> = whole.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_short_and_very_long_logs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(log_tail(&path, 3).unwrap(), Vec::<String>::new());
        std::fs::write(&path, b"one\ntwo\n\xff three").unwrap();
        assert_eq!(log_tail(&path, 2).unwrap(), ["two", "\u{fffd} three"]);
        assert_eq!(log_tail(&path, 9).unwrap().len(), 3);
        let long = format!("cut {}\nlast\n", "x".repeat(2 << 20));
        std::fs::write(&path, long).unwrap();
        assert_eq!(log_tail(&path, 5).unwrap(), ["last"]);
    }
}
