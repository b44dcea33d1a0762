//! Answers that continue from the tokens of earlier attempts, and receipts of answers.

mod support;

use std::time::Instant;

use llorch_candled::engine::Engine;
use pool_core::api::receipt::{Receipt, hash_of_ids, hash_of_stops};
use pool_core::api::worker::{
    ExecuteRequest, Origin, Resume, Sampling, StopReason, WorkerErrorCode, WorkerEvent,
};
use support::tiny_model::{END, TinyModel};
use support::{answer, engine, greedy, run, sampled, tiny, warm};

// [CAND-048]
#[test]
fn a_resumed_answer_continues_as_the_undisturbed_one() {
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

// [CAND-048] The cut may be anywhere: inside a character, inside a stop text, before the last piece.
#[test]
fn an_answer_continues_wherever_it_was_cut() {
    let engine = engine();
    let asked = ExecuteRequest {
        max_tokens: 36,
        ..sampled(5, warm())
    };
    let plain = answer(&engine, asked.clone());
    let chars: Vec<char> = plain.text.chars().collect();
    let stop: String = chars[20..24].iter().collect();
    // The second stop text never appears in full: the end of the text, its possible beginning, is held back until the answer
    // ends.
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
            // The last piece may come again: text that was held back comes out when the answer ends, which is now.
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

    // Each part of the request appears in its own field.
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

    // The worker's context leaves less room than the request asks for.
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
        // Either no token was computed elsewhere, or none of those tokens counts.
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
fn tokens_from_elsewhere_are_continued_only_if_the_text_stays_one() {
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

// [CAND-065] If the pool knows the hash of the file, that file on another host is the same model.
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
