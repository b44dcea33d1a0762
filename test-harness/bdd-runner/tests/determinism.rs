//! A share of `bdd-runner determinism`, on models small enough for an unoptimised build.

#[path = "../../../bin/llorch-candled/tests/support/tiny_model.rs"]
#[allow(dead_code)]
mod tiny_model;

use bdd_runner::determinism::{Options, compare};
use tiny_model::TinyModel;

// [BDD-062] [CAND-015] [CAND-017] [CAND-019]
#[test]
fn jobs_have_the_same_tokens_however_they_are_run() {
    let seed = std::env::var("LLORCH_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    println!("seed {seed}: LLORCH_TEST_SEED={seed} repeats it");
    let folder = tempfile::tempdir().unwrap();
    for architecture in ["llama", "gemma3"] {
        let model = folder.path().join(architecture);
        let tiny = TinyModel {
            architecture,
            ..TinyModel::default()
        };
        tiny.write(&model).unwrap();
        let options = Options {
            model,
            jobs: 40,
            seed,
        };
        let outcomes = compare(&options, |outcome| println!("{architecture}: {outcome}")).unwrap();
        assert!(outcomes.len() >= 9, "a way for every set of instructions");
        for outcome in outcomes {
            assert!(outcome.is_equal(), "{architecture}, seed {seed}: {outcome}");
        }
    }
}
