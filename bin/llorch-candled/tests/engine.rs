//! The engine on tiny models: the effect of each request field, and the invariants.

mod support;

use std::cell::Cell;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::{Control, Engine, Failure, Halted, Sizes};
use llorch_candled::model::description::Description;
use llorch_candled::model::{Batch, Model, Row};
use pool_core::api::worker::{
    ContextOverflow, ExecuteRequest, Resume, Sampling, StopReason, WorkerErrorCode, WorkerEvent,
};
use pool_core::catalog::gguf::GgufFile;
use pool_core::catalog::support as supported;
use pool_core::kit::errors::with_causes;
use pool_core::worker::CacheType;
use support::tiny_model::{BLOCKS, TinyModel};
use support::{
    answer, assert_contiguous, cpu, engine, greedy, run, sampled, tiny, tiny_on, tiny_sized, warm,
};

const ARCHITECTURES: [&str; 5] = ["gemma3", "llama", "phi3", "qwen2", "qwen3"];

/// Returns a model with enough layers to include every kind of layer.
fn of_architecture(architecture: &'static str) -> TinyModel {
    TinyModel {
        architecture,
        blocks: 7,
        ..TinyModel::default()
    }
}

/// Returns the logits of the last of some tokens, computed in one pass.
fn logits(engine: &Engine, tokens: &[u32]) -> Vec<f32> {
    let mut sequence = engine.sequence(tokens.len()).expect("the cache has room");
    sequence.logits(tokens).expect("the model computes")
}

// [CAND-011]
#[test]
fn every_architecture_computes_what_the_reference_computes() {
    for architecture in ARCHITECTURES {
        let model = of_architecture(architecture);
        let tokens: Vec<u32> = (0..100).map(|i| (i * 11) % 230).collect();
        let found = logits(&tiny(&model).unwrap(), &tokens);
        let expected = logits(&tiny_on(Device::Reference, &model).unwrap(), &tokens);
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let difference: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let error = norm(&difference) / norm(&expected);
        // The cache here holds half-precision keys and values, the reference full-precision ones.
        assert!(error < 5e-3, "{architecture}: the error is {error}");
    }
}

// [CAND-074]
#[cfg(target_os = "linux")]
#[test]
fn an_unusable_tokenizer_ends_the_reading_of_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let model = TinyModel {
        blocks: 40,
        ..TinyModel::default()
    };
    let mut file = model.bytes();
    let place = file.windows(5).position(|text| text == b"gpt-2");
    file[place.expect("its way of splitting") + 4] = b'9';
    std::fs::write(&path, file).unwrap();
    let (mut read, mut total) = (0, 0);
    let loaded = Engine::load(&path, cpu(), Sizes::default(), &mut |now, all| {
        (read, total) = (now, all);
        // Wait for the tokenizer, so that reading a small file takes as long as a large one.
        while has_thread("tokenizer") {
            std::thread::yield_now();
        }
    });
    let error = loaded.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("gpt-9"), "{error}");
    assert!(read < total, "{read} of {total} bytes were read");
}

/// Returns whether this process has a thread with this name.
#[cfg(target_os = "linux")]
fn has_thread(name: &str) -> bool {
    let threads = std::fs::read_dir("/proc/self/task").expect("the threads of this process");
    let names = threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    names.into_iter().any(|found| found.trim_end() == name)
}

