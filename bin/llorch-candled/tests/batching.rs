//! Concurrent generations: the answer of each is the one it has alone, and no block of the cache is lost.

mod support;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use llorch_candled::engine::batcher::{Batcher, Ended};
use llorch_candled::engine::{Control, Engine, Halted, Sizes};
use pool_core::api::worker::{ExecuteRequest, Sampling, WorkerErrorCode, WorkerEvent};
use pool_core::catalog::gguf::GgufFile;
use support::tiny_model::{Random, TinyModel};
use support::{cpu, greedy, run};

const ARCHITECTURES: [&str; 5] = ["gemma3", "llama", "phi3", "qwen2", "qwen3"];

/// Returns an engine with a context of 256 tokens, and a cache for two sequences of that length.
fn engine(architecture: &'static str) -> Engine {
    let model = TinyModel {
        architecture,
        blocks: 7,
        ..TinyModel::default()
    };
    loaded(&model.bytes())
}

fn loaded(file: &[u8]) -> Engine {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, file).expect("the model is written");
    let sizes = Sizes {
        context_length: Some(256),
        cache_tokens: Some(512),
        slots: 8,
        ..Sizes::default()
    };
    Engine::load(&path, cpu(), sizes, &mut |_, _| ()).expect("the model loads")
}

/// The events of a generation, and whether it must end.
#[derive(Default)]
struct Heard {
    text: String,
    tokens: usize,
    halted: bool,
}

#[derive(Clone, Default)]
struct Listener {
    name: usize,
    heard: Rc<RefCell<Heard>>,
}

impl Control for Listener {
    fn check(&self) -> Result<(), Halted> {
        match self.heard.borrow().halted {
            true => Err(Halted::Cancelled),
            false => Ok(()),
        }
    }

    fn event(&mut self, event: WorkerEvent) {
        if let WorkerEvent::Token(token) = event {
            self.heard.borrow_mut().text.push_str(&token.t);
        }
    }

    fn progress(&mut self) {}

    fn drawn(&mut self) {
        self.heard.borrow_mut().tokens += 1;
    }
}

/// Returns a request with a prompt of `length` tokens.
fn request(number: usize, length: usize, max_tokens: u32) -> ExecuteRequest {
    let text = "the quick brown fox jumps over the lazy dog. ";
    let prompt: String = text.chars().cycle().skip(number).take(length).collect();
    ExecuteRequest {
        raw: true,
        seed: number as u64,
        sampling: Sampling {
            temperature: 0.8,
            repetition_penalty: 1.1,
            ..Sampling::default()
        },
        max_tokens,
        ..greedy(&prompt)
    }
}

fn add(
    batcher: &mut Batcher<'_, Listener>,
    engine: &Engine,
    name: usize,
    request: ExecuteRequest,
) -> Listener {
    let listener = Listener {
        name,
        ..Listener::default()
    };
    let generation = engine
        .prepare(request, Instant::now())
        .expect("the request is valid");
    batcher.add(generation, listener.clone());
    listener
}

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

// [CAND-015] [CAND-016] The cache is too small for all: some have to wait, and some to release their blocks.
#[test]
fn an_answer_is_the_same_alone_and_in_any_batch() {
    for architecture in ARCHITECTURES {
        let engine = engine(architecture);
        let mut random = Random(7);
        let requests: Vec<_> = (0..12)
            .map(|number| request(number, 1 + random.below(150), 1 + random.below(100) as u32))
            .collect();
        let alone: Vec<_> = requests
            .iter()
            .map(|request| run(&engine, request.clone()).unwrap())
            .collect();
        let mut batcher = Batcher::new(&engine);
        let mut left = requests.into_iter().enumerate();
        let (mut texts, mut paused, mut largest) = (vec![None; alone.len()], 0, 0);
        loop {
            // Two at once, then one more with each step.
            for (name, request) in left.by_ref().take(2 - batcher.len().min(1)) {
                add(&mut batcher, &engine, name, request);
            }
            if batcher.is_empty() {
                break;
            }
            let (step, ended) = batcher.step();
            paused = paused.max(batcher.waiting());
            largest = largest.max(step.sequences);
            for Ended { control, outcome } in ended {
                let text = control.heard.borrow().text.clone();
                texts[control.name] = Some((text, outcome.unwrap().tokens_out));
            }
        }
        let expected: Vec<_> = alone
            .into_iter()
            .map(|answer| Some((answer.text, answer.end.tokens_out)))
            .collect();
        assert_eq!(texts, expected, "{architecture}");
        assert!(paused > 0 && largest > 2, "{paused} waited, {largest} ran");
        let room = engine.room();
        assert_eq!(room.free, room.total);
    }
}

