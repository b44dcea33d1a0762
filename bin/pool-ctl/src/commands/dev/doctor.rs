//! `llorch-pool dev doctor`: checks of what this host has and lacks. Changes nothing.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use pool_core::api::gpu::GpuState;
use pool_core::api::pool::PoolReport;
use pool_core::catalog::Catalog;
use pool_core::config::{ConfigError, PoolConfig};
use pool_core::gpu::Gpu;
use pool_core::gpu_sources;
use pool_core::kit::errors::with_causes;
use pool_core::kit::home::Home;
use pool_core::kit::programs::find_on_path;
use pool_core::kit::secret::{Secret, SecretError};
use pool_core::kit::terminal::doctor::host::{self, Room, quoted};
use pool_core::kit::terminal::doctor::{Finding, report};
use pool_core::kit::terminal::{CliError, Exit, Format, daemon};
use pool_core::lifecycle::find_program;
use pool_core::worker::Backend;

use super::{first_line, version_of};
use crate::context::Context;
use crate::git_wrapper::repo::{Repo, State, shown};
use crate::git_wrapper::{Git, GitError};
use crate::hf_wrapper;
use crate::pool::Pool;
use crate::registration;

/// Limits for the disk of the models: below the first no mid-sized model fits, below the second not even the default model with
/// its wheel.
const ROOM: Room = Room {
    warn_bytes: 10_000_000_000,
    fail_bytes: 300_000_000,
};
/// Oldest git that is safe with submodules from others.
const SAFE_GIT: (u32, u32, u32) = (2, 38, 1);
/// Oldest Rust that builds this workspace.
const RUST: &str = env!("CARGO_PKG_RUST_VERSION");

/// Arguments of `llorch-pool dev doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Output format. JSON: an array of findings with `check`, `status` (ok, warn, fail), `message` and `fix` (null if all is
    /// well).
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        report(&examine().await?, self.format)
    }
}

/// Runs all checks.
pub(super) async fn examine() -> Result<Vec<Finding>, CliError> {
    let home = Home::from_env()?;
    let loaded = PoolConfig::load(&home, None);
    let unreachable = loaded.as_ref().ok().map(PoolConfig::check_advertised);
    let unreachable = unreachable.and_then(Result::err);
    let broken = loaded.as_ref().err().or(unreachable.as_ref());
    let mut findings = vec![settings(&home, broken), catalogue(&home)];
    // If the settings can't be used, the other checks use the defaults.
    let config = loaded.unwrap_or_default();
    findings.push(folders(&home, &config));
    for (check, folder) in [
        ("permissions of settings", home.config_dir()),
        ("permissions of state", home.pool_state()),
        ("permissions of logs", home.logs_dir()),
    ] {
        findings.push(permissions(check, &folder));
    }
    findings.push(token(
        &home,
        &config,
        std::env::var("LLORCH_POOL_TOKEN").ok(),
    ));
    let fix = "free some space, or set LLORCH_MODELS_DIR to a folder on a larger disk";
    findings.push(host::disk(&config.models_dir(&home), "models", ROOM, fix));
    findings.push(worker_program(&config));
    findings.push(manager_program());
    let gpu_config = config.gpu.clone();
    let gpus = tokio::task::spawn_blocking(move || gpu_sources::inventory(&gpu_config).settled());
    findings.push(gpu(
        &gpus.await.unwrap_or_default(),
        has_nvidia_card(Path::new("/sys/bus/pci/devices")),
        find_program(Backend::Cuda, config.workers.programs_dir.as_deref()).as_deref(),
    ));
    let python = find_on_path("python3");
    let pip = match &python {
        Some(python) => first_line(python, &["-m", "pip", "--version"]).await,
        None => None,
    };
    let hf = hf_wrapper::find(&home.venv_dir());
    findings.push(pip_finding(python.as_deref(), pip.as_deref(), hf.is_some()));
    findings.push(hf_finding(hf.as_deref(), pip.is_some()).await);
    findings.extend(ports(&home, &config));
    findings.extend(registration_finding().await);
    findings.push(git_finding().await);
    findings.extend(checkout(&config).await);
    findings.push(rust_finding().await);
    findings.push(clock(jiff::Timestamp::now()));
    Ok(findings)
}