// [CAND-014]
#[test]
fn bits_depend_neither_on_instructions_nor_on_threads() {
    for (architecture, cache_type) in architectures_and_caches() {
        let model = of_architecture(architecture);
        let tokens: Vec<u32> = (0..70).map(|i| (i * 13) % 230).collect();
        let sizes = Sizes {
            cache_type,
            ..Sizes::default()
        };
        let bits = |threads, tier| {
            let engine = tiny_sized(Device::Cpu { threads, tier }, sizes, &model).unwrap();
            let logits = logits(&engine, &tokens);
            logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let expected = bits(1, Tier::Portable);
        for tier in Tier::available() {
            for threads in [1, 2, 3] {
                assert_eq!(
                    bits(threads, tier),
                    expected,
                    "{architecture}, {cache_type}, {tier:?}, {threads}"
                );
            }
        }
    }
}

// [CAND-014] [CAND-013]
#[test]
fn sequences_in_one_batch_have_the_bits_that_each_has_alone() {
    for (architecture, cache_type) in architectures_and_caches() {
        let (folder, model) = (tempfile::tempdir().unwrap(), of_architecture(architecture));
        let path = folder.path().join("tiny.gguf");
        model.write(&path).unwrap();
        let header = GgufFile::open(&path).unwrap();
        let load = |threads| {
            let tier = Tier::best();
            let device = Device::Cpu { threads, tier };
            let mut description = Description::from_header(&header, None).unwrap();
            description.cache = cache_type;
            let mut go_on = |_| ControlFlow::Continue(());
            let load = device.load(&path, &header, description, 8, &mut go_on);
            load.unwrap()
        };
        let tokens = |step: u32, count: u32| (0..count).map(|i| (i * step) % 230).collect();
        let sequences: [Vec<u32>; 2] = [tokens(11, 40), tokens(17, 23)];
        let tables: [&[u32]; 2] = [&[5, 0, 6], &[3, 7]];
        let rows =
            |sequence: usize, range: Range<usize>| range.map(move |position| (sequence, position));
        let compute = |model: &mut dyn Model, places: Vec<(usize, usize)>| {
            let row = |(sequence, position): (usize, usize)| Row {
                token: sequences[sequence][position],
                position,
                sequence,
                wanted: position + 1 == sequences[sequence].len(),
            };
            let rows: Vec<Row> = places.into_iter().map(row).collect();
            let mut logits = Vec::new();
            let batch = Batch {
                rows: &rows,
                tables: &tables,
            };
            model.forward(&batch, &mut logits).unwrap();
            logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let mut alone = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            let places = rows(index, 0..sequence.len()).collect();
            alone.extend(compute(&mut *load(1), places));
        }
        let mut both = load(2);
        let first = rows(0, 0..10).chain(rows(1, 0..17)).collect();
        assert!(compute(&mut *both, first).is_empty());
        let rest = rows(0, 10..40).chain(rows(1, 17..23)).collect();
        assert_eq!(
            compute(&mut *both, rest),
            alone,
            "{architecture}, {cache_type}"
        );
    }
}

fn architectures_and_caches() -> impl Iterator<Item = (&'static str, CacheType)> {
    let caches = [CacheType::F16, CacheType::Q8_0];
    ARCHITECTURES
        .into_iter()
        .flat_map(move |architecture| caches.map(|cache| (architecture, cache)))
}

// [CAND-093]
#[test]
fn a_cache_of_bytes_takes_less_memory_and_changes_little() {
    for architecture in ARCHITECTURES {
        let model = of_architecture(architecture);
        let load = |cache_type| {
            let sizes = Sizes {
                cache_type,
                ..Sizes::default()
            };
            tiny_sized(cpu(), sizes, &model).expect("the model loads")
        };
        let (halves, bytes) = (load(CacheType::F16), load(CacheType::Q8_0));
        assert!(bytes.working_bytes() < halves.working_bytes());
        let tokens: Vec<u32> = (0..70).map(|i| (i * 13) % 230).collect();
        let [expected, found] = [&halves, &bytes].map(|engine| logits(engine, &tokens));
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let difference: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let error = norm(&difference) / norm(&expected);
        assert!(
            error > 0.0 && error < 5e-2,
            "{architecture}: the error is {error}"
        );
        assert_ne!(
            halves.origin(),
            bytes.origin(),
            "tokens are of another origin"
        );
    }
}

// [CAND-014]
#[test]
fn a_batch_that_contradicts_itself_is_refused() {
    let row = |token, position, sequence| Row {
        token,
        position,
        sequence,
        wanted: false,
    };
    let refused = |rows: &[Row], tables: &[&[u32]]| {
        let batch = Batch { rows, tables };
        batch.runs(100, 64, 4).map_err(|error| error.to_string())
    };
    let one: &[&[u32]] = &[&[0, 3]];
    for (rows, tables, reason) in [
        (
            &[row(100, 0, 0)][..],
            one,
            "a token is outside the vocabulary",
        ),
        (
            &[row(0, 64, 0)],
            one,
            "a position is beyond the model's context",
        ),
        (&[row(0, 32, 0)], one, "a row has no block"),
        (&[row(0, 0, 1)], one, "a row has no block"),
        (&[row(0, 0, 0), row(0, 2, 0)], one, "positions have gaps"),
        (&[row(0, 0, 0)], &[&[4][..]], "a block is outside the cache"),
        (
            &[row(0, 5, 0), row(0, 4, 1)],
            &[&[2][..], &[2]],
            "two rows share a place in the cache",
        ),
        (
            &[row(0, 15, 0), row(0, 16, 0)],
            &[&[2, 2][..]],
            "two rows share a place in the cache",
        ),
        (
            &[row(0, 0, 0), row(0, 0, 1), row(0, 1, 0)],
            &[&[0][..], &[1]],
            "the rows of a sequence are not contiguous",
        ),
    ] {
        let found = refused(rows, tables).unwrap_err();
        assert!(found.ends_with(reason), "{found} instead of {reason}");
    }
    let runs = refused(&[row(0, 5, 0), row(0, 6, 0), row(1, 0, 1)], &[&[0], &[1]]).unwrap();
    let rows: Vec<_> = runs.into_iter().map(|run| run.rows).collect();
    assert_eq!(rows, [0..2, 2..3]);
}

// [CAND-011]
#[test]
fn every_architecture_computes_the_same_in_chunks_and_token_by_token() {
    for architecture in ARCHITECTURES {
        let engine = tiny(&of_architecture(architecture)).unwrap();
        let tokens: Vec<u32> = (0..150).map(|i| (i * 7) % 200).collect();
        let at_once = engine
            .sequence(tokens.len())
            .unwrap()
            .logits(&tokens)
            .unwrap();
        let mut chunked = engine.sequence(tokens.len()).unwrap();
        let in_chunks =
            llorch_candled::engine::prefill::prefill(&mut chunked, &tokens, &mut |_| Ok(()))
                .unwrap();
        let mut single = engine.sequence(tokens.len()).unwrap();
        let one_by_one = tokens
            .iter()
            .map(|t| single.logits(&[*t]).unwrap())
            .last()
            .unwrap();
        for other in [in_chunks, one_by_one] {
            assert_eq!(other, at_once, "{architecture}");
        }
    }
}

// [CAND-010]
#[test]
fn other_architectures_are_refused_by_name() {
    let Err(error) = tiny(&TinyModel {
        architecture: "mamba",
        ..TinyModel::default()
    }) else {
        panic!("it loaded")
    };
    let text = error.to_string();
    assert!(
        text.contains("`mamba`") && text.contains("gemma3, llama, phi3, qwen2, qwen3"),
        "{text}"
    );
}

// [CAND-046]
#[test]
fn the_same_seed_gives_the_same_text_and_another_seed_another() {
    let engine = engine();
    let first = answer(&engine, sampled(1, warm()));
    assert_eq!(first.end.stop_reason, StopReason::MaxTokens);
    assert_eq!((first.end.tokens_out, first.end.seed), (60, 1));
    assert_contiguous(&first);
    assert_eq!(first.text, answer(&engine, sampled(1, warm())).text);
    assert_ne!(first.text, answer(&engine, sampled(2, warm())).text);
}

// [CAND-041] [CAND-042] [CAND-043] [CAND-044] [CAND-045]
#[test]
fn every_sampling_field_changes_the_outcome() {
    let engine = engine();
    let text = |sampling| answer(&engine, sampled(3, sampling)).text;
    let greedy_text = text(Sampling {
        temperature: 0.0,
        ..warm()
    });
    let plain = text(warm());
    assert_ne!(plain, greedy_text);
    assert_ne!(
        plain,
        text(Sampling {
            temperature: 1.6,
            ..warm()
        })
    );
    for (name, sampling) in [
        ("top_k", Sampling { top_k: 1, ..warm() }),
        (
            "top_p",
            Sampling {
                top_p: 1e-6,
                ..warm()
            },
        ),
        (
            "min_p",
            Sampling {
                min_p: 0.999_999,
                ..warm()
            },
        ),
    ] {
        assert_eq!(
            text(sampling),
            greedy_text,
            "{name} so narrow that only the likeliest token is left"
        );
    }
    assert_ne!(plain, text(Sampling { top_k: 3, ..warm() }));
    assert_ne!(
        plain,
        text(Sampling {
            top_p: 0.5,
            ..warm()
        })
    );
    assert_ne!(
        plain,
        text(Sampling {
            min_p: 0.3,
            ..warm()
        })
    );
    let penalised = text(Sampling {
        temperature: 0.0,
        repetition_penalty: 2.0,
        ..warm()
    });
    let distinct = |text: &str| {
        text.chars()
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    };
    assert!(
        distinct(&penalised) > distinct(&greedy_text),
        "{penalised:?} repeats no less than {greedy_text:?}"
    );
}

// [CAND-050]
#[test]
fn a_stop_text_across_tokens_ends_the_answer_before_it() {
    let engine = engine();
    let whole = answer(&engine, sampled(5, warm()));
    let stop = whole.text[20..24].to_owned();
    let until = whole.text.find(&stop).unwrap();
    let stopped = answer(
        &engine,
        ExecuteRequest {
            stop: vec!["\u{7f}never".into(), stop],
            ..sampled(5, warm())
        },
    );
    assert_eq!(stopped.text, whole.text[..until]);
    assert_eq!(stopped.end.stop_reason, StopReason::StopSequence);
    assert_eq!(
        stopped.end.tokens_out as usize,
        until + 4,
        "tokens of the stop text were generated too"
    );
    assert_contiguous(&stopped);
}

// [CAND-051]
#[test]
fn held_back_text_comes_out_at_the_end() {
    let engine = engine();
    let whole = answer(&engine, sampled(5, warm()));
    let begins = format!("{}\u{7f}", &whole.text[57..]);
    let held = answer(
        &engine,
        ExecuteRequest {
            stop: vec![begins],
            ..sampled(5, warm())
        },
    );
    assert_eq!(
        (held.text, held.end.stop_reason),
        (whole.text, StopReason::MaxTokens)
    );
    assert_eq!(held.pieces.last().unwrap().ids.len(), 3);
}

// [CAND-052]
#[test]
fn the_context_bounds_prompt_and_answer() {
    let engine = tiny(&TinyModel {
        context: 64,
        ..TinyModel::default()
    })
    .unwrap();
    let request = |bytes: usize| ExecuteRequest {
        raw: true,
        max_tokens: 1000,
        ..greedy(&"x".repeat(bytes))
    };
    let full = answer(&engine, request(60));
    assert_eq!(
        (
            full.end.tokens_in,
            full.end.tokens_out,
            full.end.stop_reason
        ),
        (60, 4, StopReason::ContextFull)
    );
    let both = answer(
        &engine,
        ExecuteRequest {
            max_tokens: 4,
            ..request(60)
        },
    );
    assert_eq!(both.end.stop_reason, StopReason::MaxTokens);
    assert_eq!(answer(&engine, request(63)).end.tokens_out, 1);
    let failure = run(&engine, request(64)).map(|_| ()).unwrap_err();
    assert_eq!(
        (failure.code(), failure.retriable()),
        (WorkerErrorCode::ContextOverflow, false)
    );
    let overflow = failure.overflow().unwrap();
    assert_eq!((overflow.needed_tokens, overflow.model_context), (65, 64));
}

/// Returns an engine whose tiny model has 64 tokens of context, of which 32 are served.
fn half_of_its_context() -> Engine {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    let model = TinyModel {
        context: 64,
        ..TinyModel::default()
    };
    model.write(&path).expect("the model is written");
    let sizes = Sizes {
        context_length: Some(32),
        ..Sizes::default()
    };
    Engine::load(&path, cpu(), sizes, &mut |_, _| ()).expect("the model loads")
}

// [CAND-052] [CAND-056]
#[test]
fn a_worker_says_what_context_a_request_needs() {
    let engine = half_of_its_context();
    let request = |prompt: usize, resumed: usize, max_tokens: u32| ExecuteRequest {
        raw: true,
        max_tokens,
        resume: (resumed > 0).then(|| Resume {
            token_ids: vec![u32::from(b'x'); resumed],
            next_index: None,
            origin: Some(engine.origin().clone()),
            seen_more: false,
        }),
        ..greedy(&"x".repeat(prompt))
    };
    let needed = |prompt, resumed, max_tokens| {
        let failure = run(&engine, request(prompt, resumed, max_tokens));
        failure.map(|_| ()).unwrap_err().overflow().unwrap()
    };
    let overflow = needed(40, 0, 100);
    assert_eq!(
        overflow,
        ContextOverflow {
            prompt_tokens: 40,
            needed_tokens: 41,
            context_length: 32,
            model_context: 64,
        }
    );
    assert_eq!(needed(64, 0, 1).needed_tokens, 65);
    // The tokens of an earlier attempt must fit as well, and one more token if the answer continues.
    assert_eq!(needed(20, 12, 100).needed_tokens, 33);
    assert_eq!(needed(20, 44, 100).needed_tokens, 64);
    let whole = answer(&engine, request(20, 12, 12));
    assert_eq!(whole.end.tokens_out, 12);
    assert_eq!(whole.end.stop_reason, StopReason::MaxTokens);
}

// [CAND-013]
#[test]
fn jobs_share_nothing() {
    let engine = engine();
    let request = |prompt: &str| ExecuteRequest {
        prompt: Some(prompt.into()),
        ..sampled(4, warm())
    };
    let alone = answer(&engine, request("first")).text;
    let other = answer(&engine, request("a second, longer prompt")).text;
    assert_eq!(answer(&engine, request("first")).text, alone);
    let fresh = tiny(&TinyModel::default()).unwrap();
    assert_eq!(
        answer(&fresh, request("a second, longer prompt")).text,
        other
    );
}

// [CAND-020] [CAND-022]
#[test]
fn prompts_are_conversations_unless_raw() {
    let engine = engine();
    let tokens_in = |request: ExecuteRequest| answer(&engine, request).end.tokens_in;
    assert_eq!(
        tokens_in(ExecuteRequest {
            raw: true,
            ..greedy("abc")
        }),
        3
    );
    // The prompt is <|im_start|>user:abc<|im_end|>
    assert_eq!(tokens_in(greedy("abc")), 10);
    assert_eq!(
        tokens_in(ExecuteRequest {
            system: Some("xy".into()),
            ..greedy("abc")
        }),
        21
    );
    let bare = tiny(&TinyModel {
        chat_template: None,
        ..TinyModel::default()
    })
    .unwrap();
    let failure = run(&bare, greedy("abc")).map(|_| ()).unwrap_err();
    assert!(failure.to_string().contains("raw"), "{failure}");
    assert_eq!(failure.code(), WorkerErrorCode::TemplateFailed);
}

/// A control that halts at the nth check.
struct HaltAt {
    asked: Cell<usize>,
    at: usize,
    tokens: usize,
    chunks: usize,
}

impl Control for HaltAt {
    fn check(&self) -> Result<(), Halted> {
        self.asked.set(self.asked.get() + 1);
        if self.asked.get() > self.at {
            Err(Halted::Cancelled)
        } else {
            Ok(())
        }
    }
    fn event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Token(token) => self.tokens += token.ids.len(),
            WorkerEvent::Metrics(metrics) if metrics.tokens_out == 0 => self.chunks += 1,
            _ => {}
        }
    }
    fn progress(&mut self) {}
    fn drawn(&mut self) {}
}

