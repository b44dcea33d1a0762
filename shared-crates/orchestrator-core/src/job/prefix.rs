//! Prefixes of job ids, as typed by people.

use std::fmt;
use std::str::FromStr;

use super::JobId;

/// Digits of the shortest prefix offered. They contain the full timestamp of a version 7 UUID, so only jobs of the same
/// millisecond need more digits, and a later job never makes a prefix ambiguous.
const SHORTEST_DIGITS: usize = 12;
/// Number of digits before each hyphen of a UUID.
const GROUP_ENDS: [usize; 4] = [8, 12, 16, 20];
/// Number of digits in a UUID.
const DIGITS: usize = 32;

/// A prefix of a job id, spelled like the full id: `job-019abcde-f0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobIdPrefix(String);

/// Error for a text that no job id begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "neither a job id nor the start of one: ids are `job-` and a UUID, as shown by `llorch jobs list`"
)]
pub struct JobIdPrefixError;

impl JobIdPrefix {
    /// Returns the id if the prefix is a full id.
    pub fn whole(&self) -> Option<JobId> {
        self.0.parse().ok()
    }

    /// Returns the prefix as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns a text that sorts after every id with the prefix and before every later id.
    pub fn end(&self) -> String {
        // Digits of an id are at most `f`, and a hyphen sorts before all of them.
        format!("{}g", self.0)
    }
}

impl fmt::Display for JobIdPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for JobIdPrefix {
    type Err = JobIdPrefixError;

    /// Parses a prefix, with or without `job-`, hyphens and capitals, so that any copied id is accepted.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim().to_ascii_lowercase();
        let digits = text.strip_prefix("job-").unwrap_or(&text);
        let mut prefix = "job-".to_owned();
        let mut count = 0;
        for digit in digits.chars().filter(|digit| *digit != '-') {
            if !digit.is_ascii_hexdigit() || count == DIGITS {
                return Err(JobIdPrefixError);
            }
            if GROUP_ENDS.contains(&count) {
                prefix.push('-');
            }
            prefix.push(digit);
            count += 1;
        }
        if count == 0 {
            return Err(JobIdPrefixError);
        }
        Ok(Self(prefix))
    }
}

impl JobId {
    /// Returns the shortest prefix of the id, with at least 12 digits and without `job-`, that no neighbour in the
    /// order of ids shares.
    pub fn shortest_prefix(self, neighbours: impl IntoIterator<Item = Self>) -> String {
        let id = self.to_string();
        let shared = neighbours.into_iter().map(|neighbour| {
            let neighbour = neighbour.to_string();
            let same = id.bytes().zip(neighbour.bytes());
            same.take_while(|(ours, theirs)| ours == theirs).count() + 1
        });
        let shortest = "job-".len() + SHORTEST_DIGITS + 1;
        let mut length = shared.max().unwrap_or(0).max(shortest).min(id.len());
        // A hyphen at the end carries no information.
        if id.as_bytes()[length - 1] == b'-' {
            length += 1;
        }
        id["job-".len()..length].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "job-019abcde-f012-7345-8678-9abcdef01234";

    // [ORCHCORE-004]
    #[test]
    fn a_prefix_is_read_however_it_is_written() {
        let prefix = |text: &str| text.parse::<JobIdPrefix>().map(|prefix| prefix.0);
        for text in [
            "job-019abcde-f0",
            "019abcde-f0",
            "019abcdef0",
            "JOB-019ABCDE-F0",
            " 019abcde-f0 ",
        ] {
            assert_eq!(prefix(text), Ok("job-019abcde-f0".into()), "{text}");
        }
        assert_eq!(prefix("019abcde-"), Ok("job-019abcde".into()));
        assert_eq!(prefix("0"), Ok("job-0".into()));
        for text in [
            "",
            "job-",
            "-",
            "worker-cpu-0",
            "019g",
            "../etc",
            &format!("{ID}0"),
        ] {
            assert_eq!(prefix(text), Err(JobIdPrefixError), "{text}");
        }
        let whole: JobIdPrefix = ID.parse().unwrap();
        assert_eq!(whole.whole(), Some(ID.parse().unwrap()));
        assert_eq!("019a".parse::<JobIdPrefix>().unwrap().whole(), None);
    }

    // [ORCHCORE-004]
    #[test]
    fn the_range_of_a_prefix_holds_what_begins_with_it() {
        for length in "job-0".len()..=ID.len() {
            let prefix: JobIdPrefix = ID[..length].parse().unwrap();
            assert!(
                prefix.as_str() <= ID && ID < prefix.end().as_str(),
                "{prefix}"
            );
        }
        let prefix: JobIdPrefix = "019abcde".parse().unwrap();
        let holds = |id: &str| prefix.as_str() <= id && id < prefix.end().as_str();
        assert!(!holds("job-019abcdd-ffff-7fff-8fff-ffffffffffff"));
        assert!(!holds("job-019abcdf-0000-7000-8000-000000000000"));
    }

    // [ORCHCORE-004]
    #[test]
    fn an_id_is_as_short_as_its_neighbours_allow() {
        let id: JobId = ID.parse().unwrap();
        let with =
            |others: &[&str]| id.shortest_prefix(others.iter().map(|id| id.parse().unwrap()));
        assert_eq!(with(&[]), "019abcde-f012");
        assert_eq!(
            with(&["job-019abcde-e012-7345-8678-9abcdef01234"]),
            "019abcde-f012"
        );
        assert_eq!(
            with(&["job-019abcde-f012-7345-8678-9abcdef01299"]),
            "019abcde-f012-7345-8678-9abcdef012".to_owned() + "3"
        );
        assert_eq!(
            with(&["job-019abcde-f012-6345-8678-9abcdef01299"]),
            "019abcde-f012-7"
        );
        assert_eq!(
            with(&[
                "job-019abcde-f012-7344-8678-9abcdef01299",
                "job-019abcde-f012-7346-8678-9abcdef01299"
            ]),
            "019abcde-f012-7345"
        );
    }
}
