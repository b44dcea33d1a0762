//! Model files that only the worker can judge: without a usable tokenizer, or with a chat template that never ends. Each file
//! is loaded in a separate, measured process, as are templates that turn hostile in a job.

#[path = "../../../shared-crates/pool-core/tests/support/gguf_mutants.rs"]
mod gguf_mutants;
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use gguf_mutants::{Field, Layout, with_text, without};
use llorch_candled::engine::{Engine, Sizes};
use pool_core::api::worker::{ExecuteRequest, Message, Role};
use support::tiny_model::{Phi3, TinyModel};

const TIME_LIMIT: Duration = Duration::from_millis(100);
/// The same for a template that uses up its budget, which takes a test build three quarters of [`TIME_LIMIT`] on an idle machine.
const TEMPLATE_TIME_LIMIT: Duration = Duration::from_millis(200);
const MEMORY_LIMIT_BYTES: u64 = 50 << 20;
/// Variable with the path of the model to load, set for a child process.
const FILE_VAR: &str = "CANDLED_TEST_LOAD_MODEL";

/// A computation that the template engine charges no fuel for: 33 additions make a list of 2^33 elements.
const RUNAWAY: &str = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}";

/// Templates that never end, or that allocate without end, each in a different way.
const ENDLESS: [(&str, &str); 16] = [
    (
        "loops within loops",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    ),
    (
        "a macro that calls itself twice",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(18) }}",
    ),
    (
        "a text that doubles",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ),
    (
        "a text that doubles by addition",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ),
    (
        "a list that nests itself",
        "{% set ns = namespace(x=[1]) %}{% for a in range(9999) %}{% for b in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
    ),
    (
        "output without end",
        "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    ),
    ("a repeated text", "{% set n = 90000000 %}{{ 'x' * n }}"),
    ("a repeated list", "{{ ([1] * 10000000)|join }}"),
    (
        "a replacement that multiplies",
        "{% set n = 300000 %}{% set x = 'x' * n %}{{ x.replace('x', x) }}",
    ),
    (
        "a joint that multiplies",
        "{% set n = 300000 %}{% set x = 'x' * n %}{{ x.join(['y'] * n) }}",
    ),
    (
        "a filter that multiplies",
        "{% set n = 300000 %}{% set x = 'x' * n %}{{ x|replace('x', x) }}",
    ),
    (
        "an indent that multiplies",
        "{% set n = 300000 %}{% set x = '\\n' * n %}{{ x|indent(n) }}",
    ),
    ("a wide format", "{{ '%99999999d'|format(1) }}"),
    (
        "a text that is split to pieces",
        "{% set n = 3000000 %}{% set ns = namespace(x='x' * n) %}{{ ns.x.split('x')|length }}{{ ns.x|list|length }}",
    ),
    (
        "a search through endless candidates",
        "{% set n = 9000000 %}{{ 'x'.startswith(['y'] * n) }}",
    ),
    (
        "each character against each other",
        "{% set n = 500000 %}{% set x = 'x' * n %}{{ x.strip('y' * n ~ 'x') }}",
    ),
];

#[derive(Debug)]
struct Cost {
    time: Duration,
    peak_bytes: u64,
}

impl Cost {
    fn is_within(&self, limit: Duration) -> bool {
        self.time <= limit || is_sanitized()
    }

    fn is_small(&self) -> bool {
        self.peak_bytes <= MEMORY_LIMIT_BYTES || is_sanitized()
    }
}

/// Returns whether a sanitizer checks every access, which takes more time and memory than the limits allow for.
fn is_sanitized() -> bool {
    std::env::var_os("LLORCH_TEST_SANITIZED").is_some()
}

/// Variable with a second message for the job, set for a child process that must run one as well.
const JOB_VAR: &str = "CANDLED_TEST_RUN_JOB";
/// Longest time for a child. A slower one would never end.
const CHILD_LIMIT: Duration = Duration::from_secs(30);

/// Returns the processor time of this process, which doesn't depend on the load of the machine.
fn processor_time() -> Duration {
    let taken = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(taken.tv_sec as u64, taken.tv_nsec as u32)
}

