//! Determinism: the same jobs run alone and concurrently, with and without shared prefixes and speculated tokens, with one and
//! two threads, with every instruction set, and cut and continued. All runs must give the same tokens.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::batcher::{Batcher, Ended};
use llorch_candled::engine::{Control, Engine, Halted, Sizes};
use pool_core::api::worker::{ExecuteRequest, Resume, Sampling, WorkerEvent};
use rand::rngs::ChaCha12Rng;
use rand::{RngExt as _, SeedableRng as _};

/// Runs random jobs in every way in which a worker may run them, and compares the tokens.
///
/// The reference runs each job alone, with one thread, the widest instruction set, no shared prefix and no speculated token.
/// Exits with 0 if no token differs, otherwise with 1.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Path of the model file.
    #[arg(long, value_name = "FILE", env = "LLORCH_TEST_MODEL")]
    pub model: PathBuf,
    /// Number of jobs.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub jobs: u32,
    /// Seed of the jobs, and of the places where they are cut.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Number of concurrent sequences.
const SIDE_BY_SIDE: usize = 8;
/// Context length of a job, in tokens.
const CONTEXT: usize = 512;
/// Tokens of the KV cache when many jobs share it: too few for all, so that some jobs are paused.
const CACHE: usize = 1024;

/// Prefixes that prompts may share.
const BEGINNINGS: [&str; 3] = [
    "You are a careful assistant. You answer in short sentences, you name your sources, and where you don't know something you \
     say so. Never invent a number. Question: ",
    "The following is a conversation between a customer and the service desk of a small library in the north of the country. \
     The customer begins: ",
    "",
];

/// Endings of the prompts.
const SUBJECTS: [&str; 8] = [
    "why is the sky blue?",
    "List the first ten prime numbers and the first ten square numbers.",
    "a short story about a lighthouse, in the style of an old sailor",
    "Repeat after me: red green blue, red green blue, red green blue",
    "fn main() { let numbers = vec![1, 2, 3]; for number in",
    "Was ist der Unterschied zwischen einem Apfel und einer Birne?",
    "2, 4, 6, 8, 10, 12,",
    "x",
];

/// A configuration in which the jobs run.
#[derive(Debug, Clone, Copy)]
struct Way {
    tier: Tier,
    threads: usize,
    /// Number of concurrent jobs.
    at_once: usize,
    speculates: bool,
    /// True if jobs may share the cache of a common prefix.
    shares: bool,
    /// True if each job is cut at a random token and continued.
    cut: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = match self.threads {
            1 => "1 thread".to_owned(),
            threads => format!("{threads} threads"),
        };
        write!(f, "{:?}, {threads}, {} at once", self.tier, self.at_once)?;
        for (is, what) in [
            (self.shares, "shared beginnings"),
            (self.speculates, "guessed tokens"),
            (self.cut, "cut and continued"),
        ] {
            if is {
                write!(f, ", {what}")?;
            }
        }
        Ok(())
    }
}

/// Returns the configurations to compare, the reference first.
fn ways() -> Vec<Way> {
    let reference = Way {
        tier: Tier::best(),
        threads: 1,
        at_once: 1,
        speculates: false,
        shares: false,
        cut: false,
    };
    let full = Way {
        at_once: SIDE_BY_SIDE,
        speculates: true,
        shares: true,
        ..reference
    };
    let mut ways = vec![
        reference,
        Way {
            speculates: true,
            ..reference
        },
        Way {
            shares: true,
            ..reference
        },
        Way {
            threads: 2,
            ..reference
        },
        Way {
            at_once: SIDE_BY_SIDE,
            ..reference
        },
        full,
        Way { threads: 2, ..full },
        Way { cut: true, ..full },
    ];
    // The slowest instruction set comes last.
    let others = Tier::available().rev();
    let others = others.filter(|tier| *tier != reference.tier);
    ways.extend(others.map(|tier| Way { tier, ..full }));
    ways
}

fn jobs(options: &Options) -> Vec<ExecuteRequest> {
    let mut rng = ChaCha12Rng::seed_from_u64(options.seed);
    let job = |number| {
        let beginning = BEGINNINGS[rng.random_range(0..BEGINNINGS.len())];
        let subject = SUBJECTS[rng.random_range(0..SUBJECTS.len())];
        ExecuteRequest {
            job_id: format!("job-{number}"),
            attempt: 1,
            fence: 1,
            prompt: Some(format!("{beginning}{subject}")),
            messages: None,
            raw: true,
            allow_special: false,
            system: None,
            sampling: Sampling {
                temperature: 0.8,
                ..Sampling::default()
            },
            seed: rng.random(),
            max_tokens: rng.random_range(4..64),
            stop: Vec::new(),
            resume: None,
            cache_scope: None,
            refuse_if_full: false,
        }
    };
    (0..options.jobs).map(job).collect()
}

