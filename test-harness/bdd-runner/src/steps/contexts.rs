//! Steps about prompts that do not fit every worker.

use std::time::{Duration, Instant};

use cucumber::{then, when};
use orchestrator_core::job::{AttemptOutcome, JobStatus};

use crate::house::House;
use crate::process;

/// Time limit for reading a long prompt on a slow machine.
const READING_LIMIT: Duration = Duration::from_secs(600);

#[when(expr = "I submit a job of {int} tokens with a prompt of {int} words")]
async fn submit_words(house: &mut House, tokens: u32, words: usize) {
    // Each word is one token.
    let prompt = vec!["the"; words].join(" ");
    let mut command =
        house.command("llorch jobs submit --model smollm2-135m --raw --temperature 0 --detach");
    command.args(["--max-tokens", &tokens.to_string(), "--prompt", &prompt]);
    let finished = process::run(command, crate::house::COMMAND_LIMIT).await;
    assert!(finished.status.success(), "{}", finished.stderr);
    house.job = Some(finished.stdout.trim().to_owned());
}

#[then(expr = "it completes on a worker with a context of {int} tokens, and no attempt was lost")]
async fn completes_with_context(house: &mut House, tokens: u64) {
    let started = Instant::now();
    let task = loop {
        let task = house.task().await;
        if task.status.is_terminal() {
            break task;
        }
        assert!(started.elapsed() < READING_LIMIT, "still {}", task.status);
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(task.status, JobStatus::Completed, "{task:#?}");
    let outcomes = task.attempts.iter().filter_map(|attempt| attempt.outcome);
    let counted: Vec<_> = outcomes.filter(|outcome| outcome.counts()).collect();
    assert_eq!(counted, [AttemptOutcome::Completed], "{:?}", task.attempts);
    let worker = task.attempts.last().expect("an attempt").worker_id.clone();
    let line = "llorch-pool worker list --format json";
    let listed = &house.succeed(line).await.stdout;
    let listed: Vec<serde_json::Value> = serde_json::from_str(listed).expect("a JSON array");
    let found = listed.iter().find(|listed| listed["id"] == worker.as_str());
    let found = found.expect("the worker is listed");
    assert_eq!(found["context_length"], tokens, "{found:#}");
}