/// Acts as the child of [`in_a_child`]. There is nothing to do in a normal run.
#[test]
fn a_child_loads_a_model_and_measures_itself() {
    let Some(path) = std::env::var_os(FILE_VAR) else {
        return;
    };
    let mut start = processor_time();
    let engine = Engine::load(
        Path::new(&path),
        support::cpu(),
        Sizes::default(),
        &mut |_, _| (),
    );
    let verdict = match (engine, std::env::var_os(JOB_VAR)) {
        (Err(error), _) => format!("refused {error}"),
        (Ok(engine), None) => {
            let raw = ExecuteRequest {
                raw: true,
                ..support::greedy("Hello!")
            };
            let raw = engine.prepare(raw, Instant::now());
            assert!(raw.is_ok(), "a raw prompt needs no template");
            match engine.prepare(support::greedy("Hello!"), Instant::now()) {
                Ok(_) => "accepted".to_owned(),
                Err(failure) => format!("raw only {:?} {failure}", failure.code()),
            }
        }
        (Ok(engine), Some(_)) => {
            let job = |messages: &[&str]| {
                let message = |content: &&str| Message {
                    role: Role::User,
                    content: (*content).to_owned(),
                };
                let request = ExecuteRequest {
                    messages: Some(messages.iter().map(message).collect()),
                    prompt: None,
                    ..support::greedy("")
                };
                engine.prepare(request, Instant::now()).map(|_| ())
            };
            job(&["Hello!"]).expect("one message is harmless");
            start = processor_time();
            let failure = job(&["Hello!", "now"]).expect_err("two messages are not");
            let again = job(&["Hello!"]).map_err(|failure| failure.to_string());
            let ran_away = failure.to_string().contains("not tried again");
            assert_eq!(
                again.is_ok(),
                !ran_away,
                "the model is as good as before: {again:?}"
            );
            format!("failed {:?} {failure}", failure.code())
        }
    };
    let micros = (processor_time() - start).as_micros();
    let status = fs::read_to_string("/proc/self/status").expect("Linux has /proc");
    let peak = status.lines().find(|line| line.starts_with("VmHWM:"));
    let peak: u64 = peak
        .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .expect("a peak");
    println!("COST {micros} {} {verdict}", peak << 10);
}

/// Runs this program as a child that loads `path`.
fn run_child(path: &Path, job: bool) -> (Cost, String) {
    let mut command = Command::new(std::env::current_exe().expect("a running program has a path"));
    command
        .args([
            "--exact",
            "a_child_loads_a_model_and_measures_itself",
            "--nocapture",
        ])
        .env(FILE_VAR, path)
        .stdout(Stdio::piped());
    if job {
        command.env(JOB_VAR, "1");
    }
    let child = command.spawn().expect("this program can be started again");
    let pid = rustix::process::Pid::from_child(&child);
    let start = Instant::now();
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    let output = end.recv_timeout(CHILD_LIMIT).or_else(|_| {
        // The child has not been waited for, or has just ended.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        end.recv()
    });
    let output = output.expect("a child that ended");
    let output = output.expect("a child can be waited for");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let Some((_, line)) = shown.lines().find_map(|line| line.split_once("COST ")) else {
        let cost = Cost {
            time: start.elapsed(),
            peak_bytes: u64::MAX,
        };
        return (cost, format!("ended with {}", output.status));
    };
    let mut words = line.splitn(3, ' ');
    let mut number = || {
        words
            .next()
            .and_then(|w| w.parse::<u64>().ok())
            .expect("a number")
    };
    let cost = Cost {
        time: Duration::from_micros(number()),
        peak_bytes: number(),
    };
    (cost, words.next().expect("a verdict").to_owned())
}

fn in_a_child(path: &Path, job: bool, limit: Duration) -> (Cost, String) {
    let mut best = run_child(path, job);
    // A busy machine may slow down a run, but not five times.
    for _ in 0..4 {
        if best.0.is_within(limit) || best.0.time > CHILD_LIMIT {
            break;
        }
        let again = run_child(path, job);
        if again.0.time < best.0.time {
            best = again;
        }
    }
    best
}

/// Checks that each of `files` ends with a message that begins with `begins` and contains its own text, within the limits.
fn all_end(files: &[(&str, Vec<u8>, &str)], job: bool, begins: &str) {
    all_end_within(TIME_LIMIT, files, job, begins);
}