fn settings(home: &Home, broken: Option<&ConfigError>) -> Finding {
    let broken = broken.map(|error| (error as &dyn std::error::Error, error.hint()));
    host::settings(&home.config_file("pool-managerd.toml"), broken)
}

fn catalogue(home: &Home) -> Finding {
    let file = home.config_file("catalog.toml");
    match Catalog::load(home) {
        Ok(catalog) => Finding::ok(
            "catalogue",
            format!("{} models in the catalogue", catalog.iter().len()),
        ),
        Err(error) => Finding::fail(
            "catalogue",
            with_causes(&error),
            format!("edit {}: {}", quoted(&file), error.hint()),
        ),
    }
}

/// Checks that each folder is writable, by writing to it: its mode says too little if a disk is mounted read-only or full.
fn folders(home: &Home, config: &PoolConfig) -> Finding {
    let models = config.models_dir(home);
    let dirs = [
        home.config_dir(),
        models.clone(),
        home.logs_dir(),
        home.pool_state(),
    ];
    for dir in &dirs {
        let Err((place, error)) = writable(dir) else {
            continue;
        };
        let fix = match place == *dir {
            _ if !place.is_dir() => format!("mv {0} {0}.old", quoted(&place)),
            true => format!(
                "sudo chown -R \"$USER\" {0} && chmod u+rwx {0}",
                quoted(dir)
            ),
            false => format!(
                "create {} with an owner and mode that let you write to it, or set LLORCH_HOME to a folder you own",
                quoted(dir)
            ),
        };
        return Finding::fail(
            "folders",
            format!("{} is not writable: {error}", place.display()),
            fix,
        );
    }
    Finding::ok(
        "folders",
        format!("{} and the others are writable", models.display()),
    )
}

/// Writes to `dir`, or to the nearest existing folder above it. The error names the folder.
fn writable(dir: &Path) -> Result<(), (PathBuf, io::Error)> {
    let there = dir
        .ancestors()
        .find(|path| path.symlink_metadata().is_ok())
        .unwrap_or(dir);
    tempfile::Builder::new()
        .prefix(".doctor-")
        .tempfile_in(there)
        .map(drop)
        .map_err(|error| (there.to_path_buf(), error))
}

/// Checks that a private folder and its files belong to this user and are closed to others.
fn permissions(check: &'static str, folder: &Path) -> Finding {
    let of_folder = host::private_folder(check, folder);
    if of_folder.fix.is_some() || !folder.exists() {
        return of_folder;
    }
    host::private_files(check, folder)
}

/// Checks the token, without which a pool may listen on this host only.
fn token(home: &Home, config: &PoolConfig, variable: Option<String>) -> Finding {
    let file = config.token_file.as_deref();
    let new = |path: &Path| format!("(umask 077; openssl rand -hex 32 > {})", quoted(path));
    match Secret::load(variable, file) {
        Ok(Some(secret)) => Finding::ok(
            "token",
            format!("usable (fingerprint {})", secret.fingerprint()),
        ),
        Ok(None) if config.bind.ip().is_loopback() => {
            Finding::ok("token", "none; none is needed on a loopback address")
        }
        Ok(None) => {
            let path = home.config_dir().join("pool-token");
            Finding::fail(
                "token",
                format!("none, but {} is not a loopback address", config.bind),
                format!(
                    "{}, then set LLORCH_TOKEN_FILE or `token_file` to it",
                    new(&path)
                ),
            )
        }
        Err(error) => {
            let fix = match (&error, file) {
                (SecretError::Exposed { path, .. }, _) => format!("chmod 600 {}", quoted(path)),
                (_, Some(path)) => new(path),
                (_, None) => "set LLORCH_POOL_TOKEN to a token, or unset it".to_owned(),
            };
            Finding::fail("token", with_causes(&error), fix)
        }
    }
}

fn worker_program(config: &PoolConfig) -> Finding {
    match find_program(Backend::Cpu, config.workers.programs_dir.as_deref()) {
        Some(program) => Finding::ok("llorch-candled", program.display().to_string()),
        None => Finding::fail(
            "llorch-candled",
            "no worker program next to this one or on the PATH",
            "cargo build --release -p llorch-candled",
        ),
    }
}

