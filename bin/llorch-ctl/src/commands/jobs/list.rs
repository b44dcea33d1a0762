//! `llorch jobs list`.

use clap::Args;
use jiff::Timestamp;
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::{JobStatus, Priority};
use pool_core::kit::terminal::paint::Cell;
use pool_core::kit::terminal::{
    CliError, Exit, Format, age, human_count, paint, render_table, say, shorten, shorten_start,
    width, write,
};

use crate::http_client::{ConnectArgs, JobFilter, JobPages, Orchestrator, shown};

/// Default number of finished jobs in a table.
const FINISHED: usize = 20;

/// List jobs: all that wait or run, then the finished ones, each newest first.
///
/// The table shows all unfinished jobs and the newest 20 finished ones, and says how many jobs it leaves out. Ids are
/// as short as possible: every command accepts the beginning of an id. The JSON is complete unless --limit says
/// otherwise.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct List {
    /// Show only jobs in one of these states: queued, dispatched, running, completed, failed, cancelled, expired
    #[arg(long, value_name = "STATUS,...", value_delimiter = ',')]
    status: Vec<JobStatus>,
    /// Only jobs of this model
    #[arg(long)]
    model: Option<String>,
    /// Only jobs of this priority: interactive or batch
    #[arg(long)]
    priority: Option<Priority>,
    /// Most jobs to show
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Show all jobs
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Columns, or a JSON array of jobs without their texts
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

const EXAMPLES: &str = "\
Examples:
  llorch jobs list --status queued,running
  for job in $(llorch jobs list --format json | jq -r '.[].id'); do llorch jobs cancel $job; done";

impl List {
    /// Lists.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let filter = JobFilter {
            statuses: self.status,
            model: self.model,
            priority: self.priority,
        };
        let orchestrator = Orchestrator::connect(connect).await?;
        let limit = self.limit.map(|limit| limit as usize);
        match self.format {
            Format::Json => print_array(orchestrator.jobs(&filter, false), limit).await?,
            Format::Table => {
                let cut = if self.all {
                    Cut::Nothing
                } else {
                    limit.map_or(Cut::Finished, Cut::At)
                };
                let (jobs, complete) = collect(orchestrator.jobs(&filter, true), cut).await?;
                let mut table = render(&jobs, Timestamp::now(), width(), paint::on_stdout());
                if !complete {
                    let total = orchestrator.count(&filter).await.map_err(shown)?;
                    table.extend(left_out(total, jobs.len()).map(|line| format!("\n{line}")));
                }
                say(table)?;
            }
        }
        Ok(Exit::Done)
    }
}

/// Prints jobs as one JSON array, page by page, because a list may be longer than memory should hold.
async fn print_array(mut pages: JobPages, limit: Option<usize>) -> Result<(), CliError> {
    let mut left = limit.unwrap_or(usize::MAX);
    let mut separator = "[\n";
    while left > 0
        && let Some(jobs) = pages.next(left).await.map_err(shown)?
    {
        let mut text = String::new();
        for job in jobs.iter().take(left) {
            let job = serde_json::to_string_pretty(job).map_err(std::io::Error::from)?;
            text.push_str(separator);
            text.push_str("  ");
            text.push_str(&job.replace('\n', "\n  "));
            separator = ",\n";
        }
        left -= jobs.len().min(left);
        write(text)?;
    }
    say(if separator == "[\n" { "[]" } else { "\n]" })
}

/// Jobs left out of a table.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// No jobs: the table is complete.
    Nothing,
    /// All finished jobs but the newest.
    Finished,
    /// All jobs after this many.
    At(usize),
}

/// Returns the jobs of a table, and whether the list is complete.
async fn collect(mut pages: JobPages, cut: Cut) -> Result<(Vec<TaskSummary>, bool), CliError> {
    let mut jobs: Vec<TaskSummary> = Vec::new();
    let mut finished = 0;
    loop {
        let left = match cut {
            Cut::Nothing => usize::MAX,
            Cut::Finished if pages.has_reached_finished() => FINISHED - finished,
            Cut::Finished => usize::MAX,
            Cut::At(limit) => limit - jobs.len(),
        };
        if left == 0 {
            return Ok((jobs, false));
        }
        let is_finished = pages.has_reached_finished();
        let Some(page) = pages.next(left).await.map_err(shown)? else {
            return Ok((jobs, true));
        };
        if is_finished {
            finished += page.len();
        }
        jobs.extend(page);
    }
}

/// Returns the last line of a cut table; `None` if it is complete.
fn left_out(total: u64, listed: usize) -> Option<String> {
    let more = total.saturating_sub(listed as u64);
    (more > 0).then(|| {
        format!(
            "… {} more: --limit N lists up to N jobs, --all lists all",
            human_count(more)
        )
    })
}

const HEADERS: [&str; 6] = ["AGE", "STATUS", "JOB", "MODEL", "WORKER", "TOKENS"];
/// Columns that are shortened when the line is too long.
const MODEL: usize = 3;
const WORKER: usize = 4;
/// Spaces between columns.
const GAP: usize = 2;

