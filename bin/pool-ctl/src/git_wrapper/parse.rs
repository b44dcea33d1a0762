//! Parsers of git's machine-readable output. Pure: bytes in, values out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use pool_core::kit::terminal::doctor::host;
use serde::Serialize;

/// Contents of `git status --porcelain=v2 --branch -z`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Commit that is checked out; `None` on a branch without commits.
    pub commit: Option<String>,
    /// Current branch; `None` with a detached HEAD.
    pub branch: Option<String>,
    /// Remote branch that the current branch follows; `None` if it follows none.
    pub upstream: Option<String>,
    /// Numbers of commits that only the branch has, and that only its upstream has; `None` if one of the two is missing.
    pub ahead_behind: Option<(u64, u64)>,
    /// Files that differ from the commit.
    pub changes: Changes,
}

/// Files that differ from the commit, by kind of difference. Names are those in the checkout, with `�` for bytes that are not
/// UTF-8.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// Files put into the index, as by `git add`.
    pub staged: Vec<String>,
    /// Files changed, removed or turned into another type in the working tree.
    pub modified: Vec<String>,
    /// Files left in conflict by a merge.
    pub conflicted: Vec<String>,
    /// Files unknown to git and not ignored. A folder of such files is one entry that ends in `/`.
    pub untracked: Vec<String>,
}

impl Changes {
    /// Returns the changed files that git tracks, each once.
    pub fn tracked(&self) -> Vec<&str> {
        let mut files: Vec<&str> = [&self.conflicted, &self.staged, &self.modified]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

/// A submodule among the entries of a tree or index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gitlink {
    /// Path in the checkout; `None` if it is not UTF-8.
    pub path: Option<String>,
    /// Recorded commit.
    pub commit: String,
}

/// Splits the output into fields that each end with a NUL.
pub fn fields(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let whole = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    let nothing = bytes.is_empty();
    whole.split(|byte| *byte == 0).filter(move |_| !nothing)
}

/// Splits the output into fields, as text.
pub fn texts(bytes: &[u8]) -> Vec<String> {
    fields(bytes).map(text).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Parses `git status --porcelain=v2 --branch -z`. Returns `None` for any other text.
pub fn status(bytes: &[u8]) -> Option<Status> {
    let mut status = Status::default();
    let mut entries = fields(bytes);
    while let Some(entry) = entries.next() {
        let line = text(entry);
        let (kind, rest) = line.split_once(' ')?;
        match kind {
            "#" => header(&mut status, rest)?,
            "1" | "2" => {
                // XY sub mH mI mW hH hI [score] path
                let parts = if kind == "1" { 8 } else { 9 };
                let parts: Vec<&str> = rest.splitn(parts, ' ').collect();
                let (states, path) = (*parts.first()?, *parts.last()?);
                if kind == "2" {
                    // The earlier name of the file.
                    entries.next()?;
                }
                let submodule = parts.get(1)?.starts_with('S');
                let mut states = states.chars();
                if states.next()? != '.' {
                    status.changes.staged.push(path.to_owned());
                }
                // A submodule at another commit is shown among the submodules.
                if states.next()? != '.' && !submodule {
                    status.changes.modified.push(path.to_owned());
                }
            }
            "u" => {
                // XY sub m1 m2 m3 mW h1 h2 h3 path
                let path = rest.splitn(10, ' ').nth(9)?;
                status.changes.conflicted.push(path.to_owned());
            }
            "?" => status.changes.untracked.push(rest.to_owned()),
            "!" => {}
            _ => return None,
        }
    }
    Some(status)
}

fn header(status: &mut Status, line: &str) -> Option<()> {
    let (name, value) = line.split_once(' ')?;
    match name {
        "branch.oid" => status.commit = (value != "(initial)").then(|| value.to_owned()),
        "branch.head" => status.branch = (value != "(detached)").then(|| value.to_owned()),
        "branch.upstream" => status.upstream = Some(value.to_owned()),
        "branch.ab" => {
            let (ahead, behind) = value.split_once(' ')?;
            let count = |text: &str, sign| text.strip_prefix(sign)?.parse().ok();
            status.ahead_behind = Some((count(ahead, '+')?, count(behind, '-')?));
        }
        _ => {}
    }
    Some(())
}

/// Returns the submodules among the entries of `git ls-files --stage -z` or `git ls-tree -r -z`. A submodule in conflict has
/// several entries, of which the first counts.
pub fn gitlinks(bytes: &[u8]) -> Vec<Gitlink> {
    let mut links: Vec<Gitlink> = Vec::new();
    for entry in fields(bytes) {
        let Some(tab) = entry.iter().position(|byte| *byte == b'\t') else {
            continue;
        };
        let head = text(&entry[..tab]);
        let Some(rest) = head.strip_prefix("160000 ") else {
            continue;
        };
        let link = Gitlink {
            path: String::from_utf8(entry[tab + 1..].to_vec()).ok(),
            commit: rest
                .trim_start_matches("commit ")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
        };
        if links.last().is_none_or(|last| last.path != link.path) {
            links.push(link);
        }
    }
    links
}

/// Returns the files among the entries of `git ls-files -v -z` that git was told not to look at, each with its mark: `S` for
/// `--skip-worktree`, a lower-case letter for `--assume-unchanged`.
pub fn marked(bytes: &[u8]) -> impl Iterator<Item = (u8, &Path)> {
    fields(bytes).filter_map(|entry| match entry {
        [mark, b' ', name @ ..] if *mark == b'S' || mark.is_ascii_lowercase() => {
            Some((*mark, Path::new(OsStr::from_bytes(name))))
        }
        _ => None,
    })
}

/// Returns name and object id of the entries of `git ls-files --stage -z`.
pub fn staged(bytes: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    fields(bytes).filter_map(|entry| {
        let tab = entry.iter().position(|byte| *byte == b'\t')?;
        let object = entry[..tab].split(|byte| *byte == b' ').nth(1)?;
        Some((&entry[tab + 1..], object))
    })
}

/// Parses a setting, as printed by `git config --list -z`, into key and value.
pub fn setting(field: &[u8]) -> (String, String) {
    let line = text(field);
    match line.split_once('\n') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        // A variable without a value is true.
        None => (line, "true".to_owned()),
    }
}

/// A submodule as described by `.gitmodules`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Module {
    /// Name, from the middle of the settings' keys.
    pub name: String,
    /// Path in the checkout.
    pub path: String,
    /// Address to fetch from.
    pub url: Option<String>,
    /// Branch to follow.
    pub branch: Option<String>,
}