fn manager_program() -> Finding {
    match daemon::find_sibling("pool-managerd") {
        Ok(program) => Finding::ok("pool-managerd", program.display().to_string()),
        Err(_) => Finding::warn(
            "pool-managerd",
            "not next to this program or on the PATH; workers can be started without it",
            "cargo build --release -p pool-managerd",
        ),
    }
}

/// Returns whether the kernel sees an NVIDIA card, whose driver may be missing.
fn has_nvidia_card(devices: &Path) -> bool {
    let says = |path: PathBuf, words: &str| {
        fs::read_to_string(path).is_ok_and(|text| text.trim().starts_with(words))
    };
    let cards = fs::read_dir(devices).into_iter().flatten().flatten();
    // Class 3: displays and 3D controllers.
    cards
        .map(|card| card.path())
        .any(|card| says(card.join("vendor"), "0x10de") && says(card.join("class"), "0x03"))
}

/// Checks the GPUs that workers could use, and the worker program for them.
fn gpu(gpus: &[Gpu], card: bool, cuda: Option<&Path>) -> Finding {
    if gpus.is_empty() {
        return match card {
            true => Finding::warn(
                "gpu",
                "found an NVIDIA card, but no driver that responds",
                "install the driver, for example with `sudo apt install nvidia-driver`, and reboot",
            ),
            false => Finding::ok("gpu", "none; workers run on the CPU"),
        };
    }
    let names: Vec<_> = gpus
        .iter()
        .map(|gpu| format!("{} {}", gpu.device, gpu.name()))
        .collect();
    let names = names.join(", ");
    if let Some(silent) = gpus.iter().find(|gpu| gpu.state != GpuState::Ok) {
        return Finding::warn(
            "gpu",
            format!("{names}: {} does not respond", silent.device),
            "check the output of `nvidia-smi` and `sudo dmesg`; often only a reboot of the host helps",
        );
    }
    let for_cuda = gpus.iter().any(|gpu| gpu.device.backend == Backend::Cuda);
    match cuda {
        // Nothing to fix: the GPU is listed, and workers run on the CPU.
        None if for_cuda => Finding::ok(
            "gpu",
            format!("{names}; this version has no workers for GPUs"),
        ),
        _ => Finding::ok("gpu", names),
    }
}

fn pip_finding(python: Option<&Path>, pip: Option<&str>, has_hf: bool) -> Finding {
    let fix = "install Python 3 with pip, for example with `apt install python3-pip`";
    let message = match (python, pip) {
        (Some(python), Some(pip)) => {
            return Finding::ok("pip", format!("{pip} ({})", python.display()));
        }
        (Some(_), None) => {
            "python3 has no pip: models on the Python package index can't be downloaded"
        }
        (None, _) => "no python3: models on the Python package index can't be downloaded",
    };
    // One of the two sources of models is enough.
    if has_hf {
        Finding::warn("pip", message, fix)
    } else {
        Finding::fail("pip", message, fix)
    }
}

async fn hf_finding(hf: Option<&Path>, has_pip: bool) -> Finding {
    let fix = if has_pip {
        "llorch-pool dev setup"
    } else {
        "install pip first, then run: llorch-pool dev setup"
    };
    let Some(hf) = hf else {
        return Finding::warn(
            "hf",
            "not installed: models on the hub can't be downloaded",
            fix,
        );
    };
    match version_of(hf).await {
        Some(version) => Finding::ok("hf", format!("{version} ({})", hf.display())),
        None => Finding::warn("hf", format!("{} does not start", hf.display()), fix),
    }
}

/// Returns the finding about the pool's registration, if its daemon runs and answers.
async fn registration_finding() -> Option<Finding> {
    let context = Context::load(None).ok()?;
    daemon::status(&context.home.pool_state())?;
    let Ok(Pool::Daemon(client)) = Pool::of_this_home(&context).await else {
        return None;
    };
    let report: PoolReport = client.get("/status").await.ok()?;
    Some(registration::finding(&report.registration?))
}

