//! Speed of the engine on a model file: tokens per second of prefill, of decode and of several concurrent answers, load time,
//! and memory.
//!
//! ```text
//! cargo bench -p llorch-candled --bench engine -- MODEL.gguf [threads=1,2] [tier=Avx2] [reference] [cache=q8_0] [runs=5] [WHAT]
//! ```
//!
//! `reference` measures candle's products instead. WHAT is `prefill`, `depth=0,512` (decode at these depths only), `single`
//! (both, for one sequence) or `answers=8` (only this number of concurrent answers). Figures are medians of the runs, with the
//! minimum and the maximum.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::batcher::{Batcher, Ended};
use llorch_candled::engine::sequence::Sequence;
use llorch_candled::engine::{Control, Engine, Halted, Sizes};
use pool_core::api::worker::{ExecuteRequest, Sampling, WorkerEvent};
use pool_core::kit::host_memory::private_bytes;
use pool_core::worker::CacheType;

const PREFILL: usize = 512;
const DECODE: usize = 128;
/// Tokens of a long prompt.
const LONG: usize = 4000;

fn main() {
    let arguments = std::env::args().skip(1);
    let arguments: Vec<String> = arguments.filter(|a| !a.starts_with("--")).collect();
    let value = |name: &str| value(&arguments, name);
    let model = arguments.first().cloned();
    let Some(model) = model.or_else(|| std::env::var("LLORCH_TEST_MODEL").ok()) else {
        println!("skipped: no model file is named");
        return;
    };
    let tier = value("tier").and_then(|name| Tier::available().find(|t| format!("{t:?}") == name));
    let tier = tier.unwrap_or_else(Tier::best);
    let reference = arguments.iter().any(|a| a == "reference");
    let what = What::from(&arguments);
    for threads in value("threads").unwrap_or("1,2").split(',') {
        let threads: usize = threads.parse().expect("a number of threads");
        let device = match reference {
            true => Device::Reference,
            false => Device::Cpu { threads, tier },
        };
        measure(Path::new(&model), device, &what);
    }
}

/// Returns the text after `name=`.
fn value<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let mut values = arguments.iter().filter_map(|a| a.strip_prefix(name));
    values.find_map(|value| value.strip_prefix('='))
}

fn number(text: &str) -> usize {
    text.parse().expect("a number")
}

/// The selection of measurements.
struct What {
    runs: usize,
    /// True to measure prefill.
    prefill: bool,
    /// Numbers of earlier tokens after which decode is measured.
    depths: Vec<usize>,
    /// Number of concurrent answers, if only they are measured.
    answers: Option<u64>,
    /// True to measure only one sequence.
    single: bool,
    /// Form of keys and values in the cache.
    cache: CacheType,
}

impl What {
    fn from(arguments: &[String]) -> Self {
        let has = |word: &str| arguments.iter().any(|a| a == word);
        let value = |name: &str| value(arguments, name);
        let depths = value("depth").map(|depths| depths.split(',').map(number).collect());
        let is_part = has("prefill") || depths.is_some();
        Self {
            runs: value("runs").map_or(5, number),
            prefill: depths.is_none(),
            depths: match depths {
                Some(depths) => depths,
                None if has("prefill") => Vec::new(),
                None => vec![0, PREFILL],
            },
            answers: value("answers").map(|answers| number(answers) as u64),
            single: is_part || has("single"),
            cache: CacheType::from_str(value("cache").unwrap_or("f16"), false)
                .expect("`f16` or `q8_0`"),
        }
    }
}

fn measure(model: &Path, device: Device, what: &What) {
    let deepest = what.depths.iter().copied().max().unwrap_or(0);
    let context = PREFILL.max(deepest + DECODE);
    let sizes = Sizes {
        context_length: Some(context),
        // Room for concurrent answers.
        cache_tokens: Some(context.max(4 * PREFILL)),
        cache_type: what.cache,
        ..Sizes::default()
    };
    let start = Instant::now();
    let engine = Engine::load(model, device, sizes, &mut |_, _| ()).expect("the model loads");
    let loaded = start.elapsed();
    engine.warm_up().expect("the model computes");
    let mib = private_bytes(std::process::id()).unwrap_or_default() >> 20;
    println!("{device:?}: loaded in {loaded:.0?}, {mib} MiB of its own");
    if let Some(answers) = what.answers {
        return show_answers(&engine, answers, what.runs);
    }
    let vocab = engine.description().vocab as u32;
    let tokens: Vec<u32> = (0..context as u32)
        .map(|i| (i * 7919 + 13) % vocab)
        .collect();
    if what.prefill {
        show("prefill 512", what.runs, || {
            let mut sequence = engine.sequence(PREFILL).expect("room");
            rate(PREFILL, || drop(prefill(&mut sequence, &tokens[..PREFILL])))
        });
    }
    for depth in &what.depths {
        show(&format!("decode 128 at {depth}"), what.runs, || {
            let mut sequence = engine.sequence(depth + DECODE).expect("room");
            if *depth > 0 {
                prefill(&mut sequence, &tokens[..*depth]);
            }
            rate(DECODE, || {
                for token in &tokens[..DECODE] {
                    sequence.logits(&[*token]).expect("the model computes");
                }
            })
        });
    }
    if what.single {
        return;
    }
    for answers in [1, 4, 8] {
        show_answers(&engine, answers, what.runs);
    }
    drop(engine);
    show_pause(model, device, what);
}