/// Returns the submodules that the settings describe, in their order. The last value of a setting counts.
pub fn modules(settings: impl IntoIterator<Item = (String, String)>) -> Vec<Module> {
    let mut modules: Vec<Module> = Vec::new();
    for (key, value) in settings {
        let Some((name, variable)) = key
            .strip_prefix("submodule.")
            .and_then(|rest| rest.rsplit_once('.'))
        else {
            continue;
        };
        let at = modules.iter().position(|module| module.name == name);
        let at = at.unwrap_or_else(|| {
            modules.push(Module {
                name: name.to_owned(),
                ..Module::default()
            });
            modules.len() - 1
        });
        match variable {
            "path" => modules[at].path = value,
            "url" => modules[at].url = Some(value),
            "branch" => modules[at].branch = Some(value),
            _ => {}
        }
    }
    modules
}

/// Returns a name chosen by others in a form for one line of a terminal. Control characters, and characters that change the
/// direction of the text, are escaped.
pub fn shown(name: &str) -> String {
    if !name.contains(is_hidden) && !name.starts_with(['"', ' ']) && !name.ends_with(' ') {
        return name.to_owned();
    }
    let mut out = String::from("\"");
    for c in name.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if is_hidden(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Returns a name chosen by others as one word of a command that the user may copy into a shell. A character that can't be
/// shown becomes `?`, so that such a word names no file.
pub fn quoted(name: &str) -> String {
    host::quoted(Path::new(&name.replace(is_hidden, "?")))
}

fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCTL-043]
    fn a_name_in_a_command_is_one_word() {
        assert_eq!(quoted("vendor/lib-1.0"), "vendor/lib-1.0");
        assert_eq!(quoted("a; rm -r $(x)"), "'a; rm -r $(x)'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted("a\u{202e}b\n"), "'a?b?'");
        assert_eq!(quoted(""), "''");
    }

    #[test] // [POOLCTL-040]
    fn a_status_is_read_field_by_field() {
        let hash = "1234567890123456789012345678901234567890";
        let text = format!(
            "# branch.oid {hash}\0# branch.head main\0# branch.upstream origin/main\0# branch.ab +1 -2\0\
             1 M. N... 100644 100644 100644 {hash} {hash} a file\0\
             1 .D N... 100644 100644 000000 {hash} {hash} gone\nline\0\
             1 .M S.M. 160000 160000 160000 {hash} {hash} sub\0\
             2 RM N... 100644 100644 100644 {hash} {hash} R100 new name\0old name\0\
             u UU N... 100644 100644 100644 100644 {hash} {hash} {hash} both sides\0\
             ? new \u{e9}\0"
        );
        let status = status(text.as_bytes()).unwrap();
        assert_eq!(status.ahead_behind, Some((1, 2)));
        assert_eq!(
            (status.branch.as_deref(), status.upstream.as_deref()),
            (Some("main"), Some("origin/main"))
        );
        let changes = status.changes;
        assert_eq!(changes.staged, ["a file", "new name"]);
        assert_eq!(changes.modified, ["gone\nline", "new name"]);
        assert_eq!(changes.conflicted, ["both sides"]);
        assert_eq!(changes.untracked, ["new \u{e9}"]);
        assert_eq!(
            changes.tracked(),
            ["a file", "both sides", "gone\nline", "new name"]
        );
    }

    #[test] // [POOLCTL-040]
    fn a_new_repository_and_a_detached_head_have_less() {
        let unborn = status(b"# branch.oid (initial)\0# branch.head main\0").unwrap();
        assert_eq!(
            (unborn.commit, unborn.branch.as_deref()),
            (None, Some("main"))
        );
        let detached = status(b"# branch.oid 12\0# branch.head (detached)\0").unwrap();
        assert_eq!(
            (detached.commit.as_deref(), detached.branch),
            (Some("12"), None)
        );
        assert_eq!(status(b""), Some(Status::default()));
        for rubbish in [
            &b"fatal: no"[..],
            b"1 M.",
            b"2 R. N... 1 2 3 4 5 R100 a",
            b"\xff\0",
        ] {
            assert_eq!(status(rubbish), None, "{rubbish:?}");
        }
    }

    #[test] // [POOLCTL-045]
    fn submodules_are_the_links_among_the_entries() {
        let links = gitlinks(b"100644 aa 0\tfile\x00160000 bb 0\tsub a\x00160000 cc 2\tx\x00160000 dd 3\tx\x00160000 ee 0\t\xff\x00");
        let found: Vec<_> = links
            .iter()
            .map(|link| (link.path.as_deref(), link.commit.as_str()))
            .collect();
        assert_eq!(
            found,
            [(Some("sub a"), "bb"), (Some("x"), "cc"), (None, "ee")]
        );
    }

    #[test] // [POOLCTL-045]
    fn a_submodule_is_what_its_settings_say() {
        let list = b"submodule.a.b.path\nlib\0submodule.a.b.url\nhttps://x/a\0core.bare\nfalse\0submodule.a.b.url\n../a\0submodule.c.active\0";
        let found = modules(fields(list).map(setting));
        assert_eq!(found.len(), 2);
        assert_eq!(
            (
                found[0].name.as_str(),
                found[0].path.as_str(),
                found[0].url.as_deref()
            ),
            ("a.b", "lib", Some("../a"))
        );
    }

    #[test] // [POOLCTL-043]
    fn names_stay_on_their_line() {
        assert_eq!(shown("plain name-é.rs"), "plain name-é.rs");
        assert_eq!(shown("a\nb\x1b[2J"), r#""a\nb\u{1b}[2J""#);
        assert_eq!(shown("a\"\u{202e}b"), r#""a\"\u{202e}b""#);
        assert_eq!(shown(" a"), "\" a\"");
    }
}