/// Checks the port of the pool manager, and finds the first free one for a worker.
fn ports(home: &Home, config: &PoolConfig) -> [Finding; 2] {
    let bind = config.bind;
    let manager = match daemon::status(&home.pool_state()) {
        Some(running) => Finding::ok(
            "port of the pool manager",
            format!("running at {} (pid {})", running.url, running.process.pid),
        ),
        None => match host::port_free(bind) {
            Ok(()) => Finding::ok("port of the pool manager", format!("{bind} is free")),
            Err(reason) => Finding::warn(
                "port of the pool manager",
                reason,
                "set LLORCH_POOL_BIND to another address, such as 127.0.0.1:0 for any free port",
            ),
        },
    };
    let (first, last) = (config.workers.port_min, config.workers.port_max);
    let at = |port| SocketAddr::from((config.workers.bind, port));
    let workers = match (first..=last).find(|port| TcpListener::bind(at(*port)).is_ok()) {
        Some(port) => Finding::ok(
            "ports of workers",
            format!("{port} is the first free port of {first} to {last}"),
        ),
        None => {
            let why = host::port_free(at(first)).err().unwrap_or_default();
            Finding::fail(
                "ports of workers",
                format!("no free port in {first} to {last}: {why}"),
                "set LLORCH_WORKERS_PORT_MIN and LLORCH_WORKERS_PORT_MAX to another range",
            )
        }
    };
    [manager, workers]
}

async fn git_finding() -> Finding {
    let fix = "install git, for example with `sudo apt install git`";
    let Some(git) = find_on_path("git") else {
        return Finding::warn("git", "not installed; needed to update a checkout", fix);
    };
    match first_line(&git, &["--version"]).await {
        None => Finding::warn("git", format!("{} does not start", git.display()), fix),
        Some(line) if version_in(&line).is_some_and(|version| version < SAFE_GIT) => Finding::warn(
            "git",
            format!("{line} is older than 2.38.1, which fixed vulnerabilities in submodules"),
            "update git, for example with `sudo apt install git`",
        ),
        Some(line) => Finding::ok("git", line),
    }
}

/// Returns the first version in a program's output.
fn version_in(line: &str) -> Option<(u32, u32, u32)> {
    let word = line
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut parts = word
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().ok());
    let major = parts.next()??;
    let mut next = || parts.next().flatten().unwrap_or(0);
    Some((major, next(), next()))
}

/// Checks the checkout at hand, if there is one, and its submodules.
async fn checkout(config: &PoolConfig) -> Option<Finding> {
    let git = Git::find().ok()?;
    let at = match &config.repo_path {
        Some(path) => path.clone(),
        None => std::env::current_dir().ok()?,
    };
    let found = match Repo::open(&git, &at).await {
        Ok(repo) => submodules(&repo).await,
        // Without a checkout there is nothing to report, unless the settings name one.
        Err(GitError::NotACheckout { .. }) if config.repo_path.is_none() => return None,
        Err(error) => Err(error),
    };
    Some(found.unwrap_or_else(|error| {
        let error = error.told("");
        let fix = error
            .hint
            .unwrap_or_else(|| "llorch-pool git status".to_owned());
        Finding::warn("checkout", error.message, fix)
    }))
}

async fn submodules(repo: &Repo) -> Result<Finding, GitError> {
    let all = repo.submodules().await?;
    let place = repo.root().display();
    for one in &all {
        let found = repo.inspect(one).await?;
        let path = shown(&one.path);
        let fix = match found.state {
            State::InStep | State::OnBranch => continue,
            State::Missing | State::OutOfStep => "llorch-pool git submodules update",
            State::Modified | State::Refused => "llorch-pool git submodules status",
        };
        return Ok(Finding::warn(
            "checkout",
            format!(
                "{place}: submodule {path} is {}",
                found.state.as_str().replace('_', " ")
            ),
            fix,
        ));
    }
    let message = match all.len() {
        0 => format!("{place}, without submodules"),
        count => format!("{place}, submodules as recorded ({count})"),
    };
    Ok(Finding::ok("checkout", message))
}

async fn rust_finding() -> Finding {
    let rustc = find_on_path("rustc");
    let line = match &rustc {
        Some(rustc) => first_line(rustc, &["--version"]).await,
        None => None,
    };
    rust(line.as_deref(), rustc.is_some())
}

