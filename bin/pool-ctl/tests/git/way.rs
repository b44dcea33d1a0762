//! Files of the user in places where a commit of a submodule has its own.

use serde_json::json;

use crate::World;

/// Creates a checkout whose submodule `lib` must move to a commit with the file `notes`. The user has a file `notes` that git
/// does not know, ignored or not.
fn with_notes(ignored: bool) -> World {
    let world = World::with_submodule();
    world.write("lib-author/notes", "theirs\n");
    world.new_library_commit("two\n");
    world.write("host/lib/notes", "mine\n");
    if ignored {
        let file = world.git("host/lib", &["rev-parse", "--git-path", "info/exclude"]);
        std::fs::write(world.path("host/lib").join(file), "notes\n").unwrap();
    }
    world
}

#[test] // [POOLCTL-045], [POOLCTL-046]
fn a_file_in_the_way_in_a_submodule_stays_until_its_owner_has_seen_it_named() {
    for ignored in [true, false] {
        let world = with_notes(ignored);
        let (host, lib) = (world.head("host"), world.head("host/lib"));
        let stays = || {
            assert_eq!(
                (world.head("host/lib"), world.read("host/lib/notes")),
                (lib.clone(), "mine\n".into()),
                "ignored: {ignored}"
            );
        };

        // `sync` names the file before anything is moved.
        world
            .run(&["sync"])
            .exits(4)
            .says(&["lib: to be overwritten: notes", "sync --yes"]);
        assert_eq!(world.head("host"), host);
        stays();

        // `pull` leaves the submodule alone.
        let pulled = world.json(&["pull"]);
        assert_eq!(pulled["submodules"][0]["action"], "left");
        let reason = pulled["submodules"][0]["reason"].as_str().unwrap();
        assert!(
            reason.contains("1 file not known to git would be overwritten: notes")
                && reason.contains("move them away"),
            "{reason}"
        );
        assert_eq!(world.head("host"), world.head("author"));
        stays();

        world.run(&["submodules", "update"]).exits(4).says(&[
            "submodule lib: 1 file not known to git would be overwritten: notes",
            "move them away",
            "submodules reset lib --yes",
        ]);
        stays();

        world
            .run(&["submodules", "reset"])
            .exits(4)
            .says(&["lib: to be overwritten: notes", "submodules reset --yes"]);
        stays();
        world.run(&["submodules", "reset", "--yes"]).exits(0);
        assert_eq!(world.read("host/lib/notes"), "theirs\n");
        assert_eq!(world.json(&["status"])["submodules"][0]["state"], "in_step");
    }
}

#[test] // [POOLCTL-046]
fn sync_overwrites_what_it_listed_in_a_submodule() {
    for ignored in [true, false] {
        let world = with_notes(ignored);
        let synced = world.json(&["sync", "--yes"]);
        assert_eq!(
            (
                &synced["lost"][0]["place"],
                &synced["lost"][0]["overwritten"]
            ),
            (&json!("lib"), &json!(["notes"]))
        );
        assert_eq!(world.read("host/lib/notes"), "theirs\n");
        assert_eq!(world.json(&["status"])["submodules"][0]["state"], "in_step");
    }
}

#[test] // [POOLCTL-045]
fn moved_away_the_file_stops_nothing() {
    let world = with_notes(true);
    std::fs::rename(world.path("host/lib/notes"), world.path("notes")).unwrap();
    let pulled = world.json(&["pull"]);
    assert_eq!(pulled["submodules"][0]["action"], "updated");
    assert_eq!(world.read("host/lib/notes"), "theirs\n");
}

#[test] // [POOLCTL-044]
fn a_known_file_makes_room_for_a_folder_and_a_folder_for_a_file() {
    let world = World::new();
    world.write("author/a", "file");
    world.write("author/b/c", "in a folder");
    world.commit("author", "first");
    world.run(&["pull"]).exits(0);
    world.git("author", &["rm", "-q", "-r", "a", "b"]);
    world.write("author/a/x", "in a folder");
    world.write("author/b", "file");
    world.commit("author", "the other way round");
    world.write("host/b/own", "mine");
    world
        .run(&["pull"])
        .exits(4)
        .says(&["1 file not known to git would be overwritten: b/own"]);
    std::fs::remove_file(world.path("host/b/own")).unwrap();
    world.run(&["pull"]).exits(0);
    assert_eq!(world.read("host/b"), "file");
}

