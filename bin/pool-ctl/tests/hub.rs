//! Downloads with the real `hf` from a server on this host that implements the hub's protocol: complete, interrupted in every
//! way, refused, wrong, short of disk. `LLORCH_TEST_HF` names the program `hf`; scripts/test prepares it.

// clippy exempts only functions marked as tests, but the helpers below are test code too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../orchestratord/tests/daemon/small_disk.rs"]
mod small_disk;
mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::http::{Method, StatusCode};
use pool_core::kit::process::{ProcessIdentity, Signal};
use serde_json::Value;

use small_disk::Disk;
use support::hub::Hub;
use support::{GgufDraft, Home, PATIENCE, Ran, Running, facts, first_err_line, sha256, until};

/// Size of the model file in bytes. `hf` writes 10 MB at a time, so the file takes several writes.
const MODEL_BYTES: usize = 44_000_000;
const HUB: &str = "kind = \"hf\"\nrepo = \"org/repo\"\nrevision = \"v1\"\nfile = \"sub/tiny.gguf\"";

/// Returns a GGUF file that a worker could run, with a tensor of noise at its end.
fn model() -> Vec<u8> {
    let mut draft = GgufDraft::servable();
    let elements = (MODEL_BYTES / 4) as u64;
    draft.tensors.push(("noise".to_owned(), vec![elements], 0));
    let mut bytes = draft.bytes();
    bytes.truncate(bytes.len() - MODEL_BYTES);
    let mut state = 7u64;
    for _ in 0..MODEL_BYTES / 8 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.extend((state >> 3).to_le_bytes());
    }
    bytes
}

/// A home, a stand-in for the hub, the real `hf`, and a watcher of the final name.
struct Stage {
    home: Home,
    hub: Hub,
    bytes: Vec<u8>,
    models: PathBuf,
    watcher: Option<Watcher>,
}

impl Stage {
    fn new() -> Self {
        let stage = Self::without_a_watcher(None);
        stage.home.catalogue(&facts(&stage.bytes), &[HUB]);
        stage.watched()
    }

    fn without_a_watcher(models: Option<&Path>) -> Self {
        let home = Home::new();
        let hf = std::env::var_os("LLORCH_TEST_HF")
            .expect("LLORCH_TEST_HF must name the program `hf`: scripts/test prepares it");
        symlink(hf, home.path("bin/hf")).unwrap();
        let bytes = model();
        let models = models.map_or_else(|| home.path("home/models"), Path::to_path_buf);
        Self {
            hub: Hub::serving(bytes.clone()),
            bytes,
            models,
            home,
            watcher: None,
        }
    }

    /// Fails the test if the final name ever belongs to anything but the complete file.
    fn watched(mut self) -> Self {
        self.watcher = Some(Watcher::new(self.file(), sha256(&self.bytes)));
        self
    }

    fn file(&self) -> PathBuf {
        self.models.join("m/tiny.gguf")
    }

    fn part(&self) -> PathBuf {
        self.models.join(".partial/m/part")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.home.command(args);
        command
            .env("HF_ENDPOINT", self.hub.url())
            .env("HF_HOME", self.home.path("hf"))
            .env("NO_PROXY", "127.0.0.1,localhost")
            .env("LLORCH_MODELS_DIR", &self.models)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    fn download(&self) -> Ran {
        self.run(&["models", "download", "m"])
    }

    fn start(&self) -> Running {
        Running::start(&mut self.command(&["models", "download", "m"]))
    }

    /// Waits until at least `bytes` of the file are kept, and returns their number.
    fn until_kept(&self, bytes: u64) -> u64 {
        until("the beginning of the file is kept", || {
            let kept = fs::metadata(self.part()).ok()?.len();
            (kept >= bytes).then_some(kept)
        })
    }

    /// Returns the `hf` process that a download runs.
    fn hf(&self) -> ProcessIdentity {
        until("hf is noted", || {
            serde_json::from_slice(&fs::read(self.models.join(".partial/m/program.json")).ok()?)
                .ok()
        })
    }

    #[track_caller]
    fn is_whole(&self) {
        assert_eq!(sha256(&fs::read(self.file()).unwrap()), sha256(&self.bytes));
        assert!(!self.models.join(".partial/m").exists(), "nothing is left");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.end();
        }
    }
}

