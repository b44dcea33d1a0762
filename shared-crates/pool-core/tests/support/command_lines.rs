//! Check that commands in messages and docs exist.
//!
//! A hint that names a missing command helps no reader. This module finds every mention of a program in the sources of
//! all crates and in the README, and follows the mention's subcommands and options.

// A panic in a helper fails the test.
#![allow(clippy::unwrap_used, dead_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// A mention of a program, with its place.
#[derive(Debug)]
pub struct Mention {
    pub place: String,
    /// Words after the program's name.
    pub words: Vec<String>,
}

/// Returns every mention of `program` in the workspace.
pub fn mentions(program: &str) -> Vec<Mention> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut files = vec![root.join("README.md")];
    for crates in ["bin", "shared-crates"] {
        for entry in fs::read_dir(root.join(crates)).unwrap() {
            sources(&entry.unwrap().path().join("src"), &mut files);
        }
    }
    let mut found = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            // Test modules are at the end of their files.
            if line == "#[cfg(test)]" {
                break;
            }
            let place = format!(
                "{}:{}",
                file.strip_prefix(&root).unwrap().display(),
                number + 1
            );
            found.extend(in_line(line, program).map(|words| Mention {
                place: place.clone(),
                words,
            }));
        }
    }
    found
}

fn sources(dir: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            sources(&path, files);
        } else if name.ends_with(".rs") && !name.contains("tests") {
            files.push(path);
        }
    }
}

/// Returns the words of each mention in a line, up to the end of its quotation.
fn in_line<'a>(line: &'a str, program: &'a str) -> impl Iterator<Item = Vec<String>> + 'a {
    line.match_indices(program).filter_map(move |(at, _)| {
        let before = line[..at].chars().next_back();
        let rest = line[at + program.len()..].strip_prefix(' ')?;
        let quoted = match before {
            Some('`') => rest.split('`').next()?,
            // A text may begin with the name without being a command: `program: ...`.
            Some('"') => rest.split('"').next().filter(|text| !text.contains(": "))?,
            // A line of console output, or of an example.
            Some(' ') if matches!(line[..at].trim(), "" | "$" | "///" | "note(\"") => {
                rest.split('"').next()?
            }
            _ if line[..at].ends_with(": ") || line[..at].ends_with("; ") => {
                rest.split(['"', ';', ',']).next()?
            }
            _ => return None,
        };
        let quoted = quoted
            .split("  ")
            .next()?
            .split(" #")
            .next()?
            .split(';')
            .next()?;
        let words: Vec<String> = quoted.split_whitespace().map(str::to_owned).collect();
        let is_command = words.first()?.chars().all(|c| c.is_ascii_lowercase());
        is_command.then_some(words)
    })
}

/// Follows the subcommands and options of a mention; fails with the missing one.
pub fn check(command: &clap::Command, mention: &Mention) -> Result<(), String> {
    let mut command = command;
    let mut path = Vec::new();
    let mut words = mention.words.iter().peekable();
    while command.has_subcommands() {
        let Some(word) = words.peek() else { break };
        if word.starts_with('{') {
            // A format string inserts a value here.
            return Ok(());
        }
        let alternatives: Vec<&str> = word.split('|').collect();
        let Some(inner) = command.find_subcommand(alternatives[0]) else {
            return Err(format!("there is no `{word}` in `{}`", path.join(" ")));
        };
        path.push(inner.get_name().to_owned());
        command = inner;
        words.next();
    }
    for word in words {
        let Some(name) = word.strip_prefix("--") else {
            continue;
        };
        let name = name.split('=').next().unwrap_or(name);
        let name = name.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let known = |argument: &clap::Arg| {
            let mut names = argument.get_long_and_visible_aliases().unwrap_or_default();
            names.retain(|known| *known == name);
            !names.is_empty()
        };
        if !name.is_empty() && name != "help" && !command.get_arguments().any(known) {
            return Err(format!("`{}` has no `--{name}`", path.join(" ")));
        }
    }
    Ok(())
}

/// Fails with every mention of `program` that its command line does not know.
pub fn every_mention_can_be_run(program: &str, mut command: clap::Command, least: usize) {
    command.build();
    let mentions = mentions(program);
    assert!(
        mentions.len() >= least,
        "only {} mentions were found",
        mentions.len()
    );
    let wrong: Vec<String> = mentions
        .iter()
        .filter_map(|mention| {
            let problem = check(&command, mention).err()?;
            Some(format!(
                "{}: {program} {}: {problem}",
                mention.place,
                mention.words.join(" ")
            ))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Ensure that the check itself detects wrong mentions.
    for line in ["models fetch x", "jobs liste", "status --no-such-option"] {
        let words = line.split(' ').map(str::to_owned).collect();
        let place = String::new();
        assert!(
            check(&command, &Mention { place, words }).is_err(),
            "{line}"
        );
    }
}
