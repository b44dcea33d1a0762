//! `llorch-pool dev doctor` and `dev setup` as a user runs them, on homes that were broken on purpose.

// clippy exempts only functions marked as tests, but the helpers below are test code too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use support::{Home, link_program};

/// A home, and a folder of programs that replace those of the host. Nothing else is on the PATH.
struct Host {
    base: Home,
}

/// The doctor's finding of one check.
#[derive(Debug)]
struct Found {
    status: String,
    message: String,
    fix: String,
}

impl Host {
    fn new() -> Self {
        let host = Self { base: Home::new() };
        for folder in [
            "home/config",
            "home/state/pool",
            "home/logs",
            "home/models",
            "bin",
            "empty",
        ] {
            fs::create_dir_all(host.path(folder)).unwrap();
        }
        for folder in ["home", "home/config", "home/state/pool", "home/logs"] {
            host.mode(folder, 0o700);
        }
        host.program(
            "git",
            "[ \"$1\" = --version ] && echo git version 2.47.3 && exit\necho 'fatal: not a git repository' >&2; exit 128",
        );
        host.program("rustc", "echo 'rustc 1.95.0 (x 2026-01-01)'");
        host.program("python3", "echo 'pip 24.0 from /x (python 3.13)'");
        host.program("llorch-candled", "");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path(name)
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    fn program(&self, name: &str, text: &str) {
        self.base.program(name, &format!("#!/bin/sh\n{text}\n"));
    }

    fn settings(&self, text: &str) {
        fs::write(self.path("home/config/pool-managerd.toml"), text).unwrap();
    }

    /// Returns the program in a folder of its own, so that it finds no sibling.
    fn command(&self, args: &[&str]) -> Command {
        let program = self.path("bin/llorch-pool");
        if !program.exists() {
            link_program(env!("CARGO_BIN_EXE_llorch-pool").as_ref(), &program);
        }
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("LLORCH_HOME", self.path("home"))
            .env("HOME", self.path("empty"))
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.path("bin").display()),
            )
            .env("LLORCH_POOL_BIND", "127.0.0.1:0")
            .stdin(Stdio::null())
            .current_dir(self.path("empty"));
        command
    }

    /// Returns the doctor's findings, after a check that the exit code fits them.
    fn findings(&self, change: impl FnOnce(&mut Command)) -> BTreeMap<String, Found> {
        let mut command = self.command(&["dev", "doctor", "--format", "json"]);
        change(&mut command);
        let output = command.output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        let list: Vec<Value> = serde_json::from_slice(&output.stdout).expect(&err);
        let mut found = BTreeMap::new();
        for finding in &list {
            let keys: Vec<_> = finding
                .as_object()
                .unwrap()
                .keys()
                .map(String::as_str)
                .collect();
            assert_eq!(keys, ["check", "fix", "message", "status"], "{finding}");
            let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            assert_eq!(
                finding["fix"].is_null(),
                finding["status"] == "ok",
                "{finding}"
            );
            let one = Found {
                status: text("status"),
                message: text("message"),
                fix: text("fix"),
            };
            assert!(
                found.insert(text("check"), one).is_none(),
                "twice: {finding}"
            );
        }
        let failed = found.values().any(|one| one.status == "fail");
        assert_eq!(output.status.code(), Some(i32::from(failed)), "{found:#?}");
        found
    }

    #[track_caller]
    fn finds(&self, check: &str, status: &str, message: &str, fix: &str) {
        let findings = self.findings(|_| {});
        expect(&findings, check, status, message, fix);
    }
}

#[track_caller]
fn expect(findings: &BTreeMap<String, Found>, check: &str, status: &str, message: &str, fix: &str) {
    let found = &findings[check];
    assert!(
        found.status == status && found.message.contains(message) && found.fix.contains(fix),
        "{check}: {found:?}"
    );
}

#[test] // [POOLCTL-031] [POOLCTL-033]
fn a_whole_host_has_nothing_to_mend_and_each_check_its_name() {
    let host = Host::new();
    let findings = host.findings(|_| {});
    let checks: Vec<_> = findings.keys().map(String::as_str).collect();
    assert_eq!(
        checks,
        [
            "catalogue",
            "clock",
            "disk",
            "folders",
            "git",
            "gpu",
            "hf",
            "llorch-candled",
            "permissions of logs",
            "permissions of settings",
            "permissions of state",
            "pip",
            "pool-managerd",
            "port of the pool manager",
            "ports of workers",
            "rustc",
            "settings",
            "token",
        ]
    );
    for check in [
        "catalogue",
        "folders",
        "git",
        "permissions of state",
        "pip",
        "rustc",
        "settings",
        "token",
    ] {
        assert_eq!(
            findings[check].status, "ok",
            "{check}: {:?}",
            findings[check]
        );
    }
    // The doctor changes nothing.
    host.mode("home/logs", 0o755);
    host.findings(|_| {});
    let mode = fs::metadata(host.path("home/logs"))
        .unwrap()
        .permissions()
        .mode()
        & 0o777;
    assert_eq!(mode, 0o755);
    assert!(!host.path("home/state/pool/workers").exists());
}

