//! `git sync`: the state of the remote, whatever the checkout has.

use crate::World;

#[test] // [POOLCTL-046]
fn sync_shows_what_would_be_lost_and_needs_yes() {
    let world = World::with_submodule();
    world.write("author/README", "two\n");
    world.write("author/other", "theirs");
    let recorded = world.new_library_commit("two\n");
    world.write("host/own", "x");
    world.git("host", &["add", "own"]);
    world.git("host", &["commit", "-q", "-m", "my own work"]);
    world.write("host/README", "mine\n");
    world.write("host/other", "untracked");
    world.write("host/scratch", "untracked");
    world.write("host/lib/code", "mine\n");
    world.git("host/lib", &["commit", "-q", "-am", "work in lib"]);
    world.write("host/lib/code", "mine too\n");
    let before = world.head("host");

    let ran = world.run(&["sync"]).exits(4).says(&[
        "  changes of README\n",
        "  to be overwritten: other\n",
        "my own work\n",
        "  lib: changes of code\n",
        "work in lib\n",
        "to do it: llorch-pool git sync --yes",
    ]);
    assert!(!ran.err.contains("scratch"), "{}", ran.err);
    world
        .run(&["sync", "--clean"])
        .exits(4)
        .says(&["to be removed: scratch", "sync --clean --yes"]);
    assert_eq!(
        (world.head("host"), world.read("host/README")),
        (before.clone(), "mine\n".into())
    );
    assert_eq!(world.read("host/lib/code"), "mine too\n");

    let synced = world.json(&["sync", "--yes"]);
    assert_eq!(
        (&synced["from"], &synced["to"]),
        (&before.into(), &world.head("author").into())
    );
    assert_eq!(synced["lost"][0]["place"], ".");
    assert_eq!(synced["lost"][1]["place"], "lib");
    assert_eq!(world.read("host/README"), "two\n");
    assert_eq!(world.read("host/other"), "theirs");
    assert_eq!(world.read("host/scratch"), "untracked");
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (recorded, "two\n".into())
    );
    assert_eq!(
        world.json(&["status"])["untracked"],
        serde_json::json!(["scratch"])
    );
    world.run(&["sync", "--clean", "--yes"]).exits(0);
    assert!(!world.path("host/scratch").exists());
    // Even with nothing to lose, nothing happens without --yes.
    world
        .run(&["sync"])
        .exits(4)
        .says(&["nothing of yours would be lost"]);
}
