//! `llorch-pool dev`: sets a host up, and finds out what it lacks.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use pool_core::config::PoolConfig;
use pool_core::errors::with_causes;
use pool_core::lifecycle::find_program;
use pool_core::programs::find_on_path;
use pool_core::terminal::doctor::{Finding, report};
use pool_core::terminal::progress;
use pool_core::terminal::{CliError, Exit, Format, daemon, human_bytes, say};
use pool_core::worker::Backend;
use tokio::process::Command as Program;
use tokio::time::timeout;

use crate::context::Context;
use crate::hf_wrapper;
use crate::tool::{self, ToolError};
use pool_core::terminal::interrupt::{Interrupt, interrupted};

/// Free bytes of the models' disk below which a host is warned: a mid-sized model.
const DISK_WARN_BYTES: u64 = 10_000_000_000;
/// Free bytes below which not even the default model fits with its wheel.
const DISK_FAIL_BYTES: u64 = 300_000_000;
/// How long a program may take to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// `llorch-pool dev`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the folders and a private Python environment with the hub's program `hf`. Needs no root; may be repeated.
    Setup,
    /// Check what this host has and lacks, with the command that mends each finding.
    ///
    /// Exits with 1 if something required is missing.
    Doctor {
        /// How to print it. JSON: an array of findings with `check`, `status` (ok, warn, fail), `message` and `fix`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
}

impl Command {
    /// Does what was asked for.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Setup => setup(&Context::open(None)?).await,
            Self::Doctor { format } => doctor(&Context::load(None)?, format).await,
        }
    }
}

async fn setup(context: &Context) -> Result<Exit, CliError> {
    say(format!("models go to {}", context.store().dir().display()))?;
    let venv = context.home.venv_dir();
    let hf = venv.join("bin/hf");
    // A program that starts, not just a file: an upgrade of Python leaves environments behind that don't work.
    if let Some(version) = version_of(&hf).await {
        say(format!("hf {version} is already at {}", hf.display()))?;
        return Ok(Exit::Done);
    }
    let python = find_on_path("python3").ok_or_else(|| {
        CliError::new(Exit::Failed, "`python3` is not installed")
            .hint("install Python 3 with pip, as with `apt install python3-pip`")
    })?;
    let interrupt = Interrupt::catch()?;
    let spinner = progress::spinner("installing huggingface_hub into a private Python environment");
    if version_of(&venv.join("bin/python")).await.is_none() {
        // Without pip in it, because Debian's python3 lacks `ensurepip`, which would put it there. The host's pip
        // can install into another environment.
        let mut make = Program::new(&python);
        make.args(["-m", "venv", "--clear", "--without-pip"])
            .arg(&venv);
        tool::run("python3 -m venv", make, &interrupt, on)
            .await
            .map_err(|error| {
                setup_error(
                    &error,
                    "install Python's `venv` module, as with `apt install python3-venv`",
                )
            })?;
    }
    let mut install = Program::new(&python);
    install
        .args([
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "--python",
        ])
        .arg(venv.join("bin/python"));
    install
        .args([
            "install",
            "--progress-bar",
            "off",
            "--upgrade",
            "huggingface_hub",
        ])
        .current_dir(&venv);
    tool::run("pip install", install, &interrupt, on)
        .await
        .map_err(|error| {
            setup_error(
                &error,
                "install pip, as with `apt install python3-pip`, and check the network",
            )
        })?;
    drop(spinner);
    let version = version_of(&hf).await.ok_or_else(|| {
        CliError::new(
            Exit::Failed,
            format!(
                "huggingface_hub is installed, but {} does not start",
                hf.display()
            ),
        )
        .hint(format!(
            "remove {} and run `llorch-pool dev setup` again",
            venv.display()
        ))
    })?;
    say(format!("hf {version} is at {}", hf.display()))?;
    Ok(Exit::Done)
}

fn on() -> std::ops::ControlFlow<String> {
    std::ops::ControlFlow::Continue(())
}

fn setup_error(error: &ToolError, hint: &str) -> CliError {
    match error {
        ToolError::Interrupted => interrupted("the private Python environment is not complete")
            .hint("llorch-pool dev setup"),
        ToolError::Failed { tail, .. } => {
            CliError::of(Exit::Failed, error, Some(hint.to_owned())).cause(tail.join("\n"))
        }
        error => CliError::of(Exit::Failed, error, Some(hint.to_owned())),
    }
}

