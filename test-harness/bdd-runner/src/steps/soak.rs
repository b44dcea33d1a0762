//! Steps about the seeded share of the long run.

use cucumber::{then, when};

use crate::house::House;
use crate::soak::{self, Options};

#[when(
    expr = "{int} processes of the whole chain are killed, drawn from the seed {int}, in at most {float} minutes"
)]
async fn kill(house: &mut House, kills: u32, seed: u64, minutes: f64) {
    let options = Options {
        kills,
        seed: Some(seed),
        minutes: Some(minutes),
        pools: 2,
        clients: 6,
        keep: false,
    };
    let report = soak::run(&options, |_| {}).await;
    house.soak = Some(report.unwrap_or_else(|error| panic!("{error:#}")));
}

#[then("nothing is lost, doubled or spliced")]
fn sound(house: &mut House) {
    let report = house.soak.as_ref().expect("there was a run");
    println!("{report}");
    assert!(report.is_sound(), "{report}");
    // A run without kills or without completed jobs proves nothing.
    assert!(
        report.kills() > 0 && report.jobs.contains_key("completed"),
        "{report}"
    );
}