/// A thread that checks the final name continuously.
struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<String>>,
}

impl Watcher {
    fn new(file: PathBuf, right: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = None;
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(2));
                let Ok(now) = fs::metadata(&file) else {
                    continue;
                };
                let now = (now.ino(), now.len(), now.mtime_nsec());
                if seen != Some(now) {
                    let Ok(bytes) = fs::read(&file) else {
                        continue;
                    };
                    if sha256(&bytes) != right {
                        return Some(format!("{} bytes had the final name", bytes.len()));
                    }
                    seen = Some(now);
                }
            }
            None
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let wrong = self.thread.join().unwrap();
        if !std::thread::panicking() {
            assert_eq!(wrong, None);
        }
    }
}

#[test] // [POOLCTL-010] [POOLCTL-018]
fn a_fresh_download_comes_from_the_pinned_revision() {
    let stage = Stage::new();
    let ran = stage.download().exits(0);
    assert!(
        ran.out.contains("SHA-256 as in the catalogue"),
        "{}",
        ran.out
    );
    stage.is_whole();
    assert_eq!(stage.hub.take_served(), stage.bytes.len() as u64);
    let asked = stage.hub.take_asked();
    assert!(
        asked
            .iter()
            .all(|asked| asked.path == "/org/repo/resolve/v1/sub/tiny.gguf"),
        "{asked:?}"
    );
    assert!(asked.iter().any(|asked| asked.method == Method::GET));
    let ran = stage.download().exits(0);
    assert!(ran.out.starts_with("m is already at"), "{}", ran.out);
    assert_eq!(stage.hub.take_asked(), []);
}

#[test] // [POOLCTL-017]
fn a_download_killed_three_times_goes_on_where_it_stopped() {
    let stage = Stage::new();
    let size = stage.bytes.len() as u64;
    let mut kept = 0;
    for (round, stop) in [13_000_000, 25_000_000, 38_000_000].into_iter().enumerate() {
        stage.hub.behaviour().stall_at = Some(stop);
        let running = stage.start();
        // In the first round `hf` fetches, in pieces of 10 MB; in later rounds this program does.
        let most = [10_000_000, 25_000_000, 38_000_000][round];
        kept = stage.until_kept(most);
        let hf = (round == 0).then(|| stage.hf());
        running.kill();
        if let Some(hf) = hf {
            hf.signal(Signal::KILL).unwrap();
            assert!(hf.wait_gone(PATIENCE).unwrap());
        }
        assert!(!stage.file().exists());
    }
    stage.hub.behaviour().stall_at = None;
    stage.hub.take_served();
    stage.hub.take_asked();
    let ran = stage.download().exits(0);
    stage.is_whole();
    assert!(ran.err.contains("continuing m at 36.2 MiB"), "{}", ran.err);
    assert_eq!(stage.hub.take_served(), size - kept, "the rest alone came");
    let ranges: Vec<_> = stage
        .hub
        .take_asked()
        .into_iter()
        .filter_map(|asked| asked.range)
        .collect();
    assert_eq!(ranges, [format!("bytes={kept}-")]);
    stage.run(&["models", "verify", "m"]).exits(0);
}

#[test] // [POOLCTL-017] [STORE-009]
fn an_hf_that_outlives_its_killed_download_is_ended() {
    let stage = Stage::new();
    stage.hub.behaviour().stall_at = Some(13_000_000);
    let running = stage.start();
    let kept = stage.until_kept(10_000_000);
    let hf = stage.hf();
    running.kill();
    assert!(hf.is_alive());
    stage.hub.behaviour().stall_at = None;
    stage.hub.take_served();
    stage.download().exits(0);
    stage.is_whole();
    assert!(!hf.is_alive());
    // The orphan may have received a little more before it was ended.
    let rest = stage.bytes.len() as u64 - kept;
    assert!(stage.hub.take_served() <= rest + 12_000_000);
}