/// Prints the longest pause of answers while a long prompt is computed.
fn show_pause(model: &Path, device: Device, what: &What) {
    let sizes = Sizes {
        context_length: Some(LONG + 1),
        cache_tokens: Some(LONG + 8 * 512),
        cache_type: what.cache,
        slots: 9,
    };
    let Ok(engine) = Engine::load(model, device, sizes, &mut |_, _| ()) else {
        return println!("  the model's context is too short for a prompt of {LONG} tokens");
    };
    let runs = what.runs;
    let mut pauses: Vec<f64> = (0..runs)
        .map(|run| longest_pause(&engine, run as u64).as_secs_f64() * 1000.0)
        .collect();
    pauses.sort_by(f64::total_cmp);
    let (least, median, most) = (pauses[0], pauses[runs / 2], pauses[runs - 1]);
    println!(
        "  longest pause of 8 answers beside a prompt of {LONG} tokens: {median:.0} ms [{least:.0}..{most:.0}]"
    );
}

fn longest_pause(engine: &Engine, run: u64) -> Duration {
    let longest = Rc::new(Cell::new(Duration::ZERO));
    let paced = || Paced {
        last: None,
        longest: Rc::clone(&longest),
    };
    let mut batcher = Batcher::new(engine);
    for seed in 0..8 {
        let request = request(
            &format!("Once upon a time there were {seed} small"),
            seed,
            400,
        );
        let generation = engine.prepare(request, Instant::now());
        batcher.add(generation.expect("the prompt is valid"), paced());
    }
    for _ in 0..16 {
        batcher.step();
    }
    longest.set(Duration::ZERO);
    // A different prompt in each run, so that the cache doesn't have it.
    let words = (0..).map(|n| format!(" {}", (n + run) % 10));
    let prompt: String = words.take(LONG / 2 - 50).collect();
    let generation = engine.prepare(request(&prompt, 9, 1), Instant::now());
    batcher.add(generation.expect("the prompt fits"), paced());
    let is_long = |ended: &Ended<Paced>| {
        let end = ended.outcome.as_ref().expect("the model computes");
        end.tokens_in as usize > LONG / 2
    };
    while !batcher.step().1.iter().any(is_long) {}
    longest.get()
}

/// A control that records the longest time between two tokens.
struct Paced {
    last: Option<Instant>,
    longest: Rc<Cell<Duration>>,
}

impl Control for Paced {
    fn check(&self) -> Result<(), Halted> {
        Ok(())
    }

    fn event(&mut self, _: WorkerEvent) {}

    fn progress(&mut self) {}

    fn drawn(&mut self) {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.longest.set(self.longest.get().max(now - last));
        }
    }
}

/// Returns a request with a raw prompt.
fn request(prompt: &str, seed: u64, max_tokens: u32) -> ExecuteRequest {
    ExecuteRequest {
        job_id: String::new(),
        attempt: 1,
        fence: 1,
        prompt: Some(prompt.to_owned()),
        messages: None,
        raw: true,
        allow_special: false,
        system: None,
        sampling: Sampling::default(),
        seed,
        max_tokens,
        stop: Vec::new(),
        resume: None,
        cache_scope: None,
        refuse_if_full: false,
    }
}

fn show_answers(engine: &Engine, answers: u64, runs: usize) {
    show(&format!("{answers} answers"), runs, || {
        let (time, tokens) = side_by_side(engine, answers);
        f64::from(tokens) / time.as_secs_f64()
    });
}

/// Writes answers of 128 tokens to short prompts. Returns the time taken and the number of tokens.
fn side_by_side(engine: &Engine, answers: u64) -> (Duration, u32) {
    let mut batcher = Batcher::new(engine);
    let start = Instant::now();
    for seed in 0..answers {
        let prompt = format!("Once upon a time there were {seed} small");
        let request = request(&prompt, seed, DECODE as u32);
        let generation = engine.prepare(request, start).expect("the prompt is valid");
        batcher.add(generation, Silent);
    }
    let mut tokens = 0;
    while !batcher.is_empty() {
        for ended in batcher.step().1 {
            tokens += ended.outcome.expect("the model computes").tokens_out;
        }
    }
    (start.elapsed(), tokens)
}

/// A control that ignores all events.
struct Silent;

impl Control for Silent {
    fn check(&self) -> Result<(), Halted> {
        Ok(())
    }

    fn event(&mut self, _: WorkerEvent) {}

    fn progress(&mut self) {}

    fn drawn(&mut self) {}
}

fn prefill(sequence: &mut Sequence<'_>, tokens: &[u32]) -> Vec<f32> {
    llorch_candled::engine::prefill::prefill(sequence, tokens, &mut |_| Ok(()))
        .expect("the model computes")
}

/// Returns the tokens per second of work on `tokens` tokens.
fn rate(tokens: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    tokens as f64 / start.elapsed().as_secs_f64()
}

/// Runs a measurement in tokens per second, once more than it counts, and prints the result.
fn show(what: &str, runs: usize, mut run: impl FnMut() -> f64) {
    run();
    let mut rates: Vec<f64> = (0..runs).map(|_| run()).collect();
    rates.sort_by(f64::total_cmp);
    let (least, median, most) = (rates[0], rates[runs / 2], rates[runs - 1]);
    println!("  {what:<18} {median:>8.1} tokens/s [{least:.1}..{most:.1}]");
}
