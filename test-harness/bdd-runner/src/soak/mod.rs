//! The long run: the whole chain under clients that stream, disconnect, resume and cancel, while every part is killed or frozen
//! repeatedly. At the end everything settles, and the checker judges the evidence.

pub mod freezes;
pub mod plan;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use orchestrator_core::JobId;
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::JobStatus;
use pool_core::kit::process::{ProcessIdentity, Signal};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;

use crate::chain::{Chain, Parts, Pool, eventually, tail};
use crate::checker::{Evidence, Record, Violation, check};
use crate::clients::{Clients, Reading};
use plan::{Blow, Strike, Victim, plan};

/// Number of requests from which jobs are drawn.
const VARIANTS: usize = 8;
/// Time for jobs to end after the last strike. Then the clients give up.
const SETTLE: Duration = Duration::from_secs(600);

/// Runs the whole chain while real daemons and workers are killed and frozen at random.
///
/// Starts an orchestratord, pools and workers with tiny models in a home of its own, lets clients submit, stream, lose their
/// connections, resume and cancel, and meanwhile kills (SIGKILL) and freezes (SIGSTOP) every part. When everything has settled,
/// a checker compares the answers to clients, the database and the hosts: nothing may be lost, doubled or spliced. The seed
/// decides which part is struck when, and what clients request.
///
/// Exits with 0 if every rule holds, otherwise with 1 (home and logs are then kept, and named).
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of processes to kill.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub kills: u32,
    /// Seed of the victims and of the requests [default: random, and printed].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Stop the strikes after this many minutes, even if kills are left.
    #[arg(long, value_name = "M")]
    pub minutes: Option<f64>,
    /// Number of pool hosts; each has two workers.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub pools: u8,
    /// Number of concurrent clients.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub clients: u8,
    /// Keep home and logs even if every rule holds.
    #[arg(long)]
    pub keep: bool,
}

/// The outcome of a run.
#[derive(Debug)]
pub struct Report {
    /// Seed, with which the same plan can run again.
    pub seed: u64,
    /// Number of kills and of freezes, by kind of part.
    pub struck: BTreeMap<Victim, (u32, u32)>,
    /// Duration of the strikes.
    pub elapsed: Duration,
    /// Number of jobs, by state.
    pub jobs: BTreeMap<String, usize>,
    /// Number of attempts of all jobs.
    pub attempts: usize,
    /// Number of streams that clients opened.
    pub connections: u64,
    /// Errors for which clients gave up.
    pub complaints: Vec<String>,
    /// Rules that do not hold.
    pub violations: Vec<Violation>,
    /// Folder of homes and logs; `None` if they are not kept.
    pub kept: Option<PathBuf>,
}

impl Report {
    /// Returns whether every rule holds and no client failed.
    pub fn is_sound(&self) -> bool {
        self.violations.is_empty() && self.complaints.is_empty()
    }

    /// Returns the number of killed processes.
    pub fn kills(&self) -> u32 {
        self.struck.values().map(|(kills, _)| kills).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "soak: seed {}, {} kills in {:.0?}",
            self.seed,
            self.kills(),
            self.elapsed
        )?;
        for (victim, (kills, freezes)) in &self.struck {
            writeln!(
                f,
                "  {:<15} {kills:>5} killed {freezes:>5} frozen",
                victim.program()
            )?;
        }
        let all: usize = self.jobs.values().sum();
        let states: Vec<_> = self
            .jobs
            .iter()
            .map(|(state, count)| format!("{count} {state}"))
            .collect();
        writeln!(f, "  {all} jobs: {}", states.join(", "))?;
        writeln!(
            f,
            "  {} attempts, {} streams",
            self.attempts, self.connections
        )?;
        for complaint in &self.complaints {
            writeln!(f, "  a client: {complaint}")?;
        }
        for violation in &self.violations {
            writeln!(f, "  violated: {violation}")?;
        }
        if let Some(kept) = &self.kept {
            writeln!(f, "  homes and logs: {}", kept.display())?;
        }
        let verdict = if self.is_sound() {
            "nothing lost, doubled or spliced"
        } else {
            "BROKEN"
        };
        write!(f, "{verdict}")
    }
}

/// Progress of a run.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Number of kills so far.
    pub kills: u32,
    /// Number of jobs whose end clients have seen.
    pub jobs: usize,
    /// Current stage: `starting`, `striking` or `settling`.
    pub stage: &'static str,
}

/// Returns one of the requests. Most of them have a temperature, so that a splice or a wrong sampler state shows in the text.
fn request(variant: usize, models: &[String]) -> TaskSubmitRequest {
    let greedy = variant % 4 == 3;
    TaskSubmitRequest {
        model: models[variant % models.len()].clone(),
        prompt: Some(format!("The {variant}. story begins")),
        raw: true,
        max_tokens: Some([10, 100, 300, 900][(variant / 2) % 4]),
        temperature: Some(if greedy { 0.0 } else { 0.8 }),
        seed: Some(variant as u64),
        max_attempts: Some(10),
        ..TaskSubmitRequest::default()
    }
}