fn all_end_within(limit: Duration, files: &[(&str, Vec<u8>, &str)], job: bool, begins: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("hostile.gguf");
    let mut wrong = Vec::new();
    for (change, bytes, says) in files {
        fs::write(&path, bytes).expect("the file is written");
        let (cost, verdict) = in_a_child(&path, job, limit);
        let line = format!("{change}: {cost:?} {verdict}");
        println!("{line}");
        let ended = cost.peak_bytes < u64::MAX;
        let right = ended && verdict.starts_with(begins) && verdict.contains(says);
        if !right || !cost.is_within(limit) || !cost.is_small() {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn valid() -> Vec<u8> {
    TinyModel::default().bytes()
}

// [CAND-074]
#[cfg(target_os = "linux")]
#[test]
fn a_model_without_a_usable_tokenizer_is_refused() {
    let file = valid();
    let files = [
        (
            "no kind",
            without(&file, "tokenizer.ggml.model"),
            "has no `tokenizer.ggml.model`",
        ),
        (
            "no vocabulary",
            without(&file, "tokenizer.ggml.tokens"),
            "has no `llama.vocab_size`",
        ),
        (
            "no merges",
            without(&file, "tokenizer.ggml.merges"),
            "has no `tokenizer.ggml.merges`",
        ),
        (
            "an unknown kind",
            with_text(&file, "tokenizer.ggml.model", "abacus"),
            "abacus",
        ),
    ];
    all_end(&files, false, "refused");
}

/// Returns a `phi3` file with LongRoPE.
fn phi3(attn_factor: Option<f32>) -> Vec<u8> {
    let model = TinyModel {
        architecture: "phi3",
        phi3: Phi3 {
            original_context: Some(256),
            attn_factor,
            ..Phi3::default()
        },
        ..TinyModel::default()
    };
    model.bytes()
}

/// Returns a file in which the first tensor named `from` is named `to`. Both names have the same length.
fn with_tensor_called(file: &[u8], from: &str, to: &str) -> Vec<u8> {
    let mut file = file.to_vec();
    let mut names = file.windows(from.len());
    let at = names.position(|bytes| bytes == from.as_bytes());
    let at = at.expect("the tensor is there");
    file[at..at + to.len()].copy_from_slice(to.as_bytes());
    file
}

// [CAND-092]
#[cfg(target_os = "linux")]
#[test]
fn fused_tensors_and_context_factors_that_contradict_the_numbers_are_refused() {
    let valid = phi3(Some(1.25));
    let layout = Layout::of(&valid);
    let with = |key: &str, value: [u8; 4]| {
        let mut file = valid.clone();
        let at = layout.value(&format!("phi3.{key}")).at;
        file[at..at + 4].copy_from_slice(&value);
        file
    };
    let with_number = |key: &str, value: u32| with(key, value.to_le_bytes());
    let mut files = Vec::new();
    for (key, value, says) in [
        (
            "feed_forward_length",
            57,
            "tensor `blk.0.ffn_up.weight` is [112, 32], but the header requires [114, 32]",
        ),
        (
            "feed_forward_length",
            1 << 24,
            "tensor `blk.0.ffn_up.weight`",
        ),
        ("feed_forward_length", 0, "`phi3.feed_forward_length`"),
        (
            "feed_forward_length",
            1 << 31,
            "feed-forward width is 2147483648",
        ),
        (
            "attention.head_count_kv",
            2,
            "tensor `blk.0.attn_qkv.weight` is [48, 32], but the header requires [64, 32]",
        ),
        ("attention.head_count", 2, "tensor `blk.0.attn_qkv.weight`"),
        (
            "rope.dimension_count",
            4,
            "tensor `rope_factors_long.weight` is [3]",
        ),
        ("rope.dimension_count", 7, "rotated dimensions is 7"),
        ("rope.dimension_count", 10, "rotated dimensions is 10"),
        (
            "rope.scaling.original_context_length",
            0,
            "original context length is 0",
        ),
        (
            "rope.scaling.original_context_length",
            1,
            "original context length is 1",
        ),
        (
            "rope.scaling.original_context_length",
            1 << 31,
            "original context length is 2147483648",
        ),
    ] {
        files.push((key, with_number(key, value), says));
    }
    for value in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
        let key = "rope.scaling.attn_factor";
        let says = "`phi3.rope.scaling.attn_factor`";
        files.push((key, with(key, value.to_le_bytes()), says));
    }
    for (from, to, says) in [
        (
            "rope_factors_long",
            "rope_factors_none",
            "no tensor `rope_factors_long.weight`",
        ),
        (
            "blk.0.attn_qkv",
            "blk.0.attn_qvk",
            "no tensor `blk.0.attn_qkv.weight`",
        ),
        (
            "blk.0.ffn_up",
            "blk.0.ffn_pu",
            "no tensor `blk.0.ffn_up.weight`",
        ),
        // With this name the file seems to have a separate gate.
        (
            "blk.0.ffn_down",
            "blk.0.ffn_gate",
            "tensor `blk.0.ffn_gate.weight` is [32, 56]",
        ),
    ] {
        files.push((from, with_tensor_called(&valid, from, to), says));
    }
    // The same number of elements, in rows of another length.
    let mut narrow = valid.clone();
    let fused = layout
        .all(Field::Dimension)
        .filter(|place| place.of == "blk.0.attn_qkv.weight");
    for (place, size) in fused.zip([16u64, 96]) {
        narrow[place.at..place.at + 8].copy_from_slice(&size.to_le_bytes());
    }
    files.push((
        "narrow rows",
        narrow,
        "tensor `blk.0.attn_qkv.weight` is [96, 16]",
    ));
    all_end(&files, false, "refused");
    for (change, file) in [
        ("no factor of the angles", phi3(None)),
        (
            "a wide window",
            with_number("attention.sliding_window", u32::MAX),
        ),
    ] {
        all_end(&[(change, file, "")], false, "accepted");
    }
}

// [CAND-021] [CAND-074]
#[cfg(target_os = "linux")]
#[test]
fn a_model_with_a_template_that_never_ends_takes_raw_prompts_only() {
    let file = valid();
    let files: Vec<_> = ENDLESS
        .iter()
        .map(|(change, template)| {
            let bytes = with_text(&file, "tokenizer.chat_template", template);
            (*change, bytes, "the model's chat template")
        })
        .collect();
    all_end_within(
        TEMPLATE_TIME_LIMIT,
        &files,
        false,
        "raw only TemplateFailed",
    );
}

// [CAND-021]
#[cfg(target_os = "linux")]
#[test]
fn a_template_that_turns_hostile_in_a_job_fails_that_job() {
    let file = valid();
    let files: Vec<_> = ENDLESS
        .iter()
        .map(|(change, hostile)| {
            let source = format!("{{% if messages|length > 1 %}}{hostile}{{% endif %}}fine");
            let bytes = with_text(&file, "tokenizer.chat_template", &source);
            (*change, bytes, "the model's chat template")
        })
        .collect();
    all_end(&files, true, "failed TemplateFailed");
}

// [CAND-021]
#[cfg(target_os = "linux")]
#[test]
fn a_template_that_runs_away_is_stopped_by_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.gguf");
    let later = format!("{{% if messages|length > 1 %}}{RUNAWAY}{{% endif %}}fine");
    for (template, job, begins) in [
        (RUNAWAY, false, "raw only TemplateFailed"),
        (&later, true, "failed TemplateFailed"),
    ] {
        fs::write(
            &path,
            with_text(&valid(), "tokenizer.chat_template", template),
        )
        .unwrap();
        let (cost, verdict) = run_child(&path, job);
        println!("{cost:?} {verdict}");
        assert!(
            verdict.starts_with(begins) && verdict.contains("not tried again"),
            "{verdict}"
        );
        // Filling the memory budget takes time, so only the memory is checked.
        assert!(cost.is_small(), "{cost:?}");
    }
}

// [CAND-021] [CAND-074]
#[cfg(target_os = "linux")]
#[test]
fn a_template_that_nests_deeply_costs_little() {
    let file = valid();
    let expression = |text: String| format!("{{{{ {text}x }}}}");
    let files = [
        ("parentheses", expression("(".repeat(60_000))),
        ("lists", expression("[".repeat(60_000))),
        ("negations", expression("not ".repeat(16_000))),
        ("signs", expression("-".repeat(60_000))),
        ("operators", expression("x~".repeat(30_000))),
        ("filters", format!("{{{{ x{} }}}}", "|e".repeat(30_000))),
        ("attributes", format!("{{{{ x{} }}}}", ".x".repeat(30_000))),
        ("conditions", "{%if x%}".repeat(8_000)),
        (
            "choices",
            format!("{{% if x %}}{}{{% endif %}}", "{%elif x%}".repeat(6_000)),
        ),
        (
            "conditional values",
            expression("x if x else ".repeat(5_000)),
        ),
        ("powers", expression("2**".repeat(20_000))),
    ]
    .map(|(change, source)| {
        let bytes = with_text(&file, "tokenizer.chat_template", &source);
        (change, bytes, "")
    });
    // The files may be refused or not, but loading them ends.
    all_end(&files, false, "");
}