// [CAND-016]
#[test]
fn all_blocks_are_free_in_the_end_whatever_is_cancelled() {
    let engine = engine("gemma3");
    let mut random = Random(3);
    let mut batcher = Batcher::new(&engine);
    let mut listeners: Vec<Listener> = Vec::new();
    let (mut ended, mut cancelled) = (0, 0);
    for name in 0..300 {
        let request = request(name % 5, 1 + random.below(200), 1 + random.below(50) as u32);
        listeners.push(add(&mut batcher, &engine, name, request));
        for _ in 0..random.below(20) {
            if random.below(8) == 0 && !listeners.is_empty() {
                let which = random.below(listeners.len());
                listeners[which].heard.borrow_mut().halted = true;
            }
            for Ended { control, outcome } in batcher.step().1 {
                ended += 1;
                if let Err(failure) = outcome {
                    assert_eq!(failure.code(), WorkerErrorCode::Cancelled);
                    cancelled += 1;
                }
                listeners.retain(|listener| listener.name != control.name);
            }
        }
        if listeners.is_empty() {
            let room = engine.room();
            assert_eq!(room.free, room.total);
        }
    }
    // The remaining generations are dropped while they run.
    drop(batcher);
    assert!(
        ended > 150 && cancelled > 50,
        "{ended} ended, {cancelled} of them cancelled"
    );
    let room = engine.room();
    assert_eq!(room.free, room.total);
}

// [CAND-017]
#[test]
fn a_beginning_that_was_computed_is_not_computed_again() {
    let engine = engine("llama");
    let mut batcher = Batcher::new(&engine);
    let mut texts = Vec::new();
    let mut computed = Vec::new();
    for name in 0..2 {
        let listener = add(&mut batcher, &engine, name, request(1, 100, 5));
        let mut tokens = 0;
        while !batcher.is_empty() {
            let (step, _) = batcher.step();
            tokens += step.tokens;
        }
        computed.push(tokens);
        texts.push(listener.heard.borrow().text.clone());
    }
    // 100 tokens of the prompt and four of the answer. The second time, six blocks of 16 are found.
    assert_eq!(computed, [104, 104 - 96]);
    assert_eq!(texts[0], texts[1]);
    // A job of another scope finds none of the blocks.
    let apart = ExecuteRequest {
        cache_scope: Some("session 7".into()),
        ..request(1, 100, 5)
    };
    add(&mut batcher, &engine, 2, apart);
    assert_eq!(batcher.step().0.found, 0);
}

// [CAND-024]
#[test]
fn room_is_counted_for_whole_answers_and_shared_beginnings_once() {
    let engine = engine("llama");
    let mut batcher = Batcher::new(&engine);
    let refuses = |number, length, max_tokens| ExecuteRequest {
        refuse_if_full: true,
        ..request(number, length, max_tokens)
    };
    let shortage = |batcher: &Batcher<'_, Listener>, request| {
        let generation = engine.prepare(request, Instant::now()).unwrap();
        let shortage = batcher.shortage(&generation);
        shortage.map(|short| (short.needed_tokens, short.free_tokens))
    };
    // Nothing runs, so there is nothing to wait for.
    assert_eq!(shortage(&batcher, refuses(0, 100, 150)), None);
    add(&mut batcher, &engine, 0, refuses(0, 100, 125));
    batcher.step();
    // The cache has 512 tokens, and the first generation may take 224, all in full blocks.
    assert_eq!(batcher.room().free * 16, 512 - 224);
    assert_eq!(shortage(&batcher, refuses(7, 100, 150)), None);
    add(&mut batcher, &engine, 1, refuses(7, 100, 61));
    assert_eq!(shortage(&batcher, refuses(15, 100, 61)), Some((160, 128)));
    assert_eq!(shortage(&batcher, request(15, 100, 61)), None, "it waits");
    // Six blocks of its prompt are those of the first generation.
    while engine.room().free > 512 / 16 - 7 - 7 {
        batcher.step();
    }
    assert_eq!(shortage(&batcher, refuses(0, 100, 61)), None);
    let apart = ExecuteRequest {
        cache_scope: Some("session 7".into()),
        ..refuses(0, 100, 61)
    };
    assert_eq!(shortage(&batcher, apart), Some((160, 128)));
}

