//! Speed of the engine on a model file: tokens a second of prefill and decode, load time, memory.
//!
//! ```text
//! cargo bench -p llorch-candled --bench engine -- MODEL.gguf [threads=1,2] [tier=Avx2] [reference]
//! ```
//!
//! `reference` measures candle's products instead. Figures are medians of five runs, with the least and the largest.

use std::path::Path;
use std::time::{Duration, Instant};

use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::host::private_bytes;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::Engine;
use llorch_candled::engine::sequence::Sequence;

const PREFILL: usize = 512;
const DECODE: usize = 128;
const RUNS: usize = 5;

fn main() {
    let arguments = std::env::args().skip(1);
    let arguments: Vec<String> = arguments.filter(|a| !a.starts_with("--")).collect();
    let value = |name: &str| {
        let prefix = format!("{name}=");
        arguments.iter().find_map(|a| a.strip_prefix(&prefix))
    };
    let model = arguments.first().cloned();
    let Some(model) = model.or_else(|| std::env::var("LLORCH_TEST_MODEL").ok()) else {
        println!("skipped: no model file is named");
        return;
    };
    let tier = value("tier").and_then(|name| {
        let tiers = Tier::ALL.into_iter();
        tiers
            .filter(|t| t.is_available())
            .find(|t| format!("{t:?}") == name)
    });
    let tier = tier.unwrap_or_else(Tier::best);
    let reference = arguments.iter().any(|a| a == "reference");
    for threads in value("threads").unwrap_or("1,2").split(',') {
        let threads: usize = threads.parse().expect("a number of threads");
        let device = match reference {
            true => Device::Reference,
            false => Device::Cpu { threads, tier },
        };
        measure(Path::new(&model), device);
    }
}

fn measure(model: &Path, device: Device) {
    let start = Instant::now();
    let engine =
        Engine::load(model, device, Some(2 * PREFILL), 1, &mut |_, _| ()).expect("the model loads");
    let loaded = start.elapsed();
    engine.warm_up().expect("the model computes");
    let mib = private_bytes().unwrap_or_default() >> 20;
    println!("{device:?}: loaded in {loaded:.0?}, {mib} MiB of its own");
    let vocab = engine.description().vocab as u32;
    let tokens: Vec<u32> = (0..PREFILL as u32)
        .map(|i| (i * 7919 + 13) % vocab)
        .collect();
    show("prefill 512", PREFILL, || {
        let mut sequence = engine.sequence(PREFILL).expect("room");
        timed(|| drop(prefill(&mut sequence, &tokens)))
    });
    for depth in [1, PREFILL] {
        show(&format!("decode 128 at {depth}"), DECODE, || {
            let mut sequence = engine.sequence(depth + DECODE).expect("room");
            prefill(&mut sequence, &tokens[..depth]);
            timed(|| {
                for token in &tokens[..DECODE] {
                    sequence.logits(&[*token]).expect("the model computes");
                }
            })
        });
    }
}

fn prefill(sequence: &mut Sequence<'_>, tokens: &[u32]) -> Vec<f32> {
    llorch_candled::engine::prefill::prefill(sequence, tokens, &mut |_| Ok(()))
        .expect("the model computes")
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn show(what: &str, tokens: usize, mut run: impl FnMut() -> Duration) {
    run();
    let mut rates: Vec<f64> = (0..RUNS)
        .map(|_| tokens as f64 / run().as_secs_f64())
        .collect();
    rates.sort_by(f64::total_cmp);
    let (least, median, most) = (rates[0], rates[RUNS / 2], rates[RUNS - 1]);
    println!("  {what:<18} {median:>8.1} tokens/s [{least:.1}..{most:.1}]");
}
