//! The engine on tiny models: what each request field does, and what never changes.

mod support;

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::model::description::Description;
use llorch_candled::engine::model::{Batch, Model, Row};
use llorch_candled::engine::{Control, Engine, Failure, Halted, Sizes};
use pool_core::api::receipt::{Receipt, hash_of_ids, hash_of_stops};
use pool_core::api::worker::{
    ContextOverflow, ExecuteRequest, Origin, Resume, Sampling, StopReason, WorkerErrorCode,
    WorkerEvent,
};
use pool_core::catalog::gguf::GgufFile;
use pool_core::catalog::support as supported;
use pool_core::errors::with_causes;
use support::tiny_model::{BLOCKS, END, TinyModel};
use support::{Answer, cpu, greedy, run, tiny, tiny_on};

fn engine() -> Engine {
    tiny(&TinyModel::default()).expect("the tiny model loads")
}

fn sampled(seed: u64, sampling: Sampling) -> ExecuteRequest {
    ExecuteRequest {
        seed,
        sampling,
        max_tokens: 60,
        ..greedy("hello")
    }
}

fn warm() -> Sampling {
    Sampling {
        temperature: 0.8,
        ..Sampling::default()
    }
}

fn answer(engine: &Engine, request: ExecuteRequest) -> Answer {
    run(engine, request).expect("the request runs")
}

fn assert_contiguous(answer: &Answer) {
    let indices: Vec<u32> = answer.pieces.iter().map(|p| p.i).collect();
    assert_eq!(indices, (0..answer.pieces.len() as u32).collect::<Vec<_>>());
    assert!(answer.pieces.iter().all(|p| !p.t.is_empty()));
}

const ARCHITECTURES: [&str; 5] = ["gemma3", "llama", "phi3", "qwen2", "qwen3"];

/// A model with enough layers that all kinds of them are there.
fn of_architecture(architecture: &'static str) -> TinyModel {
    TinyModel {
        architecture,
        blocks: 7,
        ..TinyModel::default()
    }
}

/// Logits of the last of some tokens, computed in one pass.
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
        // Keys and values are half-precision floats here, and full ones there.
        assert!(error < 5e-3, "{architecture}: the error is {error}");
    }
}

// [CAND-014]
#[test]
fn bits_depend_neither_on_instructions_nor_on_threads() {
    for architecture in ARCHITECTURES {
        let model = of_architecture(architecture);
        let tokens: Vec<u32> = (0..70).map(|i| (i * 13) % 230).collect();
        let bits = |threads, tier| {
            let engine = tiny_on(Device::Cpu { threads, tier }, &model).unwrap();
            let logits = logits(&engine, &tokens);
            logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let expected = bits(1, Tier::Portable);
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
            for threads in [1, 2, 3] {
                assert_eq!(
                    bits(threads, tier),
                    expected,
                    "{architecture}, {tier:?}, {threads}"
                );
            }
        }
    }
}

