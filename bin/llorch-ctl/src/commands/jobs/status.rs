//! `llorch jobs status`.

use std::fmt::Write as _;

use clap::Args;
use jiff::Timestamp;
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::{Attempt, JobIdPrefix};
use pool_core::api::receipt::Receipt;
use pool_core::kit::terminal::paint::Cell;
use pool_core::kit::terminal::sanitize::clean;
use pool_core::kit::terminal::{
    CliError, Exit, Format, age, human_duration, in_commands, paint, print_json, render_table, say,
};

use super::{short_hash, speed};
use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Show one job: its state, its attempts, and why it waits.
#[derive(Debug, Args)]
pub struct Status {
    /// Job id, or a unique prefix of it
    id: JobIdPrefix,
    /// Human-readable lines, or the job as JSON with its request and its text
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Status {
    /// Prints the job.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let orchestrator = Orchestrator::connect(connect).await?;
        let job = orchestrator
            .job(orchestrator.resolve(&self.id).await?)
            .await
            .map_err(shown)?;
        match self.format {
            Format::Json => print_json(&job)?,
            Format::Table => say(render(&job, Timestamp::now(), paint::on_stdout()))?,
        }
        Ok(Exit::Done)
    }
}

fn render(job: &TaskView, now: Timestamp, colour: bool) -> String {
    let mut lines = vec![
        ("job", job.id.to_string()),
        ("status", job.status.to_string()),
        ("model", job.request.model.to_string()),
        ("priority", job.request.priority.to_string()),
        ("submitted", format!("{} ago", age(job.created_at, now))),
    ];
    if let Some(waiting) = &job.waiting {
        let before = match waiting.queue_position {
            0 => "first in the queue".to_owned(),
            1 => "1 job before it".to_owned(),
            count => format!("{count} jobs before it"),
        };
        lines.push((
            "waits",
            format!("{} ({before})", waiting.explanation.message),
        ));
        lines.push((
            "to fix",
            in_commands(&waiting.explanation.hint).into_owned(),
        ));
    }
    if let Some(usage) = &job.usage {
        let stop = serde_json::to_value(usage.stop_reason)
            .ok()
            .and_then(|name| name.as_str().map(str::to_owned));
        let tokens = format!(
            "{} in, {} out, {}",
            usage.tokens_in,
            usage.tokens_out,
            stop.unwrap_or_default()
        );
        lines.push(("tokens", tokens));
        lines.push(("speed", speed(usage)));
    }
    if let Some(receipt) = &job.receipt {
        lines.push(("receipt", in_short(receipt)));
    }
    if let Some(error) = &job.error {
        lines.push((
            "error",
            format!("{}: {}", error.code.as_str(), error.message),
        ));
    }
    if !job.text.is_empty() {
        let command = if job.status.is_terminal() {
            "output"
        } else {
            "events"
        };
        lines.push((
            "text",
            format!(
                "{} characters: llorch jobs {command} {}",
                job.text.chars().count(),
                job.id
            ),
        ));
    }
    let mut shown = String::new();
    for (name, value) in lines {
        // Writing to a `String` never fails.
        let _ = writeln!(shown, "{name:<11}{}", clean(&value));
    }
    if !job.attempts.is_empty() {
        shown.push('\n');
        shown.push_str(&render_attempts(&job.attempts, now, colour));
    }
    shown.trim_end().to_owned()
}

/// Formats the parts of a receipt that distinguish runs, with short hashes.
fn in_short(receipt: &Receipt) -> String {
    let model = receipt.model_sha256.as_deref();
    let model = model.map_or(String::new(), |hash| {
        format!(", model {}", short_hash(hash))
    });
    let output = short_hash(&receipt.output_sha256);
    let (engine, arithmetic) = (&receipt.engine, &receipt.arithmetic);
    format!("{engine}, arithmetic {arithmetic}{model}, output {output}")
}

