//! Submodules: during a pull, with their own commands, and on a branch.

use serde_json::Value;

use crate::World;

#[test] // [POOLCTL-045]
fn pull_takes_submodules_along_that_were_in_step() {
    let world = World::with_submodule();
    let new = world.new_library_commit("two\n");
    let pulled = world.json(&["pull"]);
    assert_eq!(pulled["submodules"][0]["action"], "updated");
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (new.clone(), "two\n".into())
    );

    // A submodule with changes stays, and is listed with the command that fixes it.
    world.write("host/lib/code", "mine\n");
    let newer = world.new_library_commit("three\n");
    let ran = world.run(&["pull"]).exits(0);
    assert!(
        ran.out
            .contains("submodule lib: left unchanged: it has local changes"),
        "{}",
        ran.out
    );
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (new, "mine\n".into())
    );
    world
        .run(&["submodules", "update"])
        .exits(4)
        .says(&["submodule lib: 1 file with local changes: code"]);
    let status = world.json(&["submodules", "status"]);
    assert_eq!(
        (&status[0]["state"], &status[0]["modified"]),
        (&"modified".into(), &serde_json::json!(["code"]))
    );
    assert_eq!(
        world.json(&["status"])["submodules"][0]["state"],
        "modified"
    );
    world
        .run(&["submodules", "reset", "lib"])
        .exits(4)
        .says(&["lib: changes of code", "submodules reset lib --yes"]);
    assert_eq!(world.read("host/lib/code"), "mine\n");
    world.run(&["submodules", "reset", "lib", "--yes"]).exits(0);
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (newer, "three\n".into())
    );
    assert_eq!(world.json(&["submodules", "status"])[0]["state"], "in_step");
}

#[test] // [POOLCTL-045]
fn a_new_submodule_comes_with_the_pull_and_one_left_out_stays_out() {
    let world = World::with_submodule();
    world.git("host", &["submodule", "--quiet", "deinit", "lib"]);
    world.library("tool");
    // A submodule has another one inside it.
    world.git(
        "tool-author",
        &["submodule", "--quiet", "add", "../lib.git", "inner lib"],
    );
    world.commit("tool-author", "nested");
    world.git(
        "author",
        &["submodule", "--quiet", "add", "../tool.git", "tools/tool"],
    );
    world.commit("author", "a second submodule");
    let pulled = world.json(&["pull"]);
    let moved = pulled["submodules"].as_array().unwrap();
    let seen: Vec<_> = moved
        .iter()
        .map(|one| {
            (
                one["path"].as_str().unwrap(),
                one["action"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(seen, [("tools/tool", "fetched"), ("inner lib", "fetched")]);
    assert_eq!(world.read("host/tools/tool/inner lib/code"), "one\n");
    assert!(!world.path("host/lib/code").exists());
    assert_eq!(
        world.json(&["submodules", "status", "lib"])[0]["state"],
        "missing"
    );
    world.run(&["submodules", "update", "lib"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "one\n");

    // A nested submodule that is out of step is reported, even if the outer one is in step.
    world.git(
        "host/tools/tool",
        &["submodule", "--quiet", "deinit", "inner lib"],
    );
    let rows = world.json(&["submodules", "status", "tools/tool"]);
    assert_eq!(
        (&rows[0]["state"], &rows[0]["nested"]),
        (
            &"in_step".into(),
            &serde_json::json!(["tools/tool/inner lib"])
        )
    );
    let told =
        "not in step inside it: tools/tool/inner lib; llorch-pool git submodules update tools/tool";
    for args in [&["status"][..], &["submodules", "status"]] {
        let ran = world.run(args).exits(0);
        assert!(ran.out.contains(told), "{}", ran.out);
    }
    world
        .run(&["submodules", "update", "tools/tool/inner lib"])
        .exits(3)
        .says(&["moves with the outer one: name tools/tool"]);
    world.run(&["submodules", "update", "tools/tool"]).exits(0);
    assert_eq!(world.read("host/tools/tool/inner lib/code"), "one\n");
    let rows = world.json(&["submodules", "status", "tools/tool"]);
    assert_eq!(rows[0]["nested"], serde_json::json!([]));

    let list = world.json(&["submodules", "list"]);
    assert_eq!(
        (&list[0]["name"], &list[0]["url"]),
        (&"lib".into(), &"../lib.git".into())
    );
    let ran = world
        .run(&["submodules", "update", "lob"])
        .exits(3)
        .says(&["no submodule lob", "name one of: lib, tools/tool"]);
    assert_eq!(ran.out, "");
}

#[test] // [POOLCTL-047]
fn a_submodule_can_follow_a_branch() {
    let world = World::with_submodule();
    let recorded = world.head("host/lib");
    world.git("lib-author", &["switch", "-q", "-c", "next"]);
    world.write("lib-author/code", "next\n");
    world.git("lib-author", &["commit", "-q", "-am", "next"]);
    world.git("lib-author", &["push", "-q", "origin", "next"]);
    let shown = world.json(&["submodules", "branch", "lib"]);
    assert_eq!(
        (&shown["follows"], &shown["branch"]),
        (&Value::Null, &Value::Null)
    );

    for (branch, code) in [("--force", 2), ("-c", 2), ("a..b", 2), ("gone", 3)] {
        world
            .run(&["submodules", "branch", "lib", "--", branch])
            .exits(code);
    }
    world.write("host/lib/code", "mine\n");
    world
        .run(&["submodules", "branch", "lib", "next"])
        .exits(4)
        .says(&["1 file with local changes: code"]);
    world.git("host/lib", &["checkout", "-q", "--", "code"]);
    let set = world.json(&["submodules", "branch", "lib", "next"]);
    assert_eq!(
        (&set["follows"], &set["branch"]),
        (&"next".into(), &"next".into())
    );
    assert_eq!(world.read("host/lib/code"), "next\n");
    assert_eq!(
        world.git("host", &["config", "submodule.lib.branch"]),
        "next"
    );

    // The submodule moves forward along the branch.
    world.write("lib-author/code", "later\n");
    world.git("lib-author", &["commit", "-q", "-am", "later"]);
    world.git("lib-author", &["push", "-q", "origin", "next"]);
    world.run(&["submodules", "update"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "later\n");
    assert_eq!(
        world.json(&["submodules", "branch", "lib"])["branch"],
        "next"
    );
    // A reset returns to the recorded commit.
    world.run(&["submodules", "reset", "--yes"]).exits(0);
    assert_eq!(world.head("host/lib"), recorded);
    assert_eq!(
        world.json(&["submodules", "branch", "lib"])["follows"],
        Value::Null
    );
    world.run(&["submodules", "branch", "lib", "next"]).exits(0);
}

#[test] // [POOLCTL-045]
fn commits_on_no_branch_are_not_left_behind_unasked() {
    let world = World::with_submodule();
    world.write("host/lib/code", "mine\n");
    world.git("host/lib", &["commit", "-q", "-am", "precious work"]);
    let mine = world.head("host/lib");
    world.run(&["submodules", "update"]).exits(4).says(&[
        "1 commit on no branch",
        "precious work",
        "git switch -c",
    ]);
    assert_eq!(world.head("host/lib"), mine);
    world
        .run(&["submodules", "reset"])
        .exits(4)
        .says(&["precious work"]);
}