async fn doctor(context: &Context, format: Format) -> Result<Exit, CliError> {
    let python = find_on_path("python3");
    let pip = match &python {
        Some(python) => first_line(python, &["-m", "pip", "--version"]).await,
        None => None,
    };
    let hf = hf_wrapper::find(&context.home.venv_dir());
    let mut findings = vec![
        folders(context),
        disk(context),
        worker_program(&context.config),
        manager_program(),
        pip_finding(python.as_deref(), pip.as_deref(), hf.is_some()),
        hf_finding(hf.as_deref(), pip.is_some()).await,
    ];
    findings.extend(ports(context));
    findings.push(ssh_server());
    findings.push(
        optional(
            "git",
            "needed to update a checkout",
            "install git, as with `apt install git`",
        )
        .await,
    );
    findings.push(
        optional(
            "rustc",
            "needed to build from source",
            "install Rust with rustup (https://rustup.rs)",
        )
        .await,
    );
    report(&findings, format)
}

/// Writes into each folder: modes say too little where a disk is mounted read-only, or is full.
fn folders(context: &Context) -> Finding {
    let home = &context.home;
    if let Err(error) = home.ensure() {
        let fix = error
            .hint()
            .unwrap_or("set LLORCH_HOME to a folder of yours");
        return Finding::fail("folders", with_causes(&error), fix);
    }
    let dirs = [
        home.config_dir(),
        context.config.models_dir(home),
        home.logs_dir(),
        home.pool_state(),
        home.workers_dir(),
    ];
    for dir in &dirs {
        if let Err(error) = writable(dir) {
            let fix = format!(
                "chown -R \"$USER\" '{0}' && chmod u+rwx '{0}'",
                dir.display()
            );
            return Finding::fail(
                "folders",
                format!("{} can't be written: {error}", dir.display()),
                fix,
            );
        }
    }
    Finding::ok(
        "folders",
        format!("{} and the others can be written", dirs[1].display()),
    )
}

fn writable(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    tempfile::Builder::new()
        .prefix(".doctor-")
        .tempfile_in(dir)
        .map(drop)
}

fn disk(context: &Context) -> Finding {
    let store = context.store();
    let fix = "free some space, or set LLORCH_MODELS_DIR to a folder of a larger disk";
    match store.disk() {
        Err(error) => Finding::fail(
            "disk",
            format!("its space can't be asked for: {error}"),
            fix,
        ),
        Ok(disk) => {
            let message = format!(
                "{} free for models in {}",
                human_bytes(disk.free_bytes),
                store.dir().display()
            );
            match disk.free_bytes {
                free if free < DISK_FAIL_BYTES => Finding::fail("disk", message, fix),
                free if free < DISK_WARN_BYTES => Finding::warn("disk", message, fix),
                _ => Finding::ok("disk", message),
            }
        }
    }
}

fn worker_program(config: &PoolConfig) -> Finding {
    match find_program(Backend::Cpu, config.workers.programs_dir.as_deref()) {
        Some(program) => Finding::ok("llorch-candled", program.display().to_string()),
        None => Finding::fail(
            "llorch-candled",
            "no worker program beside this one or on the PATH",
            "cargo build --release -p llorch-candled",
        ),
    }
}

fn manager_program() -> Finding {
    match daemon::find_sibling("pool-managerd") {
        Ok(program) => Finding::ok("pool-managerd", program.display().to_string()),
        Err(_) => Finding::warn(
            "pool-managerd",
            "not beside this program or on the PATH; workers can be started without it",
            "cargo build --release -p pool-managerd",
        ),
    }
}