fn render_attempts(attempts: &[Attempt], now: Timestamp, colour: bool) -> String {
    let rows = attempts.iter().map(|attempt| {
        let ran = attempt
            .ended_at
            .unwrap_or(now)
            .duration_since(attempt.leased_at);
        let outcome = attempt
            .outcome
            .and_then(|outcome| serde_json::to_value(outcome).ok());
        let outcome = outcome.and_then(|name| name.as_str().map(str::to_owned));
        vec![
            Cell::from(attempt.number.to_string()),
            Cell::from(attempt.pool_id.clone()),
            Cell::from(attempt.worker_id.clone()),
            Cell::from(human_duration(ran.unsigned_abs())),
            Cell::status(outcome.unwrap_or_else(|| "running".to_owned())),
            Cell::from(attempt.reason.clone().unwrap_or_default()),
        ]
    });
    render_table(
        &["ATTEMPT", "POOL", "WORKER", "TIME", "OUTCOME", "REASON"],
        rows,
        colour,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use orchestrator_core::api::tasks::{TaskSubmitRequest, TaskWaiting};
    use orchestrator_core::job::{AttemptOutcome, Job, JobStatus, Usage};
    use orchestrator_core::scheduler::{Explanation, WaitReason};
    use pool_core::api::worker::StopReason;

    const NOW: i64 = 1_000_000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn job() -> Job {
        let request = TaskSubmitRequest {
            model: "tinyllama".into(),
            prompt: Some("p".into()),
            ..Default::default()
        };
        let id = "job-01900000-0000-7000-8000-000000000001".parse().unwrap();
        Job::new(id, request.validate().unwrap(), at(NOW - 75))
    }

    #[test] // [LLORCH-031]
    fn a_waiting_job_says_why_and_what_would_help() {
        let explanation = Explanation {
            reason: WaitReason::ModelMissing,
            message: "no pool has `tinyllama` on its disk".into(),
            hint: "llorch-pool models download tinyllama".into(),
            filters: Vec::new(),
        };
        let view = TaskView::new(
            job(),
            Some(TaskWaiting {
                queue_position: 1,
                explanation,
                estimated_start_ms: None,
            }),
        );
        insta::assert_snapshot!(render(&view, at(NOW), false), @r"
        job        job-01900000-0000-7000-8000-000000000001
        status     queued
        model      tinyllama
        priority   interactive
        submitted  1m15s ago
        waits      no pool has `tinyllama` on its disk (1 job before it)
        to fix     llorch-pool models download tinyllama
        ");
    }

    #[test] // [LLORCH-031]
    fn a_finished_job_shows_its_attempts_and_figures() {
        let mut job = job();
        let attempt = |number, worker: &str, outcome, reason: Option<&str>| Attempt {
            number,
            fence: u64::from(number),
            pool_id: "mac".into(),
            worker_id: worker.into(),
            leased_at: at(NOW - 70),
            started_at: Some(at(NOW - 69)),
            ended_at: Some(at(NOW - 65)),
            outcome: Some(outcome),
            reason: reason.map(str::to_owned),
        };
        job.status = JobStatus::Completed;
        job.attempts = vec![
            attempt(
                1,
                "worker-cpu-0",
                AttemptOutcome::WorkerLost,
                Some("signal(9)"),
            ),
            attempt(2, "worker-cpu-1", AttemptOutcome::Completed, None),
        ];
        job.text = "four".into();
        job.usage = Some(Usage {
            tokens_in: 9,
            tokens_out: 3,
            stop_reason: StopReason::Eos,
            ttft_ms: 812,
            decode_time_ms: 100,
        });
        job.receipt = Some(Receipt {
            model_sha256: Some("0123456789abcdef".into()),
            engine: "llorch-candled 0.1.0".into(),
            arithmetic: "cpu 2".into(),
            earlier_arithmetic: Vec::new(),
            tokenizer_sha256: "01".into(),
            chat_template_sha256: None,
            prompt_tokens: 9,
            prompt_sha256: "02".into(),
            temperature: 0.7,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 7,
            max_tokens: 256,
            stop_sha256: None,
            output_tokens: 3,
            output_sha256: "fedcba9876543210".into(),
        });
        insta::assert_snapshot!(render(&TaskView::new(job, None), at(NOW), false), @r"
        job        job-01900000-0000-7000-8000-000000000001
        status     completed
        model      tinyllama
        priority   interactive
        submitted  1m15s ago
        tokens     9 in, 3 out, EOS
        speed      TTFT 812ms, 20.0 tokens/s
        receipt    llorch-candled 0.1.0, arithmetic cpu 2, model 0123456789ab, output fedcba987654
        text       4 characters: llorch jobs output job-01900000-0000-7000-8000-000000000001

        ATTEMPT  POOL  WORKER        TIME  OUTCOME      REASON
        1        mac   worker-cpu-0  5s    worker_lost  signal(9)
        2        mac   worker-cpu-1  5s    completed
        ");
    }
}
