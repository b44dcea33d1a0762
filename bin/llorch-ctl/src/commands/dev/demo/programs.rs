//! The programs that the demo runs. In a checkout they are built first, so that none of them is out of date.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use pool_core::kit::process::{ProcessIdentity, Signal};
use pool_core::kit::terminal::daemon::find_sibling;
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::{CliError, Exit, note};

/// Programs of the demo, including this one.
const BINARIES: [&str; 5] = [
    "llorch",
    "llorch-pool",
    "orchestratord",
    "pool-managerd",
    "llorch-candled",
];
/// Variable that is set for a program started by its own older build.
const RENEWED: &str = "LLORCH_DEMO_RENEWED";
/// Time for a program to end after an interrupt.
const INTERRUPT_GRACE: Duration = Duration::from_secs(10);

/// The source tree that this program was built from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Checkout {
    root: PathBuf,
    target_dir: PathBuf,
    triple: Option<OsString>,
    profile: OsString,
}

impl Checkout {
    /// Returns the checkout whose build folder contains `program`. If the build folder is elsewhere, finds the checkout through
    /// `manifest_dir`, which `cargo run` passes to the programs that it starts.
    fn of(program: &Path, manifest_dir: Option<&Path>) -> Option<Self> {
        // Cargo marks its build folders with this file.
        let target_dir = program
            .ancestors()
            .skip(1)
            .find(|folder| folder.join("CACHEDIR.TAG").is_file())?;
        let steps: Vec<_> = program
            .parent()?
            .strip_prefix(target_dir)
            .ok()?
            .iter()
            .map(ToOwned::to_owned)
            .collect();
        let (triple, profile) = match &steps[..] {
            [profile] => (None, profile.clone()),
            [triple, profile] => (Some(triple.clone()), profile.clone()),
            _ => return None,
        };
        let is_ours = |folder: &&Path| {
            folder.join("bin/llorch-ctl/Cargo.toml").is_file()
                && fs::read_to_string(folder.join("Cargo.toml"))
                    .is_ok_and(|text| text.contains("[workspace]"))
        };
        let root = program
            .ancestors()
            .find(is_ours)
            .or_else(|| manifest_dir?.ancestors().find(is_ours))?;
        Some(Self {
            root: root.to_path_buf(),
            target_dir: target_dir.to_path_buf(),
            triple,
            profile,
        })
    }

    fn build_command(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .current_dir(&self.root)
            .arg("build")
            .arg("--target-dir")
            .arg(&self.target_dir);
        // The folder of the `dev` profile has another name.
        let profile = if self.profile == "debug" {
            "dev".into()
        } else {
            self.profile.clone()
        };
        command.arg("--profile").arg(profile);
        if let Some(triple) = &self.triple {
            command.arg("--target").arg(triple);
        }
        // Without `-p`, dependencies get the features that the whole workspace needs, so that a build of the workspace does not
        // build them again.
        for binary in BINARIES {
            command.arg("--bin").arg(binary);
        }
        command
    }
}

/// In a checkout, builds all our programs with the profile of this one. If the build replaces this program, the new build takes
/// over, and this function does not return.
pub async fn build(interrupt: &Interrupt) -> Result<(), CliError> {
    let program = std::env::current_exe()?;
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let Some(checkout) = Checkout::of(&program, manifest_dir.as_deref()) else {
        return Ok(());
    };
    let before = file_of(&program);
    note(format!(
        "building in {} ({})",
        checkout.root.display(),
        checkout.profile.display()
    ));
    let status = run(checkout.build_command(), "cargo", interrupt).await?;
    if !status.success() {
        return Err(
            CliError::new(Exit::Failed, format!("the build failed ({status})"))
                .hint("see cargo's messages above"),
        );
    }
    if file_of(&program) != before && std::env::var_os(RENEWED).is_none() {
        note("llorch itself was out of date: continuing with the new build");
        let error = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .env(RENEWED, "1")
            .exec();
        return Err(CliError::caused(
            Exit::Failed,
            format!("could not start {}", program.display()),
            &error,
        ));
    }
    Ok(())
}