// [CAND-053]
#[test]
fn a_halt_takes_effect_within_a_chunk_or_a_token() {
    let engine = engine();
    let halt = |bytes: usize, at: usize| {
        let request = ExecuteRequest {
            raw: true,
            max_tokens: 50,
            ..greedy(&"x".repeat(bytes))
        };
        let generation = engine.prepare(request, Instant::now()).unwrap();
        let mut control = HaltAt {
            asked: Cell::new(0),
            at,
            tokens: 0,
            chunks: 0,
        };
        let failure = engine.generate(generation, &mut control).unwrap_err();
        assert!(matches!(failure, Failure::Halted(Halted::Cancelled)));
        (control.chunks, control.tokens)
    };
    assert_eq!(halt(640, 4), (4, 0), "4 of 10 chunks were let through");
    assert_eq!(
        halt(10, 6),
        (0, 6),
        "6 steps were let through, the first with the prompt"
    );
}

// [CAND-049]
#[test]
fn damaged_weights_are_an_error_and_not_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    let mut bytes = TinyModel::default().bytes();
    // The second half of the file is weights. With all bits set, every float format is NaN.
    let weights = bytes.len() / 2;
    bytes[weights..].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let engine = Engine::load(&path, cpu(), Sizes::default(), &mut |_, _| ()).unwrap();
    let code = run(&engine, greedy("hello")).map_err(|failure| failure.code());
    assert_eq!(code.err(), Some(WorkerErrorCode::InferenceFailed));
}

// [CAND-002] A chunk of a prompt takes minutes on a large model, so progress is reported after each layer.
#[test]
fn every_layer_is_reported() {
    let mut engine = tiny(&TinyModel::default()).unwrap();
    let reports = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&reports);
    engine.on_layer(move || {
        theirs.fetch_add(1, Ordering::Relaxed);
    });
    // The warm-up runs the layers twice.
    engine.warm_up().unwrap();
    assert_eq!(reports.load(Ordering::Relaxed), 2 * BLOCKS);
}

#[test] // [CAND-090]
fn models_are_accepted_by_what_the_engine_computes() {
    for architecture in supported::ARCHITECTURES {
        let model = TinyModel {
            architecture: architecture.name,
            ..TinyModel::default()
        };
        let bytes = model.bytes();
        let header = GgufFile::read(&bytes[..], bytes.len() as u64).unwrap();
        supported::check(&header).unwrap();
        tiny(&model).unwrap();
    }
    let refused = tiny(&TinyModel {
        architecture: "mamba",
        ..TinyModel::default()
    });
    let shown = with_causes(&refused.err().unwrap());
    assert!(
        shown.contains("architecture `mamba` is not supported"),
        "{shown}"
    );
}
