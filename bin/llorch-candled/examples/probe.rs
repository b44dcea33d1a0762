//! Computes logits and token ids as the worker does. `test-harness/bench/agree.py` compares them with those of llama.cpp.
//!
//! ```text
//! probe logits MODEL.gguf [threads=1] [rows=64] [tier=Avx2] [cache=q8_0]    ids to logits
//! probe tokens MODEL.gguf                                                   texts to ids
//! ```
//!
//! Input is a JSON array: of the ids of one sequence, or of texts. `logits` writes a row of 32-bit floats (little-endian) for
//! each id: the logits of the id that follows. The pass computes `rows` ids at a time; 1 is the way of decoding. `tokens`
//! writes a JSON array of arrays. Names of special tokens become these tokens, and none is added.

use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ValueEnum;
use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::prefill::CHUNK;
use llorch_candled::model::description::Description;
use llorch_candled::model::{BLOCK, Batch, Row};
use llorch_candled::tokenizer::Tokenizer;
use pool_core::catalog::gguf::GgufFile;
use pool_core::worker::CacheType;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let prefix = format!("{name}=");
        arguments.iter().find_map(|a| a.strip_prefix(&prefix))
    };
    let number = |name: &str, default: usize| {
        let number = value(name).map_or(Ok(default), str::parse);
        number.with_context(|| format!("`{name}` must be a number"))
    };
    match arguments.as_slice() {
        [mode, model, ..] if mode == "logits" => {
            let device = Device::Cpu {
                threads: number("threads", 1)?,
                tier: value("tier").map_or(Ok(Tier::best()), tier)?,
            };
            let cache = value("cache").unwrap_or("f16");
            let cache = CacheType::from_str(cache, false).map_err(anyhow::Error::msg)?;
            logits(Path::new(model), device, cache, number("rows", CHUNK)?)
        }
        [mode, model] if mode == "tokens" => tokens(Path::new(model)),
        _ => bail!("usage: probe logits|tokens MODEL.gguf [NAME=VALUE]..."),
    }
}

/// Returns the tier with this name, if the processor has it.
fn tier(name: &str) -> anyhow::Result<Tier> {
    let named = Tier::available().find(|tier| format!("{tier:?}").eq_ignore_ascii_case(name));
    named.with_context(|| {
        let names: Vec<_> = Tier::available().map(|tier| format!("{tier:?}")).collect();
        format!("no tier `{name}`: this processor has {}", names.join(", "))
    })
}

fn logits(path: &Path, device: Device, cache: CacheType, rows: usize) -> anyhow::Result<()> {
    let ids: Vec<u32> = serde_json::from_reader(io::stdin().lock())?;
    let header = GgufFile::open(path)?;
    let mut description = Description::from_header(&header, Some(ids.len()))?;
    description.cache = cache;
    let blocks = ids.len().div_ceil(BLOCK);
    let mut model = device.load(path, &header, description, blocks, &mut |_| {
        ControlFlow::Continue(())
    })?;
    let table: Vec<u32> = (0..).take(blocks).collect();
    let mut output = BufWriter::new(io::stdout().lock());
    let mut logits = Vec::new();
    for (chunk, ids) in ids.chunks(rows).enumerate() {
        let row = |(index, token): (usize, &u32)| Row {
            token: *token,
            position: chunk * rows + index,
            sequence: 0,
            wanted: true,
        };
        let batch: Vec<Row> = ids.iter().enumerate().map(row).collect();
        let batch = Batch {
            rows: &batch,
            tables: &[&table],
        };
        model.forward(&batch, &mut logits)?;
        for logit in &logits {
            output.write_all(&logit.to_le_bytes())?;
        }
    }
    Ok(output.flush()?)
}

fn tokens(path: &Path) -> anyhow::Result<()> {
    let texts: Vec<String> = serde_json::from_reader(io::stdin().lock())?;
    let tokenizer = Tokenizer::from_header(&GgufFile::open(path)?)?;
    let ids = texts.iter().map(|text| tokenizer.encode(text));
    let ids = ids.collect::<Result<Vec<_>, _>>()?;
    serde_json::to_writer(io::stdout().lock(), &ids)?;
    Ok(())
}