/// Returns the identity of the file at a path, which changes when a build replaces the file.
fn file_of(path: &Path) -> Option<(u64, u64, i64, i64)> {
    fs::metadata(path)
        .ok()
        .map(|file| (file.dev(), file.ino(), file.mtime(), file.mtime_nsec()))
}

/// Downloads a model to the models folder through `llorch-pool`, unless the model is already there.
pub async fn fetch_model(model: &str, interrupt: &Interrupt) -> Result<(), CliError> {
    let mut command = Command::new(find_sibling("llorch-pool")?);
    command.args(["models", "download", model]);
    let status = run(command, "llorch-pool", interrupt).await?;
    if status.success() {
        return Ok(());
    }
    Err(CliError::new(
        Exit::Failed,
        format!("could not get the model `{model}` ({status})"),
    )
    .hint("check what downloads need with `llorch-pool dev doctor`"))
}

/// Runs a program to its end with its output on our standard error: standard output is reserved for the answer.
async fn run(
    mut command: Command,
    name: &str,
    interrupt: &Interrupt,
) -> Result<ExitStatus, CliError> {
    let output = io::stderr().as_fd().try_clone_to_owned()?;
    command.stdin(Stdio::null()).stdout(output);
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .map_err(|error| {
            CliError::caused(Exit::Failed, format!("could not start {name}"), &error)
        })?;
    tokio::select! {
        status = child.wait() => Ok(status?),
        () = interrupt.wait() => {
            // A Ctrl-C in the terminal has reached the child as well; any other interrupt has not.
            if let Some(process) = child.id().and_then(|pid| ProcessIdentity::of(pid).ok().flatten()) {
                let _ = process.signal(Signal::INT);
            }
            if tokio::time::timeout(INTERRUPT_GRACE, child.wait()).await.is_err() {
                child.kill().await?;
            }
            Err(CliError::new(Exit::Interrupted, format!("interrupted while {name} ran")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkout(root: &Path) {
        fs::create_dir_all(root.join("bin/llorch-ctl")).unwrap();
        fs::write(root.join("Cargo.toml"), "[workspace]\n").unwrap();
        fs::write(root.join("bin/llorch-ctl/Cargo.toml"), "").unwrap();
    }

    fn target(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("CACHEDIR.TAG"), "").unwrap();
    }

    #[test] // [LLORCH-060]
    fn a_program_in_a_build_folder_finds_its_checkout_and_profile() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("repo");
        checkout(&root);
        target(&root.join("target"));
        let of = |path: &str| {
            Checkout::of(&root.join(path), None)
                .map(|found| (found.root, found.triple, found.profile))
        };
        assert_eq!(
            of("target/release/llorch"),
            Some((root.clone(), None, "release".into()))
        );
        let cross = Some((
            root.clone(),
            Some("x86_64-unknown-linux-musl".into()),
            "debug".into(),
        ));
        assert_eq!(of("target/x86_64-unknown-linux-musl/debug/llorch"), cross);
        // Installed or copied elsewhere: no build folder, so no build.
        assert_eq!(of("dist/llorch"), None);
    }

    #[test] // [LLORCH-060]
    fn a_build_folder_elsewhere_is_found_through_cargo() {
        let dir = tempfile::tempdir().unwrap();
        let (root, elsewhere) = (dir.path().join("repo"), dir.path().join("build"));
        checkout(&root);
        target(&elsewhere);
        let program = elsewhere.join("release/llorch");
        assert_eq!(Checkout::of(&program, None), None);
        let found = Checkout::of(&program, Some(&root.join("bin/llorch-ctl"))).unwrap();
        assert_eq!((&found.root, &found.target_dir), (&root, &elsewhere));
        let command = found.build_command();
        let args: Vec<_> = command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect();
        assert!(
            args.join(" ")
                .contains("--profile release --bin llorch --bin llorch-pool --bin orchestratord"),
            "{args:?}"
        );
    }
}