/// Runs the soak, and reports its progress to `told`.
pub async fn run(options: &Options, told: impl Fn(Progress)) -> anyhow::Result<Report> {
    let seed = options.seed.unwrap_or_else(rand::random);
    let strikes = plan(seed, options.kills as usize);
    let mut chain = Chain::build(&Parts::beside(options.pools.into(), 2))?;
    told(Progress {
        kills: 0,
        jobs: 0,
        stage: "starting",
    });
    let result = run_on(&mut chain, options, seed, &strikes, &told).await;
    let broken = result.as_ref().map_or(true, |report| !report.is_sound());
    let kept = (broken || options.keep).then(|| chain.keep()).flatten();
    match result {
        Ok(report) => {
            if !broken {
                chain.close().await?;
            }
            Ok(Report { kept, ..report })
        }
        Err(error) => {
            let log = tail(&chain.orchestratord.log(), 10);
            let kept = kept.unwrap_or_default();
            Err(error.context(format!(
                "seed {seed}; homes and logs: {}; the end of the orchestrator's log:\n{log}",
                kept.display()
            )))
        }
    }
}

async fn run_on(
    chain: &mut Chain,
    options: &Options,
    seed: u64,
    strikes: &[Strike],
    told: &impl Fn(Progress),
) -> anyhow::Result<Report> {
    chain.start().await?;
    let clients = Clients::new(chain.url())?;
    let mut texts = Vec::new();
    for variant in 0..VARIANTS {
        let job = clients
            .submit(
                &format!("undisturbed-{variant}"),
                &request(variant, chain.models()),
            )
            .await?;
        let view = clients.wait(job).await?;
        if view.status != JobStatus::Completed {
            bail!("undisturbed, {job} is {}", view.status);
        }
        texts.push(view.text);
    }

    let (over, done) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut crowd = JoinSet::new();
    for number in 0..options.clients {
        let agent = Agent {
            clients: clients.clone(),
            name: format!("{number}"),
            models: chain.models().to_vec(),
            dice: ChaCha8Rng::seed_from_u64(seed ^ (u64::from(number) + 1) << 32),
            over: Arc::clone(&over),
            done: Arc::clone(&done),
        };
        crowd.spawn(agent.work());
    }

    let begun = Instant::now();
    let limit = options
        .minutes
        .map(|minutes| Duration::from_secs_f64(minutes * 60.0));
    let mut struck: BTreeMap<Victim, (u32, u32)> = Victim::ALL
        .into_iter()
        .map(|victim| (victim, (0, 0)))
        .collect();
    let mut violations = Vec::new();
    for strike in strikes {
        if limit.is_some_and(|limit| begun.elapsed() > limit) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(strike.after_ms)).await;
        hit(chain, strike, &mut struck)
            .await
            .with_context(|| format!("{strike:?}"))?;
        // Memory must fit at every moment, not only at the end.
        let hosts = chain.pools.iter().map(Pool::reservations).collect();
        violations.extend(check(&Evidence {
            hosts,
            ..Evidence::default()
        }));
        let kills = struck.values().map(|(kills, _)| kills).sum();
        told(Progress {
            kills,
            jobs: done.load(Ordering::Relaxed),
            stage: "striking",
        });
    }
    let elapsed = begun.elapsed();

    told(Progress {
        kills: struck.values().map(|(kills, _)| kills).sum(),
        jobs: done.load(Ordering::Relaxed),
        stage: "settling",
    });
    over.store(true, Ordering::Relaxed);
    let mut complaints = Vec::new();
    let mut undisturbed: BTreeMap<JobId, String> = BTreeMap::new();
    let deadline = tokio::time::sleep(SETTLE);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            agent = crowd.join_next() => match agent {
                None => break,
                Some(agent) => {
                    let found = agent.context("a client panicked")?;
                    complaints.extend(found.complaint);
                    undisturbed.extend(found.jobs.into_iter().map(|(job, variant)| (job, texts[variant].clone())));
                }
            },
            () = &mut deadline, if !deadline.is_elapsed() => clients.give_up(),
        }
    }
    let hosts = chain.hosts().await?;
    let record = Record::read(&chain.database()).await?;
    let mut jobs: BTreeMap<String, usize> = BTreeMap::new();
    for job in record.jobs.values() {
        *jobs.entry(job.status.to_string()).or_default() += 1;
    }
    let attempts = record.jobs.values().map(|job| job.attempts.len()).sum();
    let evidence = Evidence {
        history: clients.history(),
        record,
        hosts,
        undisturbed,
        settled: true,
    };
    violations.extend(check(&evidence));
    Ok(Report {
        seed,
        struck,
        elapsed,
        jobs,
        attempts,
        connections: clients.connections(),
        complaints,
        violations,
        kept: None,
    })
}

