//! The end of a worker's log.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// How much of a log is looked at, however few lines that turns out to be.
const MAX_BYTES: u64 = 1 << 20;

/// The last `lines` lines of the file; none if there is no such file. A line that lies only partly within the last
/// mebibyte is left out, unless it is all there is.
pub fn log_tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    log_tail_from(path, 0, lines)
}

/// As [`log_tail`], of what stands behind the first `start` bytes.
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
