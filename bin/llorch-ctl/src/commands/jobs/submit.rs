//! `llorch jobs submit`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use orchestrator_core::api::tasks::{TaskAccepted, TaskSubmitRequest, ValidationError};
use orchestrator_core::job::{Placement, Priority};
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::{CliError, Exit, note, parse_ms, print_json, say};
use pool_core::worker::Device;

use super::follow::{JsonLines, Quiet, Transcript, conclude, follow, wants_notices};
use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Size limit of a prompt: the orchestrator accepts request bodies of up to 4 MiB.
const MOST_PROMPT_BYTES: u64 = 4 << 20;

/// Submit a prompt and print the answer as it is written.
///
/// The job belongs to the orchestrator: Ctrl-C, a closed terminal or a broken connection end this command but not the job. To
/// follow the job again, use `llorch jobs events JOB`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Submit {
    /// Model: an id of the catalogue, `hf:ORG/REPO::file=PATH` or `file:/PATH.gguf`
    #[arg(long, short)]
    model: String,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Pass the prompt to the model as it is, without its chat template
    #[arg(long)]
    raw: bool,
    /// Parse names of control tokens in the prompt (`<|im_end|>`) as those tokens, as --raw always does
    #[arg(long)]
    allow_special: bool,
    /// System message before the prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Print the job's id and exit
    #[arg(long)]
    detach: bool,
    /// Key under which a repeated submit of the same request returns the same job [default: a new key]
    #[arg(long, value_name = "KEY", value_parser = idempotency_key)]
    idempotency_key: Option<String>,
    /// Output: the text as it is written, the finished job, or every event
    #[arg(long, value_enum, default_value_t)]
    format: OutputFormat,
    /// Report what happens on standard error, even if it is not a terminal
    #[arg(long, short)]
    verbose: bool,
    // Last, because their help headings apply to everything that follows.
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    scheduling: SchedulingArgs,
}

const EXAMPLES: &str = "\
Examples:
  llorch jobs submit --model smollm2-135m --prompt 'What is 2+2?'
  llorch jobs submit --model smollm2-135m --raw --prompt 'The capital of France is' --temperature 0
  git diff | llorch jobs submit --model llama3 --system 'Review this change.' --prompt -
  JOB=$(llorch jobs submit --model llama3 --file report.txt --priority batch --detach)";

/// Source of the prompt.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Prompt, or `-` to read it unchanged from standard input
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt unchanged from a file, or from standard input (`-`)
    #[arg(long, short, value_name = "PATH")]
    file: Option<PathBuf>,
}

/// Settings of the sampling, and limits of the generation.
#[derive(Debug, Args)]
#[command(next_help_heading = "Generation")]
struct SamplingArgs {
    /// Most tokens to generate [default: 256]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<u32>,
    /// Sampling temperature, 0 (always the likeliest token) to 2 [default: 0.7]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Sample from the likeliest tokens that together have this probability, above 0 to 1 [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Sample from this many of the likeliest tokens; 0 is all [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    top_k: Option<u32>,
    /// Sample from tokens at least this likely relative to the likeliest, 0 to below 1 [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f64>,
    /// Penalty on tokens that have occurred before, above 0 to 2; 1 changes nothing [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// Stop before this text; may be given up to 4 times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Random seed: the same seed and settings give the same text [default: random]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,
}

/// Time and place of the job's execution.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
struct SchedulingArgs {
    /// Priority: `interactive`, or `batch`, which comes after it [default: interactive]
    #[arg(long)]
    priority: Option<Priority>,
    /// Session of the job; jobs of one session share their turns in the queue
    #[arg(long, value_name = "ID")]
    session_id: Option<String>,
    /// Time from now after which the job expires in any state: `90s`, `5m`, or seconds [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_ms, allow_negative_numbers = true)]
    timeout: Option<u64>,
    /// Number of lost attempts after which the job fails, 1 to 10 [default: 3]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_attempts: Option<u32>,
    /// Label, as `KEY=VALUE`; may be given up to 16 times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Run on this pool only
    #[arg(long, value_name = "ID")]
    pool: Option<String>,
    /// Run on this device only: `cpu`, `cuda:N` or `metal:N`
    #[arg(long)]
    device: Option<Device>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum OutputFormat {
    /// The text as it is written
    #[default]
    Text,
    /// The job as JSON, once it is over; with --detach, the answer to the submit
    Json,
    /// Every event as JSON, one per line
    Jsonl,
}

impl Submit {
    /// Submits the task, and follows its job unless `--detach` is given.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let (detach, format) = (self.detach, self.format);
        let notices = wants_notices(self.verbose);
        let key = self
            .idempotency_key
            .clone()
            .unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
        let request = self.request()?;
        // The orchestrator makes the same check, but here a mistake is found before anything is sent.
        request.clone().validate().map_err(refused)?;