/// Returns a live worker. If none is left, waits until the next job starts one.
async fn a_worker(chain: &Chain, which: usize) -> anyhow::Result<ProcessIdentity> {
    eventually("a worker runs", || async {
        let workers = chain.pools.iter().flat_map(Pool::live);
        let mut alive: Vec<_> = workers
            .filter_map(|worker| worker.identity)
            .filter(ProcessIdentity::is_alive)
            .collect();
        (!alive.is_empty()).then(|| alive.swap_remove(which % alive.len()))
    })
    .await
}

/// Strikes one part, and counts the strike.
async fn hit(
    chain: &mut Chain,
    strike: &Strike,
    struck: &mut BTreeMap<Victim, (u32, u32)>,
) -> anyhow::Result<()> {
    let count = struck.entry(strike.victim).or_default();
    let pools = chain.pools.len();
    let daemon = match strike.victim {
        Victim::Orchestratord => &mut chain.orchestratord,
        Victim::PoolManager => &mut chain.pools[strike.which % pools].daemon,
        Victim::Worker => {
            let worker = a_worker(chain, strike.which).await?;
            match strike.blow {
                Blow::Kill { .. } => {
                    worker.signal(Signal::KILL)?;
                    count.0 += 1;
                }
                Blow::Freeze { for_ms } => {
                    worker.signal(Signal::STOP)?;
                    tokio::time::sleep(Duration::from_millis(for_ms)).await;
                    worker.signal(Signal::CONT)?;
                    count.1 += 1;
                }
            }
            return Ok(());
        }
    };
    if let Some(status) = daemon.ended()? {
        bail!(
            "{} ended unexpectedly with {status}:\n{}",
            daemon.name,
            tail(&daemon.log(), 10)
        );
    }
    match strike.blow {
        Blow::Kill { away_ms } => {
            daemon.kill()?;
            tokio::time::sleep(Duration::from_millis(away_ms)).await;
            daemon.launch()?;
            count.0 += 1;
        }
        Blow::Freeze { for_ms } => {
            daemon.signal(Signal::STOP)?;
            tokio::time::sleep(Duration::from_millis(for_ms)).await;
            daemon.signal(Signal::CONT)?;
            count.1 += 1;
        }
    }
    Ok(())
}

/// A client that requests one job after another.
struct Agent {
    clients: Clients,
    name: String,
    models: Vec<String>,
    dice: ChaCha8Rng,
    over: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
}

/// The outcome of a client.
struct AgentReport {
    /// The client's jobs, with the numbers of their requests.
    jobs: Vec<(JobId, usize)>,
    /// Error for which the client stopped early.
    complaint: Option<String>,
}

impl Agent {
    async fn work(mut self) -> AgentReport {
        let mut found = AgentReport {
            jobs: Vec::new(),
            complaint: None,
        };
        let mut number = 0;
        while !self.over.load(Ordering::Relaxed) {
            number += 1;
            let key = format!("client-{}-{number}", self.name);
            match self.one_job(&key).await {
                Ok(job) => found.jobs.push(job),
                Err(error) => {
                    found.complaint = Some(format!("{key}: {error:#}"));
                    break;
                }
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    async fn one_job(&mut self, key: &str) -> anyhow::Result<(JobId, usize)> {
        let variant = self.dice.random_range(0..VARIANTS);
        let request = request(variant, &self.models);
        let mut reading = Reading::default();
        for _ in 0..self.dice.random_range(0..4) {
            reading.cuts.push(self.dice.random_range(0..200));
        }
        if self.dice.random_range(0..6) == 0 {
            reading.cancel_after = Some(self.dice.random_range(0..100));
        }
        let clients = &self.clients;
        let job = match self.dice.random_range(0..3) {
            0 => {
                clients
                    .submit_and_read(key, &request, "first", &reading)
                    .await?
            }
            1 => {
                // Two submits at once, as from a proxy that repeats a request.
                let (job, again) =
                    tokio::join!(clients.submit(key, &request), clients.submit(key, &request));
                again?;
                let job = job?;
                clients.read(job, "first", &reading).await?;
                job
            }
            _ => {
                let job = clients.submit(key, &request).await?;
                if let Some(tokens) = reading.cancel_after {
                    tokio::time::sleep(Duration::from_millis(u64::from(tokens))).await;
                    clients.cancel(job).await?;
                }
                clients.wait(job).await?;
                job
            }
        };
        if self.dice.random_range(0..3) == 0 {
            clients.submit(key, &request).await?;
            clients.read(job, "second", &Reading::default()).await?;
        }
        clients.wait(job).await?;
        Ok((job, variant))
    }
}