// [CAND-014] [CAND-013]
#[test]
fn sequences_in_one_batch_have_the_bits_that_each_has_alone() {
    for architecture in ARCHITECTURES {
        let (folder, model) = (tempfile::tempdir().unwrap(), of_architecture(architecture));
        let path = folder.path().join("tiny.gguf");
        model.write(&path).unwrap();
        let header = GgufFile::open(&path).unwrap();
        let load = |threads| {
            let tier = Tier::best();
            let device = Device::Cpu { threads, tier };
            let description = Description::from_header(&header, None).unwrap();
            let load = device.load(&path, &header, description, 8, &mut |_| ());
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
        assert_eq!(compute(&mut *both, rest), alone, "{architecture}");
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
            "a token is none of the vocabulary",
        ),
        (
            &[row(0, 64, 0)],
            one,
            "a position is beyond the model's context",
        ),
        (&[row(0, 32, 0)], one, "a row has no block"),
        (&[row(0, 0, 1)], one, "a row has no block"),
        (&[row(0, 0, 0), row(0, 2, 0)], one, "positions have gaps"),
        (&[row(0, 0, 0)], &[&[4][..]], "a block is none of the cache"),
        (
            &[row(0, 5, 0), row(0, 4, 1)],
            &[&[2][..], &[2]],
            "two rows go to one place of the cache",
        ),
        (
            &[row(0, 15, 0), row(0, 16, 0)],
            &[&[2, 2][..]],
            "two rows go to one place of the cache",
        ),
        (
            &[row(0, 0, 0), row(0, 0, 1), row(0, 1, 0)],
            &[&[0][..], &[1]],
            "rows of a sequence are apart",
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

// [CAND-048]
#[test]
fn a_resumed_answer_goes_on_as_the_undisturbed_one() {
    let engine = engine();
    let sampling = Sampling {
        repetition_penalty: 1.2,
        top_p: 0.95,
        ..warm()
    };
    let whole = answer(&engine, sampled(5, sampling));
    for pieces in [1, 7, 33] {
        let logged: Vec<u32> = whole.pieces[..pieces]
            .iter()
            .flat_map(|p| p.ids.clone())
            .collect();
        let resume = Some(Resume {
            token_ids: logged,
            ..Resume::default()
        });
        let rest = answer(
            &engine,
            ExecuteRequest {
                resume,
                attempt: 2,
                fence: 2,
                ..sampled(5, sampling)
            },
        );
        assert_eq!(rest.pieces, whole.pieces[pieces..]);
        assert_eq!(
            (rest.end.tokens_out, rest.end.stop_reason),
            (whole.end.tokens_out, whole.end.stop_reason)
        );
    }
}

// [CAND-048] The seam may lie anywhere: inside a character, inside a text that ends the answer, before the last piece.
#[test]
fn an_answer_goes_on_wherever_it_was_cut() {
    let engine = engine();
    let asked = ExecuteRequest {
        max_tokens: 36,
        ..sampled(5, warm())
    };
    let plain = answer(&engine, asked.clone());
    let chars: Vec<char> = plain.text.chars().collect();
    let stop: String = chars[20..24].iter().collect();
    // The second never comes up whole: the end of the text is held back as its beginning until the answer ends.
    let held = format!(
        "{}\u{7f}",
        chars[chars.len() - 3..].iter().collect::<String>()
    );
    for stop in [Vec::new(), vec![stop], vec![held]] {
        let request = |resume| ExecuteRequest {
            stop: stop.clone(),
            resume,
            ..asked.clone()
        };
        let whole = answer(&engine, request(None));
        for cut in 0..=whole.pieces.len() {
            let resume = Resume {
                token_ids: whole.pieces[..cut]
                    .iter()
                    .flat_map(|p| p.ids.clone())
                    .collect(),
                next_index: Some(cut as u32),
                origin: Some(engine.origin().clone()),
                seen_more: true,
            };
            let rest = answer(&engine, request(Some(resume)));
            // The last piece may come once more: what was held back comes out when the answer ends, and that is now.
            let new = rest.pieces.iter().filter(|piece| piece.i as usize >= cut);
            let joined: Vec<_> = whole.pieces[..cut].iter().chain(new).cloned().collect();
            assert_eq!(joined, whole.pieces, "cut after {cut}, stop {stop:?}");
            assert!(rest.pieces.iter().all(|piece| whole.pieces.contains(piece)));
            assert_eq!(
                (
                    rest.end.tokens_in,
                    rest.end.tokens_out,
                    rest.end.stop_reason
                ),
                (
                    whole.end.tokens_in,
                    whole.end.tokens_out,
                    whole.end.stop_reason
                )
            );
            // [CAND-111]
            assert_eq!(rest.end.receipt, whole.end.receipt, "cut after {cut}");
        }
    }
}

fn receipt(engine: &Engine, request: ExecuteRequest) -> Receipt {
    *answer(engine, request).end.receipt.expect("a receipt")
}

// [CAND-110]
#[test]
fn a_receipt_says_what_produced_the_answer() {
    let mut engine = engine();
    let request = ExecuteRequest {
        stop: vec!["\u{7f}never".into()],
        ..sampled(5, warm())
    };
    let whole = answer(&engine, request.clone());
    let first = whole.end.receipt.expect("a receipt");
    let generation = engine.prepare(request.clone(), Instant::now()).unwrap();
    assert_eq!(
        (first.prompt_sha256.as_str(), first.prompt_tokens),
        (
            hash_of_ids(generation.prompt()).as_str(),
            generation.prompt().len() as u32
        )
    );
    assert_eq!(
        (first.output_sha256.as_str(), first.output_tokens),
        (hash_of_ids(&whole.ids).as_str(), 60)
    );
    assert_eq!(first.stop_sha256, hash_of_stops(&request.stop));
    assert_eq!(
        first.engine,
        concat!("llorch-candled ", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(first.arithmetic, engine.origin().build);
    assert_eq!((first.model_sha256.as_deref(), first.seed), (None, 5));
    assert_eq!((first.temperature, first.max_tokens), (0.8, 60));
    assert!(first.earlier_arithmetic.is_empty() && first.chat_template_sha256.is_some());
    engine.set_sha256("ab12");
    let named = Some("ab12".to_owned());
    let named = Receipt {
        model_sha256: named,
        ..*first
    };
    assert_eq!(receipt(&engine, request.clone()), named);

    // Each part of the request shows in its own field.
    let raw = receipt(
        &engine,
        ExecuteRequest {
            raw: true,
            ..request.clone()
        },
    );
    assert_eq!(raw.chat_template_sha256, None);
    assert_ne!(raw.prompt_sha256, named.prompt_sha256);
    let other = receipt(
        &engine,
        ExecuteRequest {
            stop: Vec::new(),
            max_tokens: 4,
            ..sampled(6, Sampling { top_k: 2, ..warm() })
        },
    );
    assert_eq!(
        other,
        Receipt {
            top_k: 2,
            seed: 6,
            stop_sha256: None,
            max_tokens: 4,
            output_tokens: 4,
            output_sha256: other.output_sha256.clone(),
            ..named.clone()
        }
    );
    assert_ne!(other.output_sha256, named.output_sha256);

    // What the worker's context leaves is less than what is asked for.
    let long = ExecuteRequest {
        max_tokens: 1_000_000,
        ..greedy("hello")
    };
    let cut = receipt(&engine, long);
    let context = engine.context_length() as u32;
    assert_eq!(cut.max_tokens, context - cut.prompt_tokens);

    let of_model = |model: TinyModel| receipt(&tiny(&model).unwrap(), request.clone());
    let other_tokenizer = of_model(TinyModel {
        eos: 256,
        ..TinyModel::default()
    });
    let other_template = of_model(TinyModel {
        chat_template: Some("{{ messages[0].content }}"),
        ..TinyModel::default()
    });
    for (other, tokenizer, template) in [
        (other_tokenizer, false, true),
        (other_template, true, false),
    ] {
        let same_tokenizer = other.tokenizer_sha256 == named.tokenizer_sha256;
        let same_template = other.chat_template_sha256 == named.chat_template_sha256;
        assert_eq!((same_tokenizer, same_template), (tokenizer, template));
    }
}

// [CAND-111]
#[test]
fn the_receipt_of_a_continued_answer_names_other_arithmetic_before_it() {
    let engine = engine();
    let whole = answer(&engine, sampled(5, warm()));
    let first = whole.end.receipt.unwrap();
    let here = engine.origin().clone();
    let continued = |pieces: &[_], origin| {
        let ids = |p: &pool_core::api::worker::WorkerToken| p.ids.clone();
        let resume = Resume {
            token_ids: pieces.iter().flat_map(ids).collect(),
            next_index: Some(pieces.len() as u32),
            origin,
            seen_more: false,
        };
        let request = ExecuteRequest {
            resume: Some(resume),
            ..sampled(5, warm())
        };
        receipt(&engine, request)
    };
    let other = Origin {
        build: "another".into(),
        ..here.clone()
    };
    let other_model = Origin {
        model: "sha256:00".into(),
        ..here.clone()
    };
    let seven = &whole.pieces[..7];
    for (pieces, origin, earlier) in [
        (seven, Some(here), &[][..]),
        (seven, Some(other.clone()), &["another"]),
        (seven, None, &["unknown"]),
        // Nothing was computed elsewhere, or nothing of it counts.
        (&[], Some(other), &[]),
        (seven, Some(other_model), &[]),
    ] {
        let continued = continued(pieces, origin);
        assert_eq!(continued.earlier_arithmetic, earlier);
        let expected = Receipt {
            earlier_arithmetic: continued.earlier_arithmetic.clone(),
            ..(*first).clone()
        };
        assert_eq!(continued, expected);
    }
}

// [CAND-065] P5
#[test]
fn tokens_of_elsewhere_are_gone_on_from_only_where_the_text_stays_one() {
    let engine = engine();
    let whole = answer(&engine, sampled(5, warm()));
    let here = engine.origin().clone();
    let other_build = Origin {
        build: "another".into(),
        ..here.clone()
    };
    let other_model = Origin {
        model: "sha256:00".into(),
        ..here.clone()
    };
    let continues = |pieces: usize, next_index, origin: &Origin, seen_more, max_tokens| {
        let token_ids = whole.pieces[..pieces]
            .iter()
            .flat_map(|p| p.ids.clone())
            .collect();
        let resume = Resume {
            token_ids,
            next_index: Some(next_index),
            origin: Some(origin.clone()),
            seen_more,
        };
        let request = ExecuteRequest {
            resume: Some(resume),
            max_tokens,
            ..sampled(5, warm())
        };
        let generation = engine.prepare(request, Instant::now()).unwrap();
        let mut control = support::Collect::default();
        engine.generate(generation, &mut control).unwrap();
        let Some(WorkerEvent::Started(started)) = control.events.first() else {
            panic!("{:?}", control.events.first())
        };
        assert_eq!(started.origin.as_ref(), Some(&here));
        let first = control.events.iter().find_map(|event| match event {
            WorkerEvent::Token(token) => Some(token.i),
            _ => None,
        });
        assert_eq!(
            first,
            Some(if started.continues { pieces as u32 } else { 0 })
        );
        started.continues
    };
    assert!(continues(7, 7, &here, false, 60));
    assert!(continues(7, 7, &here, true, 60));
    assert!(continues(7, 7, &other_build, false, 60));
    assert!(
        !continues(7, 7, &other_build, true, 60),
        "other tokens may have been seen"
    );
    assert!(!continues(7, 7, &other_model, false, 60));
    assert!(
        !continues(7, 8, &other_build, false, 60),
        "the last piece may have been held back until the end"
    );
    assert!(
        !continues(7, 7, &here, false, 5),
        "more tokens than the answer may have"
    );
}

// [CAND-065] Where the pool knows the file's hash, the same file on another host is the same model.
#[test]
fn a_model_is_named_by_its_hash_or_by_its_file() {
    let mut first = engine();
    let second = engine();
    assert_ne!(first.origin().model, second.origin().model);
    assert_eq!(first.origin().build, second.origin().build);
    first.set_sha256("ab12");
    assert_eq!(first.origin().model, "sha256:ab12");
}

// [CAND-048]
#[test]
fn resuming_an_answer_that_is_complete_ends_it_at_once() {
    let engine = engine();
    let whole = answer(&engine, sampled(5, warm()));
    let resume = |token_ids: Vec<u32>, stop: Vec<String>| {
        answer(
            &engine,
            ExecuteRequest {
                resume: Some(Resume {
                    token_ids,
                    ..Resume::default()
                }),
                stop,
                ..sampled(5, warm())
            },
        )
    };
    let done = resume(whole.ids.clone(), Vec::new());
    assert_eq!(
        (done.end.stop_reason, done.end.tokens_out, done.pieces.len()),
        (StopReason::MaxTokens, 60, 0)
    );
    let ended = resume(vec![whole.ids[0], END], Vec::new());
    assert_eq!(
        (ended.end.stop_reason, ended.end.tokens_out),
        (StopReason::Eos, 1)
    );
    let stopped = resume(whole.ids[..9].to_vec(), vec![whole.text[2..5].to_owned()]);
    assert_eq!(stopped.end.stop_reason, StopReason::StopSequence);
    let outside = run(
        &engine,
        ExecuteRequest {
            resume: Some(Resume {
                token_ids: vec![9999],
                ..Resume::default()
            }),
            ..greedy("x")
        },
    );
    assert_eq!(
        outside.map(|_| ()).unwrap_err().code(),
        WorkerErrorCode::InvalidRequest
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

/// Returns an engine with the tiny model of 64 tokens of context, served with 32.
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
    // <|im_start|>user:abc<|im_end|>
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

/// Halts at the nth question.
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
    // The second half of the file is weights; all bits set is no number in any float format.
    let weights = bytes.len() / 2;
    bytes[weights..].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let engine = Engine::load(&path, cpu(), Sizes::default(), &mut |_, _| ()).unwrap();
    let code = run(&engine, greedy("hello")).map_err(|failure| failure.code());
    assert_eq!(code.err(), Some(WorkerErrorCode::InferenceFailed));
}

// [CAND-002] A prompt's chunk of a large model takes minutes: who waits for it to move hears of each layer.
#[test]
fn every_layer_is_told() {
    let mut engine = tiny(&TinyModel::default()).unwrap();
    let told = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&told);
    engine.on_layer(move || {
        theirs.fetch_add(1, Ordering::Relaxed);
    });
    // It runs the layers twice.
    engine.warm_up().unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 2 * BLOCKS);
}

#[test] // [CAND-090]
fn what_the_engine_computes_is_what_models_are_accepted_by() {
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