        let interrupt = Interrupt::catch()?;
        let accepted = tokio::select! {
            accepted = submit(connect, &request, &key) => accepted?,
            () = interrupt.wait() => {
                let hint = format!("the job may be stored; to find it, repeat the request with --idempotency-key {key}");
                return Err(CliError::new(Exit::Interrupted, "interrupted before the orchestrator answered").hint(hint));
            }
        };
        let Accepted { orchestrator, task } = accepted;
        let id = task.job_id;
        if detach {
            match format {
                OutputFormat::Text => say(id.to_string())?,
                OutputFormat::Json => print_json(&task)?,
                OutputFormat::Jsonl => say(serde_json::to_string(&task).map_err(io::Error::from)?)?,
            }
            return Ok(Exit::Done);
        }
        let feed = orchestrator.events(id, None);
        match format {
            OutputFormat::Text => {
                let ending = follow(feed, &mut Transcript::new(notices), &interrupt).await?;
                conclude(id, &ending, notices)
            }
            OutputFormat::Json => {
                let ending = follow(feed, &mut Quiet::new(), &interrupt).await?;
                print_json(&orchestrator.job(id).await.map_err(shown)?)?;
                conclude(id, &ending, false)
            }
            OutputFormat::Jsonl => {
                let ending = follow(feed, &mut JsonLines, &interrupt).await?;
                conclude(id, &ending, false)
            }
        }
    }

    fn request(self) -> Result<TaskSubmitRequest, CliError> {
        let SchedulingArgs {
            priority,
            session_id,
            timeout,
            max_attempts,
            labels,
            pool,
            device,
        } = self.scheduling;
        let placement = (pool.is_some() || device.is_some()).then_some(Placement { pool, device });
        let mut pairs = BTreeMap::new();
        for (key, value) in labels {
            if pairs.insert(key.clone(), value).is_some() {
                return Err(CliError::new(
                    Exit::Usage,
                    format!("the label `{key}` is given twice"),
                ));
            }
        }
        Ok(TaskSubmitRequest {
            model: self.model,
            prompt: Some(self.prompt.read()?),
            messages: None,
            raw: self.raw,
            allow_special: self.allow_special,
            system: self.system,
            max_tokens: self.sampling.max_tokens,
            temperature: self.sampling.temperature,
            top_p: self.sampling.top_p,
            top_k: self.sampling.top_k,
            min_p: self.sampling.min_p,
            repetition_penalty: self.sampling.repetition_penalty,
            stop: self.sampling.stop,
            seed: self.sampling.seed,
            priority,
            session_id,
            timeout_ms: timeout,
            max_attempts,
            placement,
            labels: pairs,
        })
    }
}

struct Accepted {
    orchestrator: Orchestrator,
    task: TaskAccepted,
}

async fn submit(
    connect: &ConnectArgs,
    request: &TaskSubmitRequest,
    key: &str,
) -> Result<Accepted, CliError> {
    let mut orchestrator = Orchestrator::connect(connect).await?;
    let on_retry = |error: &pool_core::kit::client::ClientError| {
        note(format!("{error}; submitting again with the same key"));
    };
    let task = orchestrator
        .submit(request, key, on_retry)
        .await
        .map_err(shown)?;
    Ok(Accepted { orchestrator, task })
}

fn refused(error: ValidationError) -> CliError {
    CliError::new(Exit::Usage, error.to_string()).hint(error.hint)
}

impl PromptArgs {
    fn read(self) -> Result<String, CliError> {
        match (self.prompt, self.file.unwrap_or_default()) {
            (Some(text), _) if text != "-" => Ok(text),
            (prompt, path) if prompt.is_some() || path == Path::new("-") => {
                let stdin = io::stdin();
                if stdin.is_terminal() {
                    note("reading the prompt from the terminal; press Ctrl-D to end it");
                }
                read_text(stdin.lock(), "standard input")
            }
            (_, path) => {
                let name = path.display().to_string();
                let unreadable =
                    |error| CliError::caused(Exit::Usage, format!("could not read {name}"), &error);
                read_text(File::open(&path).map_err(unreadable)?, &name)
            }
        }
    }
}

fn read_text(source: impl Read, name: &str) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    source
        .take(MOST_PROMPT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| CliError::caused(Exit::Usage, format!("could not read {name}"), &error))?;
    if bytes.len() as u64 > MOST_PROMPT_BYTES {
        return Err(CliError::new(
            Exit::Usage,
            format!("{name} exceeds the limit of 4 MiB for a request"),
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        CliError::new(
            Exit::Usage,
            format!("{name} is not text: byte {at} is not UTF-8"),
        )
    })
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn idempotency_key(text: &str) -> Result<String, String> {
    let fits = (1..=255).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte == b' ' || byte.is_ascii_graphic());
    // HTTP removes leading and trailing spaces of header values.
    if fits && text.trim() == text {
        Ok(text.to_owned())
    } else {
        Err("a key is 1 to 255 printable ASCII characters, with no space at either end".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [LLORCH-022]
    fn a_prompt_is_read_exactly_and_within_bounds() {
        assert_eq!(read_text(&b" a\r\n\n"[..], "x").unwrap(), " a\r\n\n");
        assert_eq!(
            read_text(&b"ab\xff"[..], "the file").unwrap_err().message,
            "the file is not text: byte 2 is not UTF-8"
        );
        let endless = read_text(io::repeat(b'a'), "the file").unwrap_err();
        assert_eq!(endless.exit, Exit::Usage);
    }

    #[test] // [LLORCH-021]
    fn labels_and_keys_are_checked_where_they_are_given() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(
            label("a").is_err() && idempotency_key("").is_err() && idempotency_key("a\nb").is_err()
        );
        assert!(idempotency_key(" ").is_err() && idempotency_key("a ").is_err());
        assert!(idempotency_key(&"k".repeat(256)).is_err() && idempotency_key("nightly 7").is_ok());
    }
}