#[test] // [POOLCTL-033]
fn open_folders_and_files_are_found() {
    let host = Host::new();
    host.mode("home/state/pool", 0o755);
    let chmod = format!("chmod 700 {}", host.path("home/state/pool").display());
    host.finds(
        "permissions of state",
        "warn",
        "is accessible to other users (0755)",
        &chmod,
    );
    host.mode("home/state/pool", 0o700);
    fs::create_dir(host.path("home/state/pool/workers")).unwrap();
    fs::write(host.path("home/state/pool/workers/worker-cpu-1.json"), "{}").unwrap();
    host.mode("home/state/pool/workers/worker-cpu-1.json", 0o644);
    host.finds(
        "permissions of state",
        "warn",
        "worker-cpu-1.json is accessible to other users (0644)",
        "chmod -R go= ",
    );
    host.mode("home/config", 0o777);
    host.finds("permissions of settings", "warn", "(0777)", "chmod 700 ");
}

#[test] // [POOLCTL-033]
fn a_token_that_others_can_read_or_that_is_missing_is_found() {
    let host = Host::new();
    let file = host.path("home/config/pool token");
    fs::write(&file, "0123456789abcdef\n").unwrap();
    host.mode("home/config/pool token", 0o644);
    host.settings(&format!("token_file = \"{}\"\n", file.display()));
    let chmod = format!("chmod 600 '{}'", file.display());
    host.finds("token", "fail", "has mode 0644", &chmod);
    host.mode("home/config/pool token", 0o600);
    host.finds("token", "ok", "fingerprint", "");
    assert!(
        !host.findings(|_| {})["token"]
            .message
            .contains("0123456789abcdef")
    );
    fs::remove_file(&file).unwrap();
    host.finds(
        "token",
        "fail",
        "could not read the token file",
        "umask 077; openssl rand -hex 32 > '",
    );
    // No token is fine, but only on this host.
    host.settings("orchestrator_url = \"none\"\n");
    let findings = host.findings(|command| {
        command.env("LLORCH_POOL_BIND", "0.0.0.0:0");
    });
    expect(
        &findings,
        "token",
        "fail",
        "is not a loopback address",
        "LLORCH_TOKEN_FILE",
    );
}

#[test] // [POOLCTL-033]
fn settings_and_catalogue_are_read() {
    let host = Host::new();
    host.settings("[workers]\nport_mim = 1\n");
    host.finds(
        "settings",
        "fail",
        "pool-managerd.toml:2: unknown setting `workers.port_mim`",
        "did you mean `workers.port_min`?",
    );
    host.settings("heartbeat_interval_ms = 1\n");
    host.finds("settings", "fail", "heartbeat_interval_ms", "edit ");
    host.settings("");
    fs::write(
        host.path("home/config/catalog.toml"),
        "[[models]]\nid = \"m\"\nsice = 1\n",
    )
    .unwrap();
    host.finds("catalogue", "fail", "catalog.toml:3", "edit ");
}

#[test] // [POOLCTL-033]
fn taken_ports_are_found_with_their_holder() {
    let host = Host::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let findings = host.findings(|command| {
        command
            .env("LLORCH_POOL_BIND", format!("127.0.0.1:{port}"))
            .env("LLORCH_WORKERS_PORT_MIN", port.to_string())
            .env("LLORCH_WORKERS_PORT_MAX", port.to_string());
    });
    expect(
        &findings,
        "port of the pool manager",
        "warn",
        &format!("127.0.0.1:{port} is taken by"),
        "LLORCH_POOL_BIND",
    );
    expect(
        &findings,
        "ports of workers",
        "fail",
        "no free port",
        "LLORCH_WORKERS_PORT_MIN",
    );
    if cfg!(target_os = "linux") {
        let holder = format!("(pid {})", std::process::id());
        expect(&findings, "port of the pool manager", "warn", &holder, "");
    }
}

