//! Tests that every run of a script stays within its limits.

use std::process::Command;

use super::*;

// [ORCHCORE-142] [P21]
#[test]
fn hostile_scripts_end_at_a_limit() {
    use ScriptErrorKind as K;
    let deep_array = "let a = []; for i in 0..100000 { a = [a]; }";
    let cases: Vec<(&str, String, &[K])> = vec![
        ("an endless loop", body("loop {}"), &[K::Limit]),
        (
            "an endless while",
            body("while true { let x = 1; }"),
            &[K::Limit],
        ),
        (
            "recursion",
            "fn f(n) { f(n + 1) } fn schedule(ctx) { f(0) }".into(),
            &[K::Limit],
        ),
        (
            "mutual recursion",
            "fn f(n) { g(n) } fn g(n) { f(n) } fn schedule(ctx) { f(0) }".into(),
            &[K::Limit],
        ),
        (
            "a string that doubles",
            body("let s = \"x\"; loop { s += s; }"),
            &[K::Limit],
        ),
        (
            "interpolation that doubles",
            body("let s = \"x\"; loop { s = `${s}${s}`; }"),
            &[K::Limit],
        ),
        (
            "a padded string",
            body("let s = \"\"; s.pad(1000000000000, \"x\"); []"),
            &[K::Limit],
        ),
        (
            "a replacement that multiplies",
            body("let s = \"\"; s.pad(16000, \"x\"); s.replace(\"x\", s); []"),
            &[K::Limit],
        ),
        (
            "an array that doubles",
            body("let a = [1]; loop { a += a; }"),
            &[K::Limit],
        ),
        (
            "a padded array",
            body("let a = []; a.pad(1000000000000, 0); []"),
            &[K::Limit],
        ),
        (
            "a list of huge strings",
            body("let s = \"\"; s.pad(16000, \"x\"); let a = []; loop { a.push(s); }"),
            &[K::Limit],
        ),
        (
            "a growing map",
            body("let m = #{}; let i = 0; loop { m[`${i}`] = i; i += 1; }"),
            &[K::Limit],
        ),
        ("a deep array", body(deep_array), &[K::Limit]),
        (
            "a deep array that is compared, printed and returned",
            body("let a = []; for i in 0..4000 { a = [a]; } let b = a; print(a == b); print(a); a"),
            &[K::Result, K::Limit],
        ),
        (
            "a deep map",
            body("let a = #{}; for i in 0..100000 { a = #{a: a}; }"),
            &[K::Limit],
        ),
        (
            "an endless range",
            body("for i in 0..9223372036854775807 { }"),
            &[K::Limit],
        ),
        (
            "endless iteration over views",
            body("loop { for j in ctx.jobs { j.id } }"),
            &[K::Limit],
        ),
        (
            "many variables",
            body(
                &(0..1000)
                    .map(|i| format!("let v{i} = 1;"))
                    .collect::<String>(),
            ),
            &[K::Limit, K::Compile],
        ),
        ("import", body("import \"os\" as os; []"), &[K::Compile]),
        ("eval", body("eval(\"loop {}\")"), &[K::Compile]),
        (
            "eval through a function pointer",
            body("let f = Fn(\"ev\" + \"al\"); f.call(\"[]\")"),
            &[K::Runtime, K::Compile],
        ),
        (
            "curry",
            body("let f = Fn(\"x\"); loop { f = f.curry(f); }"),
            &[K::Compile],
        ),
        ("sleep", body("sleep(1000000); []"), &[K::Runtime]),
        (
            "the clock",
            body("timestamp(); []"),
            &[K::Runtime, K::Compile],
        ),
        (
            "a sort that never ends, within a sort",
            body(
                "let a = []; for i in 0..2000 { a.push(i * 7919 % 2000); }
                 a.sort(|x, y| { let b = [1, 2, 3]; b.sort(|p, q| { loop {} }); 0 }); []",
            ),
            &[K::Limit],
        ),
        (
            "a comparison that never ends",
            body("let a = []; a.pad(4000, 0); a.dedup(|x, y| { loop {} }); []"),
            &[K::Limit],
        ),
        (
            "a comparer that throws",
            body("let a = [1, 2]; a.sort(|x, y| { throw 1 }); []"),
            &[K::Runtime],
        ),
        (
            "a comparer that returns nothing",
            body("let a = [1, 2]; a.sort(|x, y| {}); []"),
            &[K::Runtime],
        ),
        (
            "a replacement of characters that multiplies",
            body("let s = \"\"; s.pad(16000, \"x\"); s.replace('x', s); []"),
            &[K::Limit],
        ),
        ("a throw", body("throw \"no\""), &[K::Runtime]),
        (
            "a huge throw",
            body("let s = \"\"; s.pad(16000, \"x\"); throw s"),
            &[K::Runtime],
        ),
        ("division by zero", body("1 / 0"), &[K::Runtime]),
        ("overflow", body("9223372036854775807 + 1"), &[K::Runtime]),
        ("an unknown name", body("nothing"), &[K::Runtime]),
        ("an index past the end", body("ctx.jobs[99]"), &[K::Runtime]),
        ("a missing property", body("ctx.secrets"), &[K::Runtime]),
        (
            "a view that is written to",
            body("ctx.jobs[0].id = \"x\"; []"),
            &[K::Runtime, K::Compile],
        ),
        ("no schedule", "fn plan(ctx) { [] }".into(), &[K::Compile]),
        (
            "two parameters",
            "fn schedule(a, b) { [] }".into(),
            &[K::Compile],
        ),
        ("no script", "\u{0}\u{1}".into(), &[K::Compile]),
        ("nothing", String::new(), &[K::Compile]),
        (
            "10 MB",
            format!("{}{}", body("[]"), " ".repeat(10 << 20)),
            &[K::Compile],
        ),
        (
            "a deep expression",
            body(&format!("{}1{}", "(".repeat(5000), ")".repeat(5000))),
            &[K::Compile],
        ),
        (
            "a long sum",
            body(&vec!["1"; 20_000].join("+")),
            &[K::Compile],
        ),
        (
            "deep blocks",
            body(&format!("{}{}", "{".repeat(9000), "}".repeat(9000))),
            &[K::Compile],
        ),
        ("deep lists", body(&"[".repeat(30_000)), &[K::Compile]),
        (
            "many signs",
            body(&format!("{}1", "- ".repeat(20_000))),
            &[K::Compile],
        ),
    ];
    let mut wrong = Vec::new();
    for (what, source, expected) in cases {
        let error = error(&source);
        if !expected.contains(&error.kind) || error.message.chars().count() > MAX_MESSAGE {
            wrong.push(format!("{what}: {error:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // The thread still works.
    assert_eq!(
        proposals(&body("[dispatch(ctx.jobs[0], ctx.workers[0])]")).len(),
        1
    );
}

/// Environment variable that is set for the process of a test that measures memory.
const ALONE: &str = "ORCHCORE_TEST_ALONE";

/// Returns the peak memory of this process so far, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let words = line.unwrap().split_whitespace().nth(1);
    words.unwrap().parse().unwrap()
}

// [ORCHCORE-142] [P21] Replacing each of 16,000 letters by 16,000 others would take 256 MB.
#[test]
fn a_text_that_may_not_be_is_never_built() {
    // Runs in a process of its own, because other tests of this process take memory as well.
    if std::env::var_os(ALONE).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["a_text_that_may_not_be_is_never_built", "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(" 1 passed"), "{output:?}");
        return;
    }
    let before = peak_kib();
    for find in ["'x'", "\"x\""] {
        let source = body(&format!(
            "let s = \"\"; s.pad(16000, \"x\"); s.replace({find}, s); []"
        ));
        assert_eq!(error(&source).kind, ScriptErrorKind::Limit);
    }
    let grown = peak_kib() - before;
    assert!(grown < 100 << 10, "{grown} KiB");
}

// [ORCHCORE-142] [P21]
#[test]
fn every_wrong_return_value_is_an_error() {
    for returned in [
        "",
        "()",
        "1",
        "1.5",
        "true",
        "'c'",
        "\"text\"",
        "#{}",
        "#{action: \"wait\"}",
        "ctx",
        "ctx.jobs",
        "ctx.jobs[0]",
        "[()]",
        "[1]",
        "[[]]",
        "[\"dispatch\"]",
        "[#{}]",
        "[ctx]",
        "Fn(\"schedule\")",
        "[wait(ctx.jobs[0]), 1]",
        "0..5",
        "wait(ctx.jobs[0])",
    ] {
        let error = error(&body(returned));
        assert_eq!(error.kind, ScriptErrorKind::Result, "{returned}: {error:?}");
    }
}

// [ORCHCORE-142] [P21]
#[test]
fn a_run_that_takes_too_long_is_given_up() {
    let runner = Runner::start().unwrap();
    // Few operations, each of them slow, so that the limit on operations does not apply.
    let source =
        body("let a = []; a.pad(4000, 0); let n = 0; while n < 1900000 { a.sort(); n += 1; } []");
    let slow = Script::compile(source.as_bytes()).unwrap();
    let limit = Duration::from_millis(50);
    let snapshot = one_free_worker();
    let begun = Instant::now();
    let ran = runner.run(&slow, pass(&snapshot), limit, false);
    let took = begun.elapsed();
    assert_eq!(ran.result.unwrap_err().kind, ScriptErrorKind::Timeout);
    assert!(took < Duration::from_secs(5), "{took:?}");
    // The thread becomes available again, and refuses runs until then.
    let quick = Script::compile(body("[]").as_bytes()).unwrap();
    let end = Instant::now() + LONG;
    loop {
        match runner.run(&quick, pass(&snapshot), LONG, false).result {
            Ok(acts) => break assert!(acts.is_empty()),
            Err(error) => assert_eq!(error.kind, ScriptErrorKind::Busy),
        }
        assert!(Instant::now() < end, "the thread never came back");
        std::thread::sleep(Duration::from_millis(1));
    }
}

// [ORCHCORE-142] [P21] A single operation may search the whole fleet without interruption, but callers don't wait for it.
#[test]
fn a_run_that_can_not_be_interrupted_is_not_waited_for() {
    let workers = |pool: usize| (0..4).map(move |w| worker(&format!("w{pool}-{w}"), "a", 2));
    let pools = (0..8000).map(|p| pool(&format!("p{p}"), 0, workers(p).collect()));
    let snapshot = snapshot(vec![job("a", 10)], pools.collect());
    let slow = body("let j = ctx.jobs[0]; loop { best_worker(ctx, j); best_device(ctx, j); }");
    let slow = Script::compile(slow.as_bytes()).unwrap();
    let runner = Runner::start().unwrap();
    let pass = pass(&snapshot);
    let run = |limit| {
        let ran = runner.run(&slow, Arc::clone(&pass), limit, false);
        ran.result.unwrap_err().kind
    };
    // A run is refused as busy only if an earlier one was abandoned. On a busy machine, a run may notice its deadline and end
    // in time.
    let kinds: Vec<_> = (0..50)
        .map(|_| run(Duration::from_millis(5)))
        .take_while(|kind| *kind != ScriptErrorKind::Busy)
        .collect();
    assert!(!kinds.is_empty() && kinds.len() < 50, "{kinds:?}");
    assert!(kinds.iter().all(|kind| *kind == ScriptErrorKind::Timeout));
}
