//! Check that other JSON readers preserve answers, for the tests of every daemon.

// A panic in a helper fails the test.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss
)]

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Number, Value};

/// 2^53 - 1: larger integers are not safe in JavaScript and in `jq` 1.6.
const MOST: u64 = (1 << 53) - 1;

/// Fails if a document has a number that a reader with 64-bit floats would change, or that `jq` or Node.js do change. Each
/// of `texts` is the name of a JSON document and its text.
pub fn assert_exact(texts: &[(String, String)]) {
    let mut numbers = 0;
    for (name, text) in texts {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        numbers += check(name, &value);
    }
    assert!(numbers > 0, "no answer has a number");
    let documents = texts.iter().map(|(_, text)| plain(text));
    let expected: Vec<String> = documents.collect();
    for (reader, read) in [("jq", jq(texts)), ("node", node(texts))] {
        assert_eq!(read.len(), expected.len(), "{reader}");
        for ((name, _), (read, expected)) in texts.iter().zip(read.iter().zip(&expected)) {
            assert_eq!(plain(read), *expected, "{name} as {reader} reads it");
        }
    }
}

/// Counts the numbers in `value`. Fails unless each is exact.
fn check(place: &str, value: &Value) -> usize {
    match value {
        Value::Number(number) => {
            let size = number.as_u64().or(number.as_i64().map(i64::unsigned_abs));
            // Floats are allowed: every reader represents them exactly.
            assert!(size.is_none_or(|size| size <= MOST), "{place}: {number}");
            1
        }
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items
                .map(|(i, item)| check(&format!("{place}[{i}]"), item))
                .sum()
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            fields
                .map(|(name, field)| check(&format!("{place}.{name}"), field))
                .sum()
        }
        _ => 0,
    }
}

/// Returns a document in a normal form in which 1 and 1.0 are equal.
fn plain(text: &str) -> String {
    fn unify(value: &mut Value) {
        match value {
            Value::Number(number) => {
                let float = number.as_f64().unwrap();
                if float.fract() == 0.0 && float.abs() <= MOST as f64 {
                    *number = Number::from(float as i64);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(unify),
            Value::Object(fields) => fields.values_mut().for_each(unify),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_str(text).unwrap();
    unify(&mut value);
    value.sort_all_objects();
    value.to_string()
}

fn jq(texts: &[(String, String)]) -> Vec<String> {
    // jq prints floats with 17 digits; `plain` turns each into its shortest form.
    read_with(Command::new("jq").args(["-c", "."]), texts)
}

fn node(texts: &[(String, String)]) -> Vec<String> {
    let script = "require('readline').createInterface({input: process.stdin})\
        .on('line', line => console.log(JSON.stringify(JSON.parse(line))))";
    read_with(Command::new("node").args(["-e", script]), texts)
}

/// Returns the documents as `command` rewrites them, one per line.
fn read_with(command: &mut Command, texts: &[(String, String)]) -> Vec<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| {
        panic!("`{program}` is needed and could not be started ({error}): see `.ci/run`")
    });
    let mut input = child.stdin.take().unwrap();
    let lines: Vec<String> = texts
        .iter()
        .map(|(_, text)| serde_json::from_str::<Value>(text).unwrap().to_string())
        .collect();
    let writer = std::thread::spawn(move || {
        for line in lines {
            writeln!(input, "{line}").unwrap();
        }
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success(), "{program}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}