#[test] // [POOLCTL-031] [POOLCTL-033]
fn missing_and_broken_programs_are_found() {
    let host = Host::new();
    fs::remove_file(host.path("bin/llorch-candled")).unwrap();
    host.program("git", "echo git version 2.30.2");
    host.program("rustc", "echo 'rustc 1.63.0 (x 2022-01-01)'");
    host.program("hf", "exit 1");
    host.program("python3", "exit 1");
    let findings = host.findings(|_| {});
    expect(
        &findings,
        "llorch-candled",
        "fail",
        "no worker program",
        "cargo build --release -p llorch-candled",
    );
    expect(
        &findings,
        "pool-managerd",
        "warn",
        "",
        "cargo build --release -p pool-managerd",
    );
    expect(
        &findings,
        "git",
        "warn",
        "older than 2.38.1",
        "apt install git",
    );
    expect(&findings, "rustc", "warn", "needs 1.95", "rustup update");
    expect(&findings, "hf", "warn", "does not start", "dev setup");
    expect(&findings, "pip", "warn", "has no pip", "python3-pip");
    fs::remove_file(host.path("bin/hf")).unwrap();
    host.finds("pip", "fail", "has no pip", "python3-pip");
}

#[test] // [POOLCTL-033]
fn a_checkout_out_of_step_is_found() {
    let host = Host::new();
    fs::remove_file(host.path("bin/git")).unwrap();
    let git = |dir: &str, args: &[&str]| {
        let mut command = Command::new("git");
        command
            .args([
                "-c",
                "user.name=T",
                "-c",
                "user.email=t@example.com",
                "-c",
                "protocol.file.allow=always",
            ])
            .args(args)
            .env("HOME", host.path("empty"))
            .current_dir(host.path(dir));
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    for name in ["lib", "checkout"] {
        git("", &["init", "-q", name]);
        git(name, &["commit", "-q", "--allow-empty", "-m", "first"]);
    }
    git(
        "checkout",
        &["submodule", "--quiet", "add", "../lib", "lib"],
    );
    git("checkout", &["commit", "-q", "-m", "lib"]);
    git("checkout/lib", &["checkout", "-q", "--detach"]);
    host.settings(&format!(
        "repo_path = \"{}\"\n",
        host.path("checkout").display()
    ));
    host.finds("checkout", "ok", "submodules as recorded (1)", "");
    git(
        "checkout/lib",
        &["commit", "-q", "--allow-empty", "-m", "second"],
    );
    host.finds(
        "checkout",
        "warn",
        "submodule lib is out of step",
        "llorch-pool git submodules update",
    );
    host.settings("repo_path = \"/no/such/checkout\"\n");
    host.finds("checkout", "warn", "is not in a git checkout", "repo_path");
}

#[test] // [POOLCTL-032] [POOLCTL-034]
fn setup_does_what_needs_no_root_and_names_the_rest() {
    let host = Host::new();
    fs::remove_dir_all(host.path("home")).unwrap();
    fs::remove_file(host.path("bin/llorch-candled")).unwrap();
    // A Python that creates environments, with a pip that installs an `hf`.
    host.program(
        "python3",
        "case \"$*\" in\n\
         *' pip --version'*) echo 'pip 24.0 from /x' ;;\n\
         *install*) printf '#!/bin/sh\\necho hf 2.4.0\\n' > bin/hf; chmod +x bin/hf ;;\n\
         *venv*) for dir; do :; done; mkdir -p \"$dir/bin\"; printf '#!/bin/sh\\necho Python 3\\n' > \"$dir/bin/python\"; chmod +x \"$dir/bin/python\" ;;\n\
         esac",
    );
    let setup = |args: &[&str]| {
        let output = host
            .command(&[&["dev", "setup"], args].concat())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    };
    let first = setup(&[]);
    assert!(first.contains("hf 2.4.0 is at "), "{first}");
    assert!(
        first.contains("left to do:\n")
            && first.contains("    cargo build --release -p llorch-candled\n"),
        "{first}"
    );
    assert!(!host.path("home/config/pool-managerd.toml").exists());
    let second = setup(&["--config"]);
    assert!(
        second.contains("hf 2.4.0 is already at ")
            && second.contains("settings with their defaults are at"),
        "{second}"
    );
    let third = setup(&["--config"]);
    assert!(third.contains("settings are already at"), "{third}");
    host.finds("settings", "ok", "usable", "");
    host.finds("hf", "ok", "2.4.0", "");
}
