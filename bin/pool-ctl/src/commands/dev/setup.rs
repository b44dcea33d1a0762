//! `llorch-pool dev setup`: the setup steps that need no root.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pool_core::kit::programs::find_on_path;
use pool_core::kit::terminal::doctor::CheckStatus;
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::progress;
use pool_core::kit::terminal::{CliError, Exit, say};
use tokio::process::Command as Program;

use super::{doctor, version_of};
use crate::commands::daemon::config;
use crate::context::Context;
use crate::tool::{self, ToolError};

/// Arguments of `llorch-pool dev setup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also write a settings file with every default explained, if there is none yet.
    #[arg(long)]
    config: bool,
}

impl Args {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        let context = Context::open(None)?;
        say(format!("models go to {}", context.store().dir().display()))?;
        if self.config {
            starter(&context.home.config_file("pool-managerd.toml"))?;
        }
        hf(&context).await?;
        left_to_do().await?;
        Ok(Exit::Done)
    }
}

/// Writes the settings file that `daemon config show --defaults` prints, unless there is one.
fn starter(path: &Path) -> Result<(), CliError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    match options.open(path) {
        Ok(mut file) => {
            file.write_all(config::explained()?.as_bytes())?;
            say(format!(
                "settings with their defaults are at {}",
                path.display()
            ))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            say(format!("settings are already at {}", path.display()))
        }
        Err(error) => Err(CliError::caused(
            Exit::Failed,
            format!("could not write {}", path.display()),
            &error,
        )),
    }
}

/// Installs the hub's program into an environment of its own.
async fn hf(context: &Context) -> Result<(), CliError> {
    let venv = context.home.venv_dir();
    let hf = venv.join("bin/hf");
    // The program must start, not just exist: an upgrade of Python leaves broken environments behind.
    if let Some(version) = version_of(&hf).await {
        return say(format!("hf {version} is already at {}", hf.display()));
    }
    let python = find_on_path("python3").ok_or_else(|| {
        CliError::new(Exit::Failed, "`python3` is not installed")
            .hint("install Python 3 with pip, for example with `apt install python3-pip`")
    })?;
    let interrupt = Interrupt::catch()?;
    let spinner = progress::spinner("installing huggingface_hub into a private Python environment");
    if version_of(&venv.join("bin/python")).await.is_none() {
        // Without pip, because Debian's python3 lacks `ensurepip`, which would install it. The host's pip can install into
        // another environment.
        let mut make = Program::new(&python);
        make.args(["-m", "venv", "--clear", "--without-pip"])
            .arg(&venv);
        tool::run("python3 -m venv", make, &interrupt, |_| {}, on)
            .await
            .map_err(|error| {
                failed(
                    &error,
                    "install Python's `venv` module, for example with `apt install python3-venv`",
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
    tool::run("pip install", install, &interrupt, |_| {}, on)
        .await
        .map_err(|error| match error.is_unreachable() {
            true => {
                let hint = "check the network and the proxy variables, then try again";
                let mut shown = failed(&error, hint);
                shown.exit = Exit::Unreachable;
                shown
            }
            false => failed(
                &error,
                "install pip, for example with `apt install python3-pip`, and check the network",
            ),
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
    say(format!("hf {version} is at {}", hf.display()))
}

/// Lists the doctor's findings that this command can't fix.
async fn left_to_do() -> Result<(), CliError> {
    let findings = doctor::examine().await?;
    let open: Vec<_> = findings
        .iter()
        .filter(|finding| finding.status != CheckStatus::Ok)
        .collect();
    if open.is_empty() {
        return say("this host has everything it needs");
    }
    say("left to do:")?;
    for finding in open {
        say(format!("  {}: {}", finding.check, finding.message))?;
        if let Some(fix) = &finding.fix {
            say(format!("    {fix}"))?;
        }
    }
    Ok(())
}

fn on() -> ControlFlow<String> {
    ControlFlow::Continue(())
}

fn failed(error: &ToolError, hint: &str) -> CliError {
    match error {
        ToolError::Interrupted => interrupted("the private Python environment is incomplete")
            .hint("llorch-pool dev setup"),
        ToolError::Failed { tail, .. } => {
            CliError::of(Exit::Failed, error, Some(hint.to_owned())).cause(tail.join("\n"))
        }
        error => CliError::of(Exit::Failed, error, Some(hint.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::config::PoolConfig;
    use pool_core::kit::home::Home;

    #[test] // [POOLCTL-034]
    fn the_starter_explains_every_key_changes_nothing_and_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config/pool-managerd.toml");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        starter(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for line in ["[workers]", "#port_min = 8001", "#repo_path ="] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        let loaded = PoolConfig::load_with(&Home::at(dir.path()), None, &|_| None).unwrap();
        assert_eq!(loaded, PoolConfig::default());
        // A second run leaves an existing file alone.
        std::fs::write(&path, "pool_id = \"mine\"\n").unwrap();
        starter(&path).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "pool_id = \"mine\"\n"
        );
    }
}