fn render(jobs: &[TaskSummary], now: Timestamp, width: usize, colour: bool) -> String {
    let mut rows: Vec<[String; 6]> = jobs.iter().map(|job| row(job, now)).collect();
    fit(&mut rows, width);
    let cells = rows.into_iter().map(|row| {
        let [age, status, job, model, worker, tokens] = row;
        vec![
            Cell::from(age),
            Cell::status(status),
            Cell::from(job),
            Cell::from(model),
            Cell::from(worker),
            Cell::from(tokens),
        ]
    });
    render_table(&HEADERS, cells, colour)
}

fn row(job: &TaskSummary, now: Timestamp) -> [String; 6] {
    let dash = || "-".to_owned();
    let place = job.pool_id.as_ref().zip(job.worker_id.as_ref());
    // A job that waits for its next attempt is on no worker.
    let place = place.filter(|_| job.status != JobStatus::Queued);
    [
        age(job.created_at, now),
        job.status.to_string(),
        job.short_id.clone().unwrap_or_else(|| job.id.to_string()),
        job.model.to_string(),
        place.map_or_else(dash, |(pool, worker)| format!("{pool}/{worker}")),
        job.tokens_out
            .map_or_else(dash, |tokens| tokens.to_string()),
    ]
}

/// Shortens models and workers so that no line is longer than `width`.
fn fit(rows: &mut [[String; 6]], width: usize) {
    let widest = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(HEADERS[column].len())
    };
    let widths: Vec<_> = (0..HEADERS.len()).map(widest).collect();
    let fixed: usize = widths.iter().sum::<usize>() - widths[MODEL] - widths[WORKER];
    let left = width.saturating_sub(fixed + GAP * (HEADERS.len() - 1));
    if widths[MODEL] + widths[WORKER] <= left {
        return;
    }
    // A column that needs less than half the space leaves the rest to the other.
    let worker = widths[WORKER].min((left / 2).max(left.saturating_sub(widths[MODEL])));
    let model = left.saturating_sub(worker);
    for row in rows {
        row[MODEL] = shorten(&row[MODEL], model.max(HEADERS[MODEL].len()));
        // The end of the name distinguishes workers of one pool.
        row[WORKER] = shorten_start(&row[WORKER], worker.max(HEADERS[WORKER].len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: u32, status: JobStatus, age_s: i64) -> TaskSummary {
        let ran = status != JobStatus::Queued;
        TaskSummary {
            id: format!("job-01900000-0000-7000-8000-{number:012}")
                .parse()
                .unwrap(),
            status,
            model: "tinyllama".parse().unwrap(),
            priority: Priority::Interactive,
            session_id: None,
            labels: std::collections::BTreeMap::new(),
            created_at: Timestamp::from_second(1_000_000 - age_s).unwrap(),
            started_at: None,
            ended_at: None,
            attempt: u32::from(ran),
            pool_id: ran.then(|| "mac".to_owned()),
            worker_id: ran.then(|| "worker-metal-1".to_owned()),
            tokens_out: (status == JobStatus::Completed).then_some(128),
            error: None,
            short_id: Some(format!("01900000-{number:04}")),
        }
    }

    fn table(jobs: &[TaskSummary]) -> String {
        render(jobs, Timestamp::from_second(1_000_000).unwrap(), 80, false)
    }

    #[test] // [LLORCH-030]
    fn the_table_shows_where_each_job_is() {
        let jobs = [
            job(3, JobStatus::Queued, 2),
            job(2, JobStatus::Running, 75),
            job(1, JobStatus::Completed, 7_500),
        ];
        insta::assert_snapshot!(table(&jobs), @"
        AGE    STATUS     JOB            MODEL      WORKER              TOKENS
        2s     queued     01900000-0003  tinyllama  -                   -
        1m15s  running    01900000-0002  tinyllama  mac/worker-metal-1  -
        2h05m  completed  01900000-0001  tinyllama  mac/worker-metal-1  128
        ");
    }

    #[test] // [LLORCH-030]
    fn no_line_is_longer_than_80_columns() {
        let mut long = job(2, JobStatus::Dispatched, 273_600);
        long.short_id = Some("019abcde-f012-7345-8678-9abc".into());
        long.model = "hf:TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF::file=tinyllama-1.1b.gguf"
            .parse()
            .unwrap();
        long.pool_id = Some("the-workstation-in-the-next-room".into());
        let jobs = [long, job(1, JobStatus::Completed, 7_500)];
        let shown = table(&jobs);
        insta::assert_snapshot!(shown, @"
        AGE    STATUS      JOB                           MODEL        WORKER      TOKENS
        3d04h  dispatched  019abcde-f012-7345-8678-9abc  hf:TheBlok…  …r-metal-1  -
        2h05m  completed   01900000-0001                 tinyllama    …r-metal-1  128
        ");
        assert!(
            shown.lines().all(|line| line.chars().count() <= 80),
            "{shown}"
        );
    }

    #[test] // [LLORCH-030]
    fn a_cut_table_says_how_much_it_leaves_out() {
        assert_eq!(left_out(20, 20), None);
        // More jobs ended during the listing.
        assert_eq!(left_out(19, 20), None);
        insta::assert_snapshot!(left_out(1_254, 20).unwrap(), @"… 1,234 more: --limit N lists up to N jobs, --all lists all");
    }
}