/// Checks the Rust compiler, which only builds need. With rustup an older one is no obstacle, because a checkout names its own.
fn rust(line: Option<&str>, installed: bool) -> Finding {
    let needed = version_in(RUST).unwrap_or_default();
    match line {
        Some(line) if version_in(line).is_some_and(|version| version >= needed) => {
            Finding::ok("rustc", line)
        }
        Some(line) => Finding::warn(
            "rustc",
            format!("{line}; building from source needs {RUST}"),
            "rustup update",
        ),
        None if installed => Finding::warn(
            "rustc",
            "does not start; needed to build from source",
            "rustup default stable",
        ),
        None => Finding::warn(
            "rustc",
            "not installed; needed to build from source",
            "install Rust with rustup (https://rustup.rs)",
        ),
    }
}

/// Checks the clock: with a date before this program was written, every certificate is invalid.
fn clock(now: jiff::Timestamp) -> Finding {
    // 2025-01-01.
    const EARLIEST: i64 = 1_735_689_600;
    if now.as_second() >= EARLIEST {
        return Finding::ok("clock", now.strftime("%Y-%m-%d %H:%M UTC").to_string());
    }
    Finding::warn(
        "clock",
        format!(
            "the clock says {}: downloads will fail",
            now.strftime("%Y-%m-%d")
        ),
        "sudo timedatectl set-ntp true",
    )
}

#[cfg(test)]
mod tests {
    use pool_core::kit::terminal::doctor::CheckStatus;

    use super::*;

    #[test] // [POOLCTL-031]
    fn one_way_to_models_is_enough() {
        let python = Path::new("/usr/bin/python3");
        assert_eq!(
            pip_finding(Some(python), Some("pip 24.0"), false).status,
            CheckStatus::Ok
        );
        assert_eq!(
            pip_finding(Some(python), None, true).status,
            CheckStatus::Warn
        );
        assert_eq!(
            pip_finding(Some(python), None, false).status,
            CheckStatus::Fail
        );
        assert_eq!(pip_finding(None, None, false).status, CheckStatus::Fail);
    }

    #[test] // [POOLCTL-033]
    fn versions_are_compared_by_number() {
        assert_eq!(version_in("git version 2.47.3"), Some((2, 47, 3)));
        assert_eq!(
            version_in("git version 2.39.3 (Apple Git-146)"),
            Some((2, 39, 3))
        );
        assert_eq!(
            version_in("rustc 1.95.0 (59807616e 2026-04-14)"),
            Some((1, 95, 0))
        );
        assert_eq!(version_in("rustc 1.98.0-nightly"), Some((1, 98, 0)));
        assert_eq!(version_in("no version"), None);
        assert_eq!(rust(Some("rustc 1.100.0"), true).status, CheckStatus::Ok);
        let old = rust(Some("rustc 1.63.0"), true);
        assert_eq!(
            (old.status, old.fix.as_deref()),
            (CheckStatus::Warn, Some("rustup update"))
        );
        assert_eq!(rust(None, false).status, CheckStatus::Warn);
    }

    #[test] // [POOLCTL-033]
    fn a_card_without_a_driver_is_told_and_no_card_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let card = dir.path().join("0000:01:00.0");
        fs::create_dir(&card).unwrap();
        fs::write(card.join("vendor"), "0x10de\n").unwrap();
        fs::write(card.join("class"), "0x040300\n").unwrap();
        // A sound device is not a GPU.
        assert!(!has_nvidia_card(dir.path()));
        fs::write(card.join("class"), "0x030000\n").unwrap();
        assert!(has_nvidia_card(dir.path()));
        assert_eq!(gpu(&[], false, None).status, CheckStatus::Ok);
        let found = gpu(&[], true, None);
        assert_eq!(found.status, CheckStatus::Warn);
        assert!(found.fix.unwrap().contains("nvidia-driver"));
    }

    #[test] // [POOLCTL-033]
    fn a_clock_in_the_past_is_told() {
        assert_eq!(clock(jiff::Timestamp::UNIX_EPOCH).status, CheckStatus::Warn);
        assert_eq!(clock(jiff::Timestamp::now()).status, CheckStatus::Ok);
    }
}
