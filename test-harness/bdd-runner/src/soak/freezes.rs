//! Freezes: each daemon is paused and resumed repeatedly while jobs run that must not lose a single attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::{JobId, JobStatus};
use pool_core::kit::process::Signal;
use tokio::task::JoinSet;

use crate::chain::{Chain, Daemon, Parts, tail};
use crate::clients::Clients;

/// The pause between two freezes of a chain: time for a few heartbeats.
const PAUSE: Duration = Duration::from_secs(2);

/// Freezes orchestratord and pool-managerd while jobs with one attempt run: none may fail.
///
/// Several chains (an orchestratord, a pool, two workers with small and slow models) share the freezes, whose lengths are
/// spread evenly over the range. Jobs that are left over after the last freeze are cancelled. Exits with 0 if every job
/// completed, otherwise with 1 (home and logs are then kept, and named).
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of freezes of each daemon.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub freezes: u32,
    /// Number of concurrent chains.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub chains: u32,
    /// Number of concurrent jobs in each chain.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub jobs: u32,
    /// Shortest freeze, in seconds.
    #[arg(long, default_value_t = 5.0)]
    pub shortest_s: f64,
    /// Longest freeze, in seconds.
    #[arg(long, default_value_t = 90.0)]
    pub longest_s: f64,
    /// Number of layers of the models: more of them make jobs that outlast a freeze.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub blocks: u16,
}

impl Options {
    /// Returns the lengths of the freezes of each daemon in one chain.
    fn lengths(&self, chain: u32) -> Vec<Duration> {
        let last = f64::from(self.freezes.max(2) - 1);
        let range = (self.longest_s - self.shortest_s).max(0.0);
        let length = |n| self.shortest_s + range * f64::from(n) / last;
        let share = (0..self.freezes).filter(|n| n % self.chains == chain);
        share.map(|n| Duration::from_secs_f64(length(n))).collect()
    }
}

/// Outcome of a run with freezes.
#[derive(Debug, Default)]
pub struct Report {
    /// Number and total duration of the freezes, by kind of daemon.
    pub frozen: BTreeMap<&'static str, (u32, Duration)>,
    /// Number of attempts that ran before a freeze and still ran after it, by kind of daemon.
    pub outlasted: BTreeMap<&'static str, usize>,
    /// Number of jobs by state; those that were left over after the last freeze are `cancelled`.
    pub jobs: BTreeMap<String, usize>,
    /// Jobs that did not complete in one attempt, each with the reason.
    pub failures: Vec<String>,
    /// The folders of chains with failures.
    pub kept: Vec<PathBuf>,
    /// Duration of the run.
    pub elapsed: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "freezes: {:.0?}", self.elapsed)?;
        for (daemon, (count, time)) in &self.frozen {
            let outlasted = self.outlasted.get(daemon).copied().unwrap_or_default();
            writeln!(
                f,
                "  {daemon:<15} {count:>5} frozen, {time:.0?} in all; {outlasted} attempts ran through a freeze"
            )?;
        }
        for (state, count) in &self.jobs {
            writeln!(f, "  {count} jobs {state}")?;
        }
        for failure in &self.failures {
            writeln!(f, "  {failure}")?;
        }
        for kept in &self.kept {
            writeln!(f, "  homes and logs: {}", kept.display())?;
        }
        write!(f, "{} jobs lost an attempt", self.failures.len())
    }
}

/// Runs all chains, and reports the progress after each freeze.
pub async fn run(options: &Options, told: fn(&str)) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let mut chains = JoinSet::new();
    for number in 0..options.chains.min(options.freezes) {
        let (options, lengths) = (options.clone(), options.lengths(number));
        chains.spawn(async move { one_chain(number, &options, &lengths, told).await });
    }
    let mut report = Report::default();
    while let Some(chain) = chains.join_next().await {
        let one = chain.context("a chain panicked")??;
        for (daemon, (count, time)) in one.frozen {
            let sum = report.frozen.entry(daemon).or_default();
            *sum = (sum.0 + count, sum.1 + time);
        }
        for (daemon, count) in one.outlasted {
            *report.outlasted.entry(daemon).or_default() += count;
        }
        for (state, count) in one.jobs {
            *report.jobs.entry(state).or_default() += count;
        }
        report.failures.extend(one.failures);
        report.kept.extend(one.kept);
    }
    report.elapsed = begun.elapsed();
    Ok(report)
}