#[test] // [POOLCTL-014]
fn ctrl_c_keeps_what_came_and_the_next_run_goes_on() {
    let stage = Stage::new();
    stage.hub.behaviour().stall_at = Some(13_000_000);
    let running = stage.start();
    let kept = stage.until_kept(10_000_000);
    let hf = stage.hf();
    running.signal(Signal::INT);
    let ran = running.ended().exits(130);
    assert!(ran.err.contains("already received are kept"), "{}", ran.err);
    assert!(
        ran.err
            .contains("`llorch-pool models download m` continues from there"),
        "{}",
        ran.err
    );
    assert!(!hf.is_alive());
    // A second interruption, while the rest is fetched.
    stage.hub.behaviour().stall_at = Some(30_000_000);
    let running = stage.start();
    stage.until_kept(30_000_000);
    running.signal(Signal::TERM);
    running.ended().exits(130);
    stage.hub.behaviour().stall_at = None;
    stage.hub.take_served();
    stage.download().exits(0);
    stage.is_whole();
    assert!(stage.hub.take_served() < stage.bytes.len() as u64 - kept);
}

/// Interrupts a download that leaves at least 10 MB behind. Returns the number of bytes kept.
fn break_off(stage: &Stage) -> u64 {
    stage.hub.behaviour().stall_at = Some(13_000_000);
    let running = stage.start();
    let kept = stage.until_kept(10_000_000);
    running.signal(Signal::INT);
    running.ended().exits(130);
    stage.hub.behaviour().stall_at = None;
    stage.hub.take_served();
    stage.hub.take_asked();
    kept
}