fn pip_finding(python: Option<&Path>, pip: Option<&str>, has_hf: bool) -> Finding {
    let fix = "install Python 3 with pip, as with `apt install python3-pip`";
    let message = match (python, pip) {
        (Some(python), Some(pip)) => {
            return Finding::ok("pip", format!("{pip} ({})", python.display()));
        }
        (Some(_), None) => {
            "python3 has no pip: models on the Python package index can't be downloaded"
        }
        (None, _) => "no python3: models on the Python package index can't be downloaded",
    };
    // One of the two ways to a model is enough.
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
        "install pip first, then: llorch-pool dev setup"
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

/// The port of the pool manager, and the first free one for a worker.
fn ports(context: &Context) -> [Finding; 2] {
    let config = &context.config;
    let bind = config.bind;
    let running = daemon::status(&context.home.pool_state());
    let manager = match running {
        Some(running) => Finding::ok(
            "port of the pool manager",
            format!("it runs at {} (pid {})", running.url, running.process.pid),
        ),
        None if is_free(bind) => Finding::ok("port of the pool manager", format!("{bind} is free")),
        None => Finding::warn(
            "port of the pool manager",
            format!("{bind} is taken by another program"),
            "set LLORCH_POOL_BIND, as to 127.0.0.1:0 for any free port",
        ),
    };
    let (first, last) = (config.workers.port_min, config.workers.port_max);
    let workers =
        match (first..=last).find(|port| is_free(SocketAddr::from(([127, 0, 0, 1], *port)))) {
            Some(port) => Finding::ok(
                "ports of workers",
                format!("{port} is the first free one of {first} to {last}"),
            ),
            None => Finding::fail(
                "ports of workers",
                format!("all of {first} to {last} are taken"),
                "set LLORCH_WORKERS_PORT_MIN and LLORCH_WORKERS_PORT_MAX to another range",
            ),
        };
    [manager, workers]
}

fn is_free(address: SocketAddr) -> bool {
    TcpListener::bind(address).is_ok()
}

fn ssh_server() -> Finding {
    // Administrators' programs are often not in a user's PATH.
    let places =
        ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(|dir| PathBuf::from(dir).join("sshd"));
    match find_on_path("sshd").or_else(|| places.into_iter().find(|path| path.is_file())) {
        Some(sshd) => Finding::ok("ssh server", sshd.display().to_string()),
        None => Finding::warn(
            "ssh server",
            "not installed: `llorch` can't control this pool from another host without a pool manager",
            "install an ssh server, as with `apt install openssh-server`",
        ),
    }
}

async fn optional(program: &'static str, why: &str, fix: &str) -> Finding {
    match find_on_path(program) {
        Some(path) => match first_line(&path, &["--version"]).await {
            Some(version) => Finding::ok(program, version),
            None => Finding::warn(
                program,
                format!("{} does not start; {why}", path.display()),
                fix,
            ),
        },
        None => Finding::warn(program, format!("not installed; {why}"), fix),
    }
}

/// The version that a program gives of itself; `None` if it does not start or does not say.
async fn version_of(program: &Path) -> Option<String> {
    let line = first_line(program, &["--version"]).await?;
    Some(line.rsplit(' ').next().unwrap_or(&line).to_owned())
}

async fn first_line(program: &Path, args: &[&str]) -> Option<String> {
    let mut command = Program::new(program);
    // Not from here: Python would take modules from the current folder.
    command
        .args(args)
        .current_dir("/")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    let output = timeout(VERSION_TIMEOUT, command.output())
        .await
        .ok()?
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next()?.trim();
    // pip adds the folder that it is in, which says little.
    let line = line.split(" from ").next().unwrap_or(line);
    (output.status.success() && !line.is_empty()).then(|| line.chars().take(80).collect())
}

#[cfg(test)]
mod tests {
    use pool_core::terminal::doctor::Verdict;

    use super::*;

    #[test] // [POOLCTL-031]
    fn one_way_to_models_is_enough() {
        let python = Path::new("/usr/bin/python3");
        assert_eq!(
            pip_finding(Some(python), Some("pip 24.0"), false).status,
            Verdict::Ok
        );
        assert_eq!(pip_finding(Some(python), None, true).status, Verdict::Warn);
        assert_eq!(pip_finding(Some(python), None, false).status, Verdict::Fail);
        assert_eq!(pip_finding(None, None, false).status, Verdict::Fail);
    }

    #[tokio::test] // [POOLCTL-031]
    async fn a_program_that_does_not_start_has_no_version() {
        assert_eq!(version_of(Path::new("/no/such/program")).await, None);
        assert_eq!(version_of(Path::new("/bin/false")).await, None);
    }
}
