//! A file of tasks.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::Priority;
use pool_core::kit::hex::hex;
use pool_core::kit::terminal::{CliError, Exit, sanitize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

/// Size limit of a line: the orchestrator accepts request bodies of up to 4 MiB.
const MOST_LINE_BYTES: u64 = 4 << 20;
/// Most faulty lines that one error lists.
const SHOWN_FAULTS: usize = 5;

/// Values for fields that a line leaves out.
pub struct Defaults {
    /// Model; `None` if every line must name its own.
    pub model: Option<String>,
    /// Priority of the jobs.
    pub priority: Priority,
    /// Name of the run, which is part of every idempotency key.
    pub run: String,
}

/// A task of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Line number, from 1.
    pub line: usize,
    /// Idempotency key: the same for equal lines of a run, wherever a line is in the file.
    pub key: String,
    /// Request to submit, with the defaults filled in.
    pub request: TaskSubmitRequest,
}

/// Reads a whole file and checks every line before anything is sent.
pub fn read(path: &Path, defaults: &Defaults) -> Result<Vec<Task>, CliError> {
    if path == Path::new("-") {
        return parse(io::stdin().lock(), "standard input", defaults);
    }
    let name = path.display().to_string();
    let file = File::open(path)
        .map_err(|error| CliError::caused(Exit::Usage, format!("could not read {name}"), &error))?;
    parse(BufReader::new(file), &name, defaults)
}

fn parse(mut source: impl BufRead, name: &str, defaults: &Defaults) -> Result<Vec<Task>, CliError> {
    let (mut tasks, mut faults, mut fault_count) = (Vec::new(), Vec::new(), 0);
    // Number of earlier occurrences of each request: equal lines are separate jobs.
    let mut seen: HashMap<String, u64> = HashMap::new();
    let mut line = 0;
    loop {
        let mut bytes = Vec::new();
        line += 1;
        let read = source
            .by_ref()
            .take(MOST_LINE_BYTES + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(|error| {
                CliError::caused(Exit::Usage, format!("could not read {name}"), &error)
            })?;
        if read == 0 {
            break;
        }
        if bytes.len() as u64 > MOST_LINE_BYTES {
            return Err(CliError::new(
                Exit::Usage,
                format!("line {line} of {name} exceeds the limit of 4 MiB for a request"),
            )
            .hint("each line is one task"));
        }
        // Some editors start a file with a byte order mark.
        let text = match line {
            1 => bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes),
            _ => &bytes,
        };
        if text.trim_ascii().is_empty() {
            continue;
        }
        match task(text, defaults) {
            Ok(request) => {
                let text = serde_json::to_string(&request).map_err(io::Error::from)?;
                let count = seen.entry(text.clone()).or_default();
                let key = key(&defaults.run, &text, *count);
                *count += 1;
                tasks.push(Task { line, key, request });
            }
            Err(fault) => {
                fault_count += 1;
                if faults.len() < SHOWN_FAULTS {
                    faults.push(format!("line {line}: {}", sanitize::clean(&fault)));
                }
            }
        }
    }
    if fault_count > 0 {
        let what = if fault_count == 1 {
            "1 line is not a valid task".to_owned()
        } else {
            format!("{fault_count} lines are not valid tasks")
        };
        let error = CliError::new(
            Exit::Usage,
            format!("{name}: {what}; nothing was submitted"),
        );
        let error = faults.into_iter().fold(error, CliError::cause);
        return Err(error
            .hint(r#"a task is an object such as {"model": "smollm2-135m", "prompt": "Hello"}"#));
    }
    if tasks.is_empty() {
        return Err(CliError::new(Exit::Usage, format!("{name} has no tasks")));
    }
    Ok(tasks)
}

fn task(line: &[u8], defaults: &Defaults) -> Result<TaskSubmitRequest, String> {
    let mut fields: Map<String, Value> =
        serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if let Some(model) = &defaults.model {
        fields
            .entry("model")
            .or_insert_with(|| model.clone().into());
    } else if !fields.contains_key("model") {
        return Err("`model` is missing, and --model is not given".to_owned());
    }
    fields
        .entry("priority")
        .or_insert_with(|| defaults.priority.as_str().into());
    let request: TaskSubmitRequest =
        serde_json::from_value(fields.into()).map_err(|error| error.to_string())?;
    // The orchestrator makes the same check.
    match request.clone().validate() {
        Ok(_) => Ok(request),
        Err(error) => Err(format!("{error}; {}", error.hint)),
    }
}

fn key(run: &str, request: &str, count: u64) -> String {
    let mut hash = Sha256::new();
    for part in [run, request, &count.to_string()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    format!("batch-{}", hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(run: &str) -> Defaults {
        Defaults {
            model: Some("m".into()),
            priority: Priority::Batch,
            run: run.into(),
        }
    }

    fn keys(text: &str, run: &str) -> Vec<String> {
        let tasks = parse(text.as_bytes(), "x", &defaults(run)).unwrap();
        tasks.into_iter().map(|task| task.key).collect()
    }

    #[test] // [LLORCH-070]
    fn a_line_keeps_its_key_wherever_it_stands() {
        let (a, b) = (r#"{"prompt": "a"}"#, r#"{"prompt": "b", "model": "n"}"#);
        let first = keys(&format!("{a}\n\n{b}\n"), "");
        assert_eq!(first, [keys(a, ""), keys(b, "")].concat());
        // Formatting does not change the key, and a repeated line is another job.
        let spaced = r#" {"priority": "batch",   "prompt": "a", "model": "m"}"#;
        let twice = keys(&format!("{b}\n{spaced}\n{a}"), "");
        assert_eq!(twice[..2], [first[1].clone(), first[0].clone()]);
        assert!(!first.contains(&twice[2]));
        assert_ne!(keys(a, "again"), keys(a, ""));
        assert_eq!(keys(&format!("\u{feff}{a}"), ""), keys(a, ""));
    }

    #[test] // [LLORCH-070]
    fn faulty_lines_are_all_named_before_anything_is_sent() {
        let text = "{\"prompt\": \"a\"}\nnonsense\n{\"prompt\": \"\"}\n{\"prompt\": \"a\", \"nome\": 1}\n[1]\n";
        let error = parse(text.as_bytes(), "x", &defaults("")).unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        let shown = format!("{error:?}");
        for part in [
            "4 lines",
            "line 2",
            "line 3: `prompt` is empty",
            "unknown field `nome`",
            "line 5",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let nothing = parse(&b"\n \n"[..], "x", &defaults("")).unwrap_err();
        assert!(nothing.message.contains("no tasks"));
        let long = vec![b'a'; 5 << 20];
        let error = parse(&long[..], "x", &defaults("")).unwrap_err();
        assert!(error.message.contains("line 1"), "{}", error.message);
    }
}
