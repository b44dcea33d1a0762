//! Tests of the soak's plan, which depends only on its seed.

use bdd_runner::soak::plan::{Blow, Victim, plan};

// [BDD-061]
#[test]
fn the_same_seed_is_the_same_plan() {
    assert_eq!(plan(7, 50), plan(7, 50));
    assert_ne!(plan(7, 50), plan(8, 50));
}

// [BDD-061]
#[test]
fn a_plan_kills_as_often_as_asked_and_spares_no_part() {
    let strikes = plan(3, 200);
    let kills = |victim| {
        strikes
            .iter()
            .filter(|s| s.victim == victim && matches!(s.blow, Blow::Kill { .. }))
            .count()
    };
    let freezes = strikes
        .iter()
        .filter(|s| matches!(s.blow, Blow::Freeze { .. }))
        .count();
    assert_eq!(Victim::ALL.map(kills).iter().sum::<usize>(), 200);
    assert!(
        Victim::ALL.map(kills).iter().all(|&kills| kills > 20),
        "{strikes:?}"
    );
    assert!(freezes > 20, "{freezes}");
}