// [CAND-019]
#[test]
fn guesses_change_nothing_but_the_number_of_steps() {
    let (mut all_guessed, mut all_right) = (0, 0);
    for architecture in ARCHITECTURES {
        let engine = engine(architecture);
        let mut outcomes = Vec::new();
        for speculates in [false, true] {
            let mut batcher = Batcher::new(&engine).speculate(speculates);
            let mut listeners = Vec::new();
            for name in 0..3 {
                let repeated = ExecuteRequest {
                    sampling: Sampling {
                        // The likeliest token of a small model recurs often.
                        temperature: if name < 2 { 0.0 } else { 0.3 },
                        ..Sampling::default()
                    },
                    ..request(name, 40, 200)
                };
                listeners.push(add(&mut batcher, &engine, name, repeated));
            }
            let (mut steps, mut guessed, mut right) = (0, 0, 0);
            while !batcher.is_empty() {
                let (step, _) = batcher.step();
                steps += 1;
                guessed += step.guessed;
                right += step.right;
            }
            assert_eq!(engine.room().free, engine.room().total);
            let texts = listeners.iter().map(|l| l.heard.borrow().text.clone());
            outcomes.push((texts.collect::<Vec<_>>(), steps, guessed, right));
        }
        let [(plain, plain_steps, none, _), (text, steps, guessed, right)] = &outcomes[..] else {
            unreachable!()
        };
        assert_eq!(text, plain, "{architecture}");
        assert_eq!(*none, 0);
        assert!(
            steps <= plain_steps,
            "{steps} steps instead of {plain_steps}"
        );
        all_guessed += guessed;
        all_right += right;
    }
    assert!(
        all_right > 0 && all_right < all_guessed,
        "{all_right} of {all_guessed} were right"
    );
}

// [CAND-018]
#[test]
fn a_long_prompt_stops_no_answer_and_a_short_one_overtakes_it() {
    let engine = engine("llama");
    let mut batcher = Batcher::new(&engine);
    let writer = add(&mut batcher, &engine, 0, request(0, 5, 100));
    batcher.step();
    add(&mut batcher, &engine, 1, request(20, 200, 5));
    batcher.step();
    let short = add(&mut batcher, &engine, 2, request(9, 30, 5));
    for steps in 3..6 {
        batcher.step();
        assert_eq!(
            writer.heard.borrow().tokens,
            steps,
            "a token with every step"
        );
    }
    assert!(
        short.heard.borrow().tokens > 1,
        "its turn came with the next step"
    );
}

// [CAND-049]
#[test]
fn a_failing_generation_fails_no_other() {
    let model = TinyModel::default();
    let mut bytes = model.bytes();
    let header = GgufFile::read(&bytes[..], bytes.len() as u64).unwrap();
    let embedding = header.tensor("token_embd.weight").unwrap();
    // The embedding of the letter z is NaN.
    let tokenizer = loaded(&bytes);
    let z = tokenizer
        .prepare(raw("z"), Instant::now())
        .unwrap()
        .prompt()[0] as usize;
    let width = embedding.dims[0] as usize;
    let start = header.data_offset() as usize + embedding.offset as usize + z * width * 4;
    bytes[start..start + width * 4].fill(0xff);
    let engine = loaded(&bytes);
    let expected = run(&engine, raw("a quick fox")).unwrap();
    let mut batcher = Batcher::new(&engine);
    let mut outcomes = [None, None];
    let well = add(&mut batcher, &engine, 0, raw("a quick fox"));
    add(&mut batcher, &engine, 1, raw("a lazy dog"));
    while !batcher.is_empty() {
        for Ended { control, outcome } in batcher.step().1 {
            outcomes[control.name] = Some(outcome.map(|end| end.tokens_out).map_err(|f| f.code()));
        }
    }
    assert_eq!(
        outcomes,
        [Some(Ok(16)), Some(Err(WorkerErrorCode::InferenceFailed))]
    );
    assert_eq!(well.heard.borrow().text, expected.text);
}

fn raw(prompt: &str) -> ExecuteRequest {
    ExecuteRequest {
        raw: true,
        ..greedy(prompt)
    }
}
