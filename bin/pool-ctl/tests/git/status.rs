//! `git status`: the output, and the choice of the checkout.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use serde_json::Value;

use crate::World;
use crate::support::Ran;

#[test] // [POOLCTL-040]
fn status_tells_branch_distance_and_changes() {
    let world = World::new();
    let status = world.json(&["status"]);
    assert_eq!(
        (&status["branch"], &status["clean"]),
        (&"main".into(), &true.into())
    );
    assert_eq!(status["upstream"], "origin/main");
    assert_eq!(status["commit"], world.head("host").as_str());

    world.write("host/README", "changed\n");
    world.write("host/staged", "x");
    world.git("host", &["add", "staged"]);
    world.write("host/new", "x");
    world.git("host", &["commit", "-q", "--allow-empty", "-m", "own"]);
    world.write("host/staged2", "x");
    world.git("host", &["add", "staged2"]);
    world.write("author/README", "two\n");
    world.commit("author", "second");
    let status = world.json(&["status"]);
    assert_eq!(
        (&status["ahead"], &status["behind"]),
        (&1.into(), &0.into())
    );
    let status = world.json(&["status", "--fetch"]);
    assert_eq!(
        (&status["ahead"], &status["behind"]),
        (&1.into(), &1.into())
    );
    assert_eq!(status["clean"], false);
    assert_eq!(status["modified"], serde_json::json!(["README"]));
    assert_eq!(status["staged"], serde_json::json!(["staged2"]));
    assert_eq!(status["untracked"], serde_json::json!(["new"]));
    assert_eq!(status["operation"], Value::Null);
    let table = world.run(&["status"]).exits(0).out;
    for words in [
        "branch   main",
        "1 ahead, 1 behind",
        "1 modified:\n  README",
    ] {
        assert!(table.contains(words), "{table}");
    }
}

#[test] // [POOLCTL-040]
fn the_checkout_is_the_one_at_hand_the_configured_or_the_named_one() {
    let world = World::new();
    world.write("host/deep/er/file", "x");
    let in_folder = world
        .pool(&["status", "--format", "json"])
        .current_dir(world.path("host/deep/er"))
        .output()
        .unwrap();
    let root = world
        .path("host")
        .canonicalize()
        .unwrap()
        .display()
        .to_string();
    assert!(String::from_utf8_lossy(&in_folder.stdout).contains(&root));
    // The command runs from another folder.
    let elsewhere = |args: &[&str]| -> Ran {
        world
            .pool(args)
            .current_dir(world.path("home"))
            .output()
            .unwrap()
            .into()
    };
    fs::create_dir_all(world.path("home/config")).unwrap();
    let ran = elsewhere(&["status"])
        .exits(3)
        .says(&["is not in a git checkout", "repo_path"]);
    assert_eq!(ran.out, "");
    let named = elsewhere(&["status", "--repo", world.path("host").to_str().unwrap()]).exits(0);
    assert!(named.out.contains(&root));
    world.write(
        "home/config/pool-managerd.toml",
        &format!("repo_path = \"{root}\"\n"),
    );
    assert!(elsewhere(&["status"]).exits(0).out.contains(&root));
    elsewhere(&["status", "--repo", "/no/such/place"]).exits(3);
    // A bare repository has no files, and anyone may have put one inside a checkout.
    let bare = world.path("remote.git").display().to_string();
    elsewhere(&["status", "--repo", &bare]).exits(3);
}

#[test] // [POOLCTL-043]
fn odd_names_are_shown_and_kept_in_line() {
    let world = World::new();
    let names = [
        "with space",
        "new\nline",
        "quo\"te",
        "ünï漢",
        "esc\u{1b}[2Jape",
        ":(glob)*",
        "-rf",
    ];
    for name in names {
        world.write(&format!("host/{name}"), "x");
    }
    fs::write(
        world.path("host").join(OsStr::from_bytes(b"not\xffutf8")),
        "x",
    )
    .unwrap();
    let status = world.json(&["status"]);
    let untracked: Vec<_> = status["untracked"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    for name in names {
        assert!(untracked.contains(&name), "{name:?} in {untracked:?}");
    }
    assert!(untracked.contains(&"not\u{fffd}utf8"));
    let table = world.run(&["status"]).exits(0).out;
    assert!(table.contains("8 untracked:"), "{table}");
    assert!(
        table.contains(r#"  "new\nline""#) && table.contains(r#"  "esc\u{1b}[2Jape""#),
        "{table}"
    );
    assert!(!table.contains('\u{1b}'));

    // The same names as paths of submodules.
    world.library("lib");
    for path in ["sub with space", "ünï/quo\"te'"] {
        world.git(
            "author",
            &["submodule", "--quiet", "add", "../lib.git", path],
        );
    }
    world.commit("author", "odd paths");
    world.run(&["pull"]).exits(0);
    assert_eq!(world.read("host/sub with space/code"), "one\n");
    assert_eq!(world.read("host/ünï/quo\"te'/code"), "one\n");
    world
        .run(&["submodules", "reset", "ünï/quo\"te'", "--yes"])
        .exits(0);
}

#[test] // [POOLCTL-042]
fn without_git_the_message_says_how_to_get_it() {
    let world = World::new();
    let mut command = world.pool(&["status"]);
    command.env("PATH", world.path("nowhere"));
    let ran: Ran = command.output().unwrap().into();
    ran.exits(1)
        .says(&["`git` is not installed", "apt install git"]);
}
