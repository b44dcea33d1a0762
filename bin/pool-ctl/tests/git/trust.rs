//! Content of a repository that must neither run a program nor lead out of the checkout.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::World;
use crate::support::Ran;
use crate::support::program::write_program;

#[test] // [POOLCTL-041]
fn hooks_and_settings_of_a_repository_are_not_run() {
    let world = World::with_submodule();
    let hooks = [
        "post-checkout",
        "post-merge",
        "reference-transaction",
        "post-index-change",
        "pre-auto-gc",
        "post-rewrite",
        "pre-commit",
        "fsmonitor-watchman",
    ];
    for git in ["host/.git", "host/.git/modules/lib"] {
        for hook in hooks {
            world.set_trap(&format!("{git}/hooks/{hook}"));
        }
    }
    let trap = world.trap("trap");
    for dir in ["host", "host/lib"] {
        for key in [
            "core.fsmonitor",
            "core.sshCommand",
            "core.pager",
            "core.editor",
            "core.askPass",
            "diff.external",
            "diff.x.textconv",
            "sequence.editor",
        ] {
            world.git(dir, &["-c", "core.fsmonitor=false", "config", key, &trap]);
        }
        fs::create_dir_all(world.path("evil")).unwrap();
        world.set_trap("evil/post-checkout");
        world.git(
            dir,
            &[
                "-c",
                "core.fsmonitor=false",
                "config",
                "core.hooksPath",
                world.path("evil").to_str().unwrap(),
            ],
        );
    }
    world.git(
        "host",
        &[
            "-c",
            "core.fsmonitor=false",
            "config",
            "submodule.lib.update",
            &format!("!{trap}"),
        ],
    );
    world.nothing_ran();
    world.new_library_commit("two\n");
    world.run(&["status", "--fetch"]).exits(0);
    world.run(&["pull"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "two\n");
    world.new_library_commit("three\n");
    world.run(&["sync", "--yes", "--clean"]).exits(0);
    world.new_library_commit("four\n");
    world.run(&["sync", "--yes"]).exits(0);
    world.run(&["submodules", "status"]).exits(0);
    world.run(&["submodules", "reset", "--yes"]).exits(0);
    world.run(&["submodules", "branch", "lib", "main"]).exits(0);
    world.run(&["submodules", "update"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "four\n");
    world.nothing_ran();
    // The trap works: the plain git runs it.
    let _ = Command::new("git")
        .args(["status"])
        .current_dir(world.path("host"))
        .output();
    assert!(world.path("marked").exists());
}

#[test] // [POOLCTL-041]
fn settings_that_would_run_a_program_are_refused_by_name() {
    let world = World::with_submodule();
    let trap = world.trap("trap");
    for key in [
        "filter.evil.smudge",
        "remote.origin.uploadpack",
        "core.gitProxy",
        "core.alternateRefsCommand",
        "credential.helper",
        "lfs.customtransfer.a.path",
        "http.https://example.com/.saveCookies",
        "includeIf.onbranch:other.path",
    ] {
        world.git("host", &["config", key, &trap]);
        let (section, variable) = (key.split('.').next(), key.rsplit('.').next());
        let shown = variable.unwrap_or(key).to_lowercase();
        let section = section.unwrap_or(key).to_lowercase();
        for args in [
            &["status"][..],
            &["pull"],
            &["sync", "--yes"],
            &["submodules", "update"],
        ] {
            world
                .run(args)
                .exits(4)
                .says(&[&section, &shown, "git config --local --list"]);
        }
        world.git("host", &["config", "--unset", key]);
    }
    // The same settings in a submodule: the checkout itself can be used, the submodule can't.
    world.write("author/.gitattributes", "* filter=evil\n");
    world.write("lib-author/.gitattributes", "* filter=evil\n");
    world.new_library_commit("two\n");
    world.git("host/lib", &["config", "filter.evil.smudge", &trap]);
    world.git("host/lib", &["config", "filter.evil.clean", &trap]);
    assert_eq!(world.json(&["status"])["submodules"][0]["state"], "refused");
    world
        .run(&["pull"])
        .exits(4)
        .says(&["submodule lib has settings that would run programs, write files here, or trust any server: filter.evil.smudge"]);
    world.run(&["submodules", "reset", "--yes"]).exits(4);
    world.nothing_ran();
}

#[test] // [POOLCTL-041]
fn a_repository_decides_nothing_about_certificates_and_a_detour_is_told() {
    let world = World::with_submodule();
    for key in ["http.sslVerify", "http.https://example.com/.sslVerify"] {
        world.git("host", &["config", key, "false"]);
        world.run(&["pull"]).exits(4).says(&[
            "trust any server",
            "sslverify",
            "git config --global",
        ]);
        world.git("host", &["config", key, "true"]);
    }
    // A proxy sees only what any network sees, so it is used, and shown without its password.
    let proxy = "http://user:secret@proxy.example:3128";
    world.git("host", &["config", "http.proxy", proxy]);
    for args in [
        &["status", "--fetch"][..],
        &["pull"],
        &["sync", "--yes"],
        &["submodules", "update"],
    ] {
        let ran = world.run(args).exits(0);
        assert!(
            ran.err.contains("http.proxy") && ran.err.contains("proxy.example:3128"),
            "{args:?}: {}",
            ran.err
        );
        assert!(!ran.err.contains("secret"), "{}", ran.err);
    }
    world.git("host", &["config", "--unset", "http.proxy"]);
    assert!(!world.run(&["pull"]).exits(0).err.contains("proxy"));
}

/// git prefers a repository's `core.sshCommand` to the variable `GIT_SSH`.
#[test] // [POOLCTL-041]
fn the_ssh_of_the_user_goes_over_that_of_the_repository() {
    let world = World::new();
    let trap = world.trap("trap");
    world.git("host", &["config", "core.sshCommand", &trap]);
    world.git(
        "host",
        &["remote", "set-url", "origin", "ssh://example.invalid/a.git"],
    );
    let ours = world.path("the user's ssh");
    let used = world.path("used");
    let text = format!("#!/bin/sh\ntouch '{}'\nexit 255\n", used.display());
    write_program(&ours, text);
    let output = world.pool(&["pull"]).env("GIT_SSH", &ours).output();
    Ran::from(output.unwrap()).exits(5);
    world.nothing_ran();
    assert!(used.exists());
}

#[test] // [POOLCTL-041]
fn a_hostile_gitmodules_gets_nowhere() {
    let mark = |world: &World| format!("ext::sh -c touch% {}", world.path("marked").display());
    type Entry = (
        &'static str,
        &'static str,
        fn(&World) -> String,
        &'static str,
    );
    let cases: [Entry; 8] = [
        (
            "lib",
            "lib",
            |world| format!("ext::sh -c touch% {}", world.path("marked").display()),
            "remote helper",
        ),
        (
            "--upload-pack=touch",
            "lib",
            |_| "../lib.git".into(),
            "name that looks like an option",
        ),
        (
            "-c",
            "lib",
            |_| "../lib.git".into(),
            "name that looks like an option",
        ),
        (
            "../../x",
            "lib",
            |_| "../lib.git".into(),
            "leads out of its folder",
        ),
        (
            "lib",
            "lib",
            |_| "--upload-pack=touch".into(),
            "looks like an option",
        ),
        (
            "lib",
            "lib",
            |_| "ssh://-oProxyCommand=touch/x".into(),
            "host looks like an option",
        ),
        (
            "lib",
            "lib",
            |_| "ftp://example.com/x".into(),
            "an unsupported protocol",
        ),
        (
            "lib",
            "lib",
            |_| "https://example.com/\u{1b}[2Jx".into(),
            "control characters",
        ),
    ];
    for (name, path, url, reason) in cases {
        let world = World::new();
        world.library("lib");
        let commit = world.head("lib-author");
        let text = format!(
            "[submodule \"{name}\"]\n\tpath = {path}\n\turl = \"{}\"\n",
            url(&world)
        );
        world.write("author/.gitmodules", &text);
        world.git(
            "author",
            &[
                "update-index",
                "--add",
                "--cacheinfo",
                &format!("160000,{commit},{path}"),
            ],
        );
        world.git("author", &["add", ".gitmodules"]);
        world.git("author", &["commit", "-q", "-m", "hostile"]);
        world.git("author", &["push", "-q"]);
        // The rest of the pull succeeds, and the submodule is refused with its reason.
        world
            .run(&["pull"])
            .exits(4)
            .says(&["submodule lib", reason]);
        assert_eq!(world.head("host"), world.head("author"));
        world
            .run(&["submodules", "update"])
            .exits(4)
            .says(&[reason]);
        world
            .run(&["submodules", "reset", "--yes"])
            .exits(4)
            .says(&[reason]);
        world.run(&["sync", "--yes"]).exits(4).says(&[reason]);
        let list = world.run(&["submodules", "list"]).exits(0);
        assert!(
            list.out.contains(reason) && !list.out.contains('\u{1b}'),
            "{}",
            list.out
        );
        assert_eq!(
            world.json(&["status"])["submodules"][0]["state"],
            "refused",
            "{name}"
        );
        world.nothing_ran();
    }
    // The address in the checkout's own settings and the address of the remote are checked too.
    let world = World::with_submodule();
    world.git("host", &["config", "submodule.lib.url", &mark(&world)]);
    world
        .run(&["submodules", "update"])
        .exits(4)
        .says(&["remote helper"]);
    world.git("host", &["config", "remote.origin.url", &mark(&world)]);
    world.git("host", &["config", "protocol.ext.allow", "always"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["remote `origin`", "remote helper"]);
    world.nothing_ran();
}

#[test] // [POOLCTL-041]
fn paths_that_lead_out_are_refused() {
    let world = World::with_submodule();
    // A link in place of a folder of the path: git can't record one, but a user can create one.
    fs::create_dir(world.path("outside")).unwrap();
    fs::remove_dir_all(world.path("host/lib")).unwrap();
    std::os::unix::fs::symlink(world.path("outside"), world.path("host/lib")).unwrap();
    world
        .run(&["submodules", "update"])
        .exits(4)
        .says(&["through a symbolic link"]);
    assert_eq!(fs::read_dir(world.path("outside")).unwrap().count(), 0);
    // A repository that claims to have its files elsewhere.
    world.write("outside/precious", "x");
    world.git(
        "host",
        &[
            "config",
            "core.worktree",
            world.path("outside").to_str().unwrap(),
        ],
    );
    world
        .run(&["sync", "--yes", "--clean"])
        .exits(4)
        .says(&["says that its files are in", "core.worktree"]);
    assert_eq!(world.read("outside/precious"), "x");
    // The files are claimed to be in a folder above, where git finds no repository.
    let above = world.path("").display().to_string();
    world.git("host", &["config", "core.worktree", &above]);
    world
        .run(&["status"])
        .exits(4)
        .says(&["says that its files are in", "core.worktree"]);
    // git refuses to record the path `../x`, and a `.gitmodules` that is a link is refused here.
    let world = World::with_submodule();
    fs::rename(world.path("host/.gitmodules"), world.path("modules")).unwrap();
    std::os::unix::fs::symlink(world.path("modules"), world.path("host/.gitmodules")).unwrap();
    world
        .run(&["submodules", "list"])
        .exits(4)
        .says(&["not a plain file"]);
}

#[test] // [POOLCTL-041]
fn variables_do_not_point_git_elsewhere() {
    let world = World::new();
    world.git("", &["init", "-q", "other"]);
    let trap = world.trap("trap");
    let mut command = world.pool(&["status", "--fetch", "--format", "json"]);
    command
        .env("GIT_DIR", world.path("other/.git"))
        .env("GIT_WORK_TREE", world.path("other"))
        .env("GIT_INDEX_FILE", world.path("other/x"))
        .env("GIT_EXTERNAL_DIFF", &trap)
        .env("GIT_PROXY_COMMAND", &trap)
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "core.fsmonitor")
        .env("GIT_CONFIG_VALUE_0", &trap);
    let ran: Ran = command.output().unwrap().into();
    let status: Value = serde_json::from_str(&ran.exits(0).out).unwrap();
    let root = world.path("host").canonicalize().unwrap();
    assert_eq!(Path::new(status["path"].as_str().unwrap()), root);
    assert_eq!(status["upstream"], "origin/main");
    world.nothing_ran();
}