#[test] // [POOLCTL-017]
fn what_can_not_be_continued_is_begun_again_and_said() {
    let size = |stage: &Stage| stage.bytes.len() as u64;

    let stage = Stage::new();
    break_off(&stage);
    stage.hub.behaviour().ranges = false;
    let ran = stage.download().exits(0);
    assert!(
        ran.err
            .contains("can't be continued (the hub only sends whole files): starting over"),
        "{}",
        ran.err
    );
    stage.is_whole();
    assert!(stage.hub.take_served() >= size(&stage));

    let stage = Stage::new();
    break_off(&stage);
    stage.hub.behaviour().etag = "0".repeat(64);
    let ran = stage.download().exits(0);
    assert!(
        ran.err
            .contains("(the hub has another file there now): starting over"),
        "{}",
        ran.err
    );
    stage.is_whole();

    // A part spoilt on disk, or by a server that mixes up versions: the hash of the whole file decides.
    let stage = Stage::new();
    break_off(&stage);
    let mut part = fs::read(stage.part()).unwrap();
    part[5_000_000] ^= 1;
    fs::write(stage.part(), part).unwrap();
    let ran = stage.download().exits(0);
    assert!(
        ran.err
            .contains("the assembled file is wrong: its SHA-256 is"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("starting over"), "{}", ran.err);
    stage.is_whole();
}

#[test] // [POOLCTL-017] [POOLCTL-018]
fn a_connection_that_breaks_is_taken_up_again_and_the_token_stays_at_the_hub() {
    let stage = Stage::new();
    stage.hub.behaviour().elsewhere = true;
    stage.hub.behaviour().token = Some("hf_open");
    let refused = stage.download().exits(5);
    assert!(
        refused.err.contains("the hub answered 401"),
        "{}",
        refused.err
    );
    assert!(refused.err.contains("set `HF_TOKEN`"), "{}", refused.err);

    stage.hub.behaviour().stall_at = Some(13_000_000);
    let mut command = stage.command(&["models", "download", "m"]);
    let running = Running::start(command.env("HF_TOKEN", "hf_open"));
    stage.until_kept(10_000_000);
    running.signal(Signal::INT);
    running.ended().exits(130);
    {
        let mut behaviour = stage.hub.behaviour();
        behaviour.stall_at = Some(20_000_000);
        behaviour.cut = true;
    }
    let mut command = stage.command(&["models", "download", "m"]);
    let running = Running::start(command.env("HF_TOKEN", "hf_open"));
    // The second request for a part shows that the connection broke.
    until("the rest is asked for again", || {
        let asked = stage.hub.asked();
        let parts = asked.iter().filter(|asked| asked.range.is_some());
        (parts.count() >= 2).then_some(())
    });
    stage.hub.behaviour().stall_at = None;
    let ran = running.ended().exits(0);
    stage.is_whole();
    assert!(ran.err.contains("trying again"), "{}", ran.err);
    for asked in stage.hub.take_asked() {
        let elsewhere = asked.path.starts_with("/elsewhere/");
        assert!(
            !(elsewhere && asked.authorization.is_some()),
            "the token went to another host: {asked:?}"
        );
    }
}

#[test] // [POOLCTL-012] [POOLCTL-017]
fn wrong_bytes_are_never_placed_and_never_kept() {
    let stage = Stage::new();
    let mut wrong = stage.bytes.clone();
    wrong[40_000_000] ^= 1;
    stage.hub.behaviour().content = wrong.clone().into();
    let ran = stage.download().exits(1);
    assert!(
        ran.err.contains(&format!(
            "its SHA-256 is {}, expected {} (the catalogue's)",
            sha256(&wrong),
            sha256(&stage.bytes)
        )),
        "{}",
        ran.err
    );
    assert!(!stage.models.join(".partial/m").exists() && !stage.file().exists());

    // Without a hash in the catalogue, the hash that the hub announces counts.
    stage.home.catalogue("", &[HUB]);
    let ran = stage.download().exits(1);
    assert!(ran.err.contains("(the hub's)"), "{}", ran.err);
    assert!(!stage.file().exists());
}

#[test] // [POOLCTL-018]
fn refusals_of_the_hub_have_their_own_hints() {
    let stage = Stage::new();
    for (status, code, exit, hint) in [
        (
            StatusCode::NOT_FOUND,
            "EntryNotFound",
            3,
            "no such repository, revision or file",
        ),
        (
            StatusCode::FORBIDDEN,
            "GatedRepo",
            5,
            "accept the model's terms",
        ),
    ] {
        stage.hub.behaviour().refuses = Some((status, code));
        let ran = stage.download().exits(exit);
        assert!(
            ran.err.contains(code) && ran.err.contains(hint),
            "{}",
            ran.err
        );
        assert!(!stage.models.join(".partial/m").exists());
    }
    stage.hub.behaviour().refuses = None;
    break_off(&stage);
    stage.hub.behaviour().refuses = Some((StatusCode::NOT_FOUND, "RepoNotFound"));
    stage.download().exits(3);
    assert!(stage.part().exists(), "what came stays");
}

#[test] // [POOLCTL-015]
fn of_two_at_once_one_fetches() {
    let stage = Stage::new();
    stage.hub.behaviour().stall_at = Some(13_000_000);
    let first = stage.start();
    stage.until_kept(10_000_000);
    let mut second = stage.start();
    assert_eq!(
        first_err_line(second.child()),
        "waiting for another download of m\n"
    );
    stage.hub.behaviour().stall_at = None;
    assert!(first.ended().exits(0).out.starts_with("m is at"));
    let ran = second.ended().exits(0);
    assert!(ran.out.starts_with("m is already at"), "{}", ran.out);
    stage.is_whole();
    assert_eq!(stage.hub.take_served(), stage.bytes.len() as u64);
}

#[test] // [POOLCTL-016] [STORE-005]
fn a_full_disk_is_named_with_its_numbers() {
    let place = tempfile::tempdir().unwrap();
    let disk = match Disk::new(place.path().join("disk"), 125_000_000) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: no disk of its own can be made here: {reason}");
            return;
        }
    };
    let stage = Stage::without_a_watcher(Some(&disk.0));
    // Only the hub tells the size.
    stage.home.catalogue("", &[HUB]);
    let stage = stage.watched();
    let filler = disk.0.join("filler");
    fs::write(&filler, vec![1; 60_000_000]).unwrap();
    let ran = stage.download().exits(4);
    assert!(
        ran.err
            .contains("the download needs 106 MiB, but the disk of ")
            && ran.err.contains("62 MiB free"),
        "{}",
        ran.err
    );
    assert_eq!(stage.hub.take_served(), 0);

    // There is enough space at first, until another program fills the disk.
    fs::remove_file(&filler).unwrap();
    stage.hub.behaviour().stall_at = Some(25_000_000);
    let running = stage.start();
    stage.until_kept(20_000_000);
    fs::write(&filler, vec![1; 95_000_000]).unwrap();
    stage.hub.behaviour().stall_at = None;
    let ran = running.ended().exits(4);
    assert!(!stage.file().exists(), "{}", ran.err);
    // With space again, the download continues.
    fs::remove_file(&filler).unwrap();
    stage.hub.take_served();
    stage.download().exits(0);
    stage.is_whole();
    assert!(stage.hub.take_served() < 30_000_000);
}

