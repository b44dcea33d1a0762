//! Steps about commands, their output and their exit codes.

use cucumber::gherkin::Step;
use cucumber::{then, when};
use serde_json::Value;

use crate::house::{House, WAIT_LIMIT, until};
use crate::process;

#[when(expr = "I run `{}`")]
async fn run(house: &mut House, line: String) {
    house.run(&line).await;
}

#[then(expr = "it exits with {int}")]
fn exits_with(house: &mut House, code: i32) {
    let last = house.last();
    assert_eq!(
        last.status.code(),
        Some(code),
        "{}{}",
        last.stdout,
        last.stderr
    );
}

#[then(expr = "standard output contains {string}")]
fn output_contains(house: &mut House, text: String) {
    let text = house.fill(&text);
    assert!(house.last().stdout.contains(&text), "{:?}", house.last());
}

#[then(expr = "standard output begins with {string}")]
fn output_begins(house: &mut House, text: String) {
    assert!(house.last().stdout.starts_with(&text), "{:?}", house.last());
}

#[then(expr = "standard output is {string}")]
fn output_is(house: &mut House, text: String) {
    assert_eq!(
        house.last().stdout.trim_end_matches('\n'),
        text,
        "{}",
        house.last().stderr
    );
}

#[then(expr = "standard error contains {string}")]
fn error_contains(house: &mut House, text: String) {
    let text = house.fill(&text);
    assert!(house.last().stderr.contains(&text), "{:?}", house.last());
}

#[then("standard error contains all of:")]
fn error_tells(house: &mut House, step: &Step) {
    let rows = &step.table.as_ref().expect("the step has a table").rows;
    for word in rows.iter().flatten() {
        assert!(
            house.last().stderr.contains(word),
            "`{word}` is missing: {}",
            house.last().stderr
        );
    }
}

#[then(expr = "the {word} worker is {word}")]
async fn worker_is(house: &mut House, ordinal: String, status: String) {
    let index = match ordinal.as_str() {
        "first" => 0,
        "second" => 1,
        other => panic!("unknown worker `{other}`"),
    };
    let started = std::time::Instant::now();
    loop {
        let listed = house
            .succeed("llorch-pool worker list --format json")
            .await
            .stdout
            .clone();
        let listed: Value = serde_json::from_str(&listed).expect("a JSON array");
        if listed[index]["status"] == status.as_str() {
            return;
        }
        assert!(started.elapsed() < WAIT_LIMIT, "{listed:#}");
    }
}

#[then(expr = "no process of the worker program is left")]
async fn no_worker_left(house: &mut House) {
    let home = house.home().to_owned();
    let workers = || {
        process::left_running(&home)
            .into_iter()
            .filter(|(_, name)| name == "llorch-candled")
    };
    let gone = until(WAIT_LIMIT, || workers().next().is_none()).await;
    assert!(gone, "left running: {:?}", workers().collect::<Vec<_>>());
}

#[then("nothing is left running")]
async fn nothing_left(house: &mut House) {
    let home = house.home().to_owned();
    let gone = until(WAIT_LIMIT, || process::left_running(&home).is_empty()).await;
    assert!(gone, "left running: {:?}", process::left_running(&home));
}
