//! A share of `bdd-runner determinism`.

use bdd_runner::determinism::{Options, compare};

// [BDD-062] [CAND-015] [CAND-017] [CAND-019]
#[test]
fn jobs_have_the_same_tokens_however_they_are_run() {
    let model = std::env::var_os("LLORCH_TEST_MODEL").expect(
        "LLORCH_TEST_MODEL must name the test model; `scripts/test` fetches it and sets it",
    );
    let seed = std::env::var("LLORCH_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    let options = Options {
        model: model.into(),
        jobs: 10,
        seed,
    };
    let outcomes = compare(&options, |outcome| println!("{outcome}")).unwrap();
    assert!(outcomes.len() >= 9, "a way for every set of instructions");
    for outcome in outcomes {
        assert!(outcome.is_equal(), "seed {seed}: {outcome}");
    }
}