async fn one_chain(
    number: u32,
    options: &Options,
    lengths: &[Duration],
    told: fn(&str),
) -> anyhow::Result<Report> {
    let mut chain = Chain::build(&Parts {
        blocks: options.blocks.into(),
        ..Parts::beside(1, 2)
    })?;
    chain.start().await?;
    let clients = Clients::new(chain.url())?;
    let crowd = Arc::new(Crowd::default());
    let mut members = JoinSet::new();
    for client in 0..options.jobs {
        let models = chain.models().to_vec();
        members.spawn(work(clients.clone(), client, models, Arc::clone(&crowd)));
    }
    let mut report = Report::default();
    for length in lengths {
        for (name, daemon) in [
            ("orchestratord", &chain.orchestratord),
            ("pool-managerd", &chain.pools[0].daemon),
        ] {
            tokio::time::sleep(PAUSE).await;
            let before = crowd.running(&clients).await?;
            freeze(daemon, *length).await?;
            let after = crowd.running(&clients).await?;
            *report.outlasted.entry(name).or_default() += before.intersection(&after).count();
            let sum = report.frozen.entry(name).or_default();
            *sum = (sum.0 + 1, sum.1 + *length);
            told(&format!(
                "chain {number}: {name} was frozen for {length:.1?}"
            ));
        }
    }
    crowd.over.store(true, Ordering::Relaxed);
    for job in crowd.jobs() {
        clients.cancel(job).await?;
    }
    while let Some(client) = members.join_next().await {
        for (state, failure) in client.context("a client panicked")?? {
            *report.jobs.entry(state).or_default() += 1;
            report.failures.extend(failure);
        }
    }
    if report.failures.is_empty() {
        chain.close().await?;
    } else {
        report.kept.extend(chain.keep());
    }
    Ok(report)
}

async fn freeze(daemon: &Daemon, length: Duration) -> anyhow::Result<()> {
    if daemon.pid().is_none() {
        bail!("{} has ended:\n{}", daemon.name, tail(&daemon.log(), 10));
    }
    daemon.signal(Signal::STOP)?;
    tokio::time::sleep(length).await;
    daemon.signal(Signal::CONT)?;
    Ok(())
}

/// State shared by the clients of a chain.
#[derive(Debug, Default)]
struct Crowd {
    /// Set once no client may submit another job.
    over: AtomicBool,
    /// Submitted jobs whose end no client has seen.
    jobs: Mutex<BTreeSet<JobId>>,
}

impl Crowd {
    fn jobs(&self) -> BTreeSet<JobId> {
        self.lock().clone()
    }

    /// Returns the jobs that are running now.
    async fn running(&self, clients: &Clients) -> anyhow::Result<BTreeSet<JobId>> {
        let mut running = BTreeSet::new();
        for job in self.jobs() {
            if clients.show(job).await?.status == JobStatus::Running {
                running.insert(job);
            }
        }
        Ok(running)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<JobId>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs one client that submits one job after another. Returns the states of its jobs, with the reason for each that
/// did not complete in its only attempt.
async fn work(
    clients: Clients,
    client: u32,
    models: Vec<String>,
    crowd: Arc<Crowd>,
) -> anyhow::Result<Vec<(String, Option<String>)>> {
    let mut done = Vec::new();
    while !crowd.over.load(Ordering::Relaxed) {
        let key = format!("freeze-{client}-{}", done.len());
        let request = TaskSubmitRequest {
            model: models[client as usize % models.len()].clone(),
            prompt: Some(format!("The {client}. story begins")),
            raw: true,
            max_tokens: Some(900),
            temperature: Some(0.8),
            seed: Some(u64::from(client)),
            max_attempts: Some(1),
            ..TaskSubmitRequest::default()
        };
        let job = clients.submit(&key, &request).await?;
        crowd.lock().insert(job);
        // The end may have come since the check above, too late for this job to be in the list of jobs to cancel.
        if crowd.over.load(Ordering::Relaxed) {
            clients.cancel(job).await?;
        }
        let view = clients.wait(job).await?;
        crowd.lock().remove(&job);
        let left_over = view.status == JobStatus::Cancelled && crowd.over.load(Ordering::Relaxed);
        let sound = left_over || view.status == JobStatus::Completed && view.attempts.len() == 1;
        let failure = || {
            format!(
                "{job} is {}: {:?} {:?}",
                view.status, view.error, view.attempts
            )
        };
        done.push((view.status.to_string(), (!sound).then(failure)));
    }
    Ok(done)
}