#[test] // [POOLCTL-019]
fn a_reference_to_the_hub_works_without_an_entry() {
    let stage = Stage::without_a_watcher(None);
    let ran = stage.run(&["models", "download", "hf:org/repo"]).exits(0);
    let name = "hf:org/repo::file=sub/tiny.gguf";
    assert!(ran.out.starts_with(&format!("{name} is at")), "{}", ran.out);
    let list = stage
        .run(&["models", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&list[0]["model_ref"], &list[0]["hash_state"]),
        (&name.into(), &"recorded".into())
    );
    let info = stage
        .run(&["models", "info", "hf:org/repo", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(info["sha256"], sha256(&stage.bytes));
    stage.run(&["models", "verify", name]).exits(0);
    stage.run(&["models", "delete", name, "--yes"]).exits(0);
    stage.run(&["models", "info", "hf:org/repo"]).exits(3);

    stage.hub.behaviour().files = vec!["a.gguf", "b.gguf"];
    let ran = stage.run(&["models", "download", "hf:org/repo"]).exits(2);
    assert!(
        ran.err.contains("2 GGUF files: a.gguf, b.gguf"),
        "{}",
        ran.err
    );
}

#[test] // [POOLCTL-060]
fn a_split_model_is_refused_before_a_byte_of_it_comes() {
    let stage = Stage::without_a_watcher(None);
    stage.hub.behaviour().files = vec!["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
    for model in ["hf:org/repo", "hf:org/repo::file=q/m-00002-of-00002.gguf"] {
        stage
            .run(&["models", "download", model])
            .exits(4)
            .says(&["is split into 2 files", "llama-gguf-split --merge"]);
    }
    assert_eq!(stage.hub.take_served(), 0);
    // A complete file may be listed next to the parts of a split model.
    stage.hub.behaviour().files.push("small.gguf");
    stage.run(&["models", "download", "hf:org/repo"]).exits(0);
}

#[test] // [POOLCTL-060]
fn a_file_that_no_worker_runs_is_not_kept() {
    let stage = Stage::without_a_watcher(None);
    let other = GgufDraft::servable().of_architecture("mamba").bytes();
    stage.hub.behaviour().etag = sha256(&other);
    stage.hub.behaviour().content = other.into();
    stage
        .run(&["models", "download", "hf:org/repo"])
        .exits(4)
        .says(&["architecture `mamba` is not supported"]);
    let args = ["models", "download", "hf:org/repo", "--progress", "json"];
    let ran = stage.run(&args).exits(4);
    let last: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["code"], &last["retriable"]),
        (&"MODEL_UNSUPPORTED".into(), &false.into())
    );
    assert_eq!(stage.home.model_files(), Vec::<String>::new());
}

#[test] // [POOLCTL-019]
fn a_program_reads_lines_of_json() {
    let stage = Stage::new();
    stage.hub.behaviour().pause = Duration::from_millis(5);
    let lines = |ran: &Ran| -> Vec<Value> {
        ran.out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let args = ["models", "download", "m", "--progress", "json"];
    let ran = stage.run(&args).exits(0);
    let events = lines(&ran);
    let (last, before) = events.split_last().unwrap();
    assert_eq!(
        (&last["event"], &last["model_ref"], &last["sha256"]),
        (&"end".into(), &"m".into(), &sha256(&stage.bytes).into())
    );
    assert!(before.iter().all(|event| event["event"] == "progress"));
    for phase in ["downloading", "checking"] {
        let seen = before.iter().find(|event| event["phase"] == phase);
        assert_eq!(seen.unwrap()["total_bytes"], stage.bytes.len());
    }
    assert!(
        before
            .iter()
            .any(|event| event["bytes_per_s"].as_u64().unwrap() > 0)
    );
    stage.hub.behaviour().refuses = Some((StatusCode::NOT_FOUND, "EntryNotFound"));
    let args = ["models", "download", "m", "--force", "--progress", "json"];
    let events = lines(&stage.run(&args).exits(3));
    let last = events.last().unwrap();
    assert_eq!(
        (&last["event"], &last["code"], &last["retriable"]),
        (&"error".into(), &"MODEL_NOT_FOUND".into(), &false.into())
    );
    assert!(stage.file().exists(), "the old one stays");
}
