//! Runs the scenarios of `features/` against the binaries that lie beside this one.
//!
//! Every scenario has a home and ports of its own, and leaves no process behind. `LLORCH_TEST_MODEL` names the file of
//! the catalogue's default model; `scripts/test` fetches it and sets the variable. Scenarios tagged `@soak` take long and
//! run only when asked for, with `--tags @soak`.

use std::process::ExitCode;

use bdd_runner::house::House;
use cucumber::World as _;
use cucumber::writer::Stats as _;
use futures_util::FutureExt as _;

/// Where the scenarios are.
const FEATURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/features");

#[tokio::main]
async fn main() -> ExitCode {
    let writer = House::cucumber()
        // Two processors: more at once would only make the models slower.
        .max_concurrent_scenarios(2)
        .fail_on_skipped()
        .after(|_, _, _, _, house| {
            async move {
                if let Some(house) = house {
                    house.close().await;
                }
            }
            .boxed_local()
        })
        // `--name` and `--tags` replace this filter.
        .filter_run(FEATURES, |_, _, scenario| {
            !scenario.tags.iter().any(|tag| tag == "soak")
        })
        .await;
    let scenarios = &writer.scenarios_stats();
    let failed =
        scenarios.failed + scenarios.skipped + writer.hook_errors() + writer.parsing_errors();
    println!("{} passed, {failed} failed", scenarios.passed);
    // A filter that matches nothing has tested nothing.
    if failed > 0 || scenarios.passed == 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