#[test] // [POOLCTL-045], [POOLCTL-046]
fn files_in_the_folder_of_a_submodule_that_is_not_fetched_stay() {
    let world = World::with_submodule();
    world.git("host", &["submodule", "--quiet", "deinit", "lib"]);
    world.write("host/lib/code", "mine\n");
    for command in [
        &["submodules", "update"][..],
        &["submodules", "reset", "--yes"],
        &["sync", "--yes"],
    ] {
        world.run(command).exits(4).says(&[
            "submodule lib: it is not fetched yet, but its folder is not empty",
            "lib/code",
            "move them away",
        ]);
        assert_eq!(world.read("host/lib/code"), "mine\n");
    }
}

#[test] // [POOLCTL-044], [POOLCTL-046]
fn a_change_that_git_was_told_to_pass_over_is_named_beforehand() {
    for (told, heard) in [
        ("--assume-unchanged", "--no-assume-unchanged"),
        ("--skip-worktree", "--no-skip-worktree"),
    ] {
        let world = World::with_submodule();
        world.write("author/README", "two\n");
        world.commit("author", "second");
        world.new_library_commit("two\n");
        let before = world.head("host");
        let unchanged = |place: &str, file: &str| {
            assert_eq!(world.head("host"), before);
            assert_eq!(world.read(&format!("{place}/{file}")), "mine\n");
        };
        world.git("host", &["update-index", told, "README"]);
        world.write("host/README", "mine\n");
        let command = format!("git update-index {heard} README");
        for args in [&["pull"][..], &["sync"], &["sync", "--yes"]] {
            world.run(args).exits(4).says(&[
                "1 file changed here that git was told to ignore: README",
                &command,
            ]);
            unchanged("host", "README");
        }
        world.git("host", &["update-index", heard, "README"]);
        world.git("host", &["checkout", "-q", "README"]);

        world.git("host/lib", &["update-index", told, "code"]);
        world.write("host/lib/code", "mine\n");
        let command = format!("git -C lib update-index {heard} code");
        for args in [&["sync"][..], &["sync", "--yes"]] {
            world.run(args).exits(4).says(&[
                "submodule lib: 1 file changed here that git was told to ignore: code",
                &command,
            ]);
            unchanged("host/lib", "code");
        }
        let pulled = world.json(&["pull"]);
        assert_eq!(pulled["submodules"][0]["action"], "left");
        for args in [
            &["submodules", "update"][..],
            &["submodules", "reset"],
            &["submodules", "reset", "--yes"],
        ] {
            world
                .run(args)
                .exits(4)
                .says(&["told to ignore: code", &command]);
            assert_eq!(world.read("host/lib/code"), "mine\n");
        }
        world.git("host/lib", &["update-index", heard, "code"]);
        world.run(&["submodules", "reset", "--yes"]).exits(0);
        assert_eq!(world.read("host/lib/code"), "two\n");
    }
}

#[test] // [POOLCTL-046]
fn sync_does_not_drop_a_change_unseen_where_the_remote_has_none() {
    let world = World::new();
    world.git("host", &["update-index", "--assume-unchanged", "README"]);
    // The file is unchanged, so there is nothing to name.
    world.run(&["sync", "--yes"]).exits(0);
    world.write("host/README", "mine\n");
    world
        .run(&["sync", "--yes"])
        .exits(4)
        .says(&["told to ignore: README"]);
    assert_eq!(world.read("host/README"), "mine\n");
    world.run(&["pull"]).exits(0);
}

#[test] // [POOLCTL-047]
fn another_branch_of_a_submodule_overwrites_no_unknown_file() {
    let world = with_notes(true);
    world
        .run(&["submodules", "branch", "lib", "main"])
        .exits(4)
        .says(&[
            "submodule lib: 1 file not known to git would be overwritten: notes",
            "move them away",
        ]);
    assert_eq!(world.read("host/lib/notes"), "mine\n");
}