/// Collector of the tokens of one answer.
struct Listener {
    job: usize,
    ids: Vec<u32>,
}

impl Control for Listener {
    fn check(&self) -> Result<(), Halted> {
        Ok(())
    }

    fn event(&mut self, event: WorkerEvent) {
        if let WorkerEvent::Token(token) = event {
            self.ids.extend(token.ids);
        }
    }

    fn progress(&mut self) {}

    fn drawn(&mut self) {}
}

/// Runs the jobs, and returns the tokens of each.
fn run(model: &Path, way: Way, jobs: Vec<ExecuteRequest>) -> anyhow::Result<Vec<Vec<u32>>> {
    let device = Device::Cpu {
        threads: way.threads,
        tier: way.tier,
    };
    let sizes = Sizes {
        context_length: Some(CONTEXT),
        cache_tokens: Some(CACHE),
        slots: way.at_once,
        ..Sizes::default()
    };
    let engine = Engine::load(model, device, sizes, &mut |_, _| ())
        .with_context(|| format!("could not load {}", model.display()))?;
    let mut answers: Vec<Vec<u32>> = vec![Vec::new(); jobs.len()];
    let mut batcher = Batcher::new(&engine).speculate(way.speculates);
    let mut next = jobs.into_iter().enumerate();
    loop {
        while batcher.len() < way.at_once
            && let Some((job, mut request)) = next.next()
        {
            if !way.shares {
                // With a scope of its own, a job finds no cached prefix of another job.
                request.cache_scope = Some(request.job_id.clone());
            }
            if let Some(resume) = &mut request.resume {
                resume.origin = Some(engine.origin().clone());
                answers[job].clone_from(&resume.token_ids);
            }
            let generation = engine.prepare(request, Instant::now())?;
            let ids = Vec::new();
            batcher.add(generation, Listener { job, ids });
        }
        if batcher.is_empty() {
            return Ok(answers);
        }
        for Ended { control, outcome } in batcher.step().1 {
            outcome.with_context(|| format!("job {} failed", control.job))?;
            answers[control.job].extend(control.ids);
        }
    }
}

/// The result of one configuration.
#[derive(Debug)]
pub struct Outcome {
    /// Configuration of the run.
    way: Way,
    /// Number of tokens of all answers.
    tokens: usize,
    /// Jobs whose tokens differ from the reference, each with the index of the first difference.
    different: Vec<(usize, usize)>,
    elapsed: Duration,
}

impl Outcome {
    /// Returns whether no token differs.
    pub fn is_equal(&self) -> bool {
        self.different.is_empty()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            way,
            tokens,
            different,
            elapsed,
        } = self;
        write!(f, "{way}: {tokens} tokens in {elapsed:.0?}, ")?;
        match different.first() {
            None => write!(f, "no difference"),
            Some((job, token)) => write!(
                f,
                "{} jobs differ, the first is job {job} at token {token}",
                different.len()
            ),
        }
    }
}

/// Runs the jobs in all configurations, and reports each outcome to `told`.
pub fn compare(options: &Options, mut told: impl FnMut(&Outcome)) -> anyhow::Result<Vec<Outcome>> {
    let jobs = jobs(options);
    let mut rng = ChaCha12Rng::seed_from_u64(!options.seed);
    let mut reference: Vec<Vec<u32>> = Vec::new();
    let mut outcomes = Vec::new();
    for way in ways() {
        let start = Instant::now();
        let mut requests = jobs.clone();
        if way.cut {
            for (request, ids) in requests.iter_mut().zip(&reference) {
                let kept = rng.random_range(0..ids.len().max(1));
                request.resume = Some(Resume {
                    token_ids: ids[..kept].to_vec(),
                    ..Resume::default()
                });
            }
        }
        let answers = run(&options.model, way, requests)?;
        if reference.is_empty() {
            reference.clone_from(&answers);
            let different: HashSet<&Vec<u32>> = answers.iter().collect();
            if different.len() < 2 && jobs.len() > 1 {
                bail!("all jobs gave the same tokens: the comparison proves nothing");
            }
        }
        let pairs = answers.iter().zip(&reference).enumerate();
        let different = pairs.filter(|(_, (answer, reference))| answer != reference);
        let different = different.map(|(job, (answer, reference))| {
            let same = answer.iter().zip(reference).take_while(|(a, b)| a == b);
            (job, same.count())
        });
        let outcome = Outcome {
            way,
            tokens: answers.iter().map(Vec::len).sum(),
            different: different.collect(),
            elapsed: start.elapsed(),
        };
        told(&outcome);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}
