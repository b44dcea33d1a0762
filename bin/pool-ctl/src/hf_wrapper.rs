//! The hub's own program `hf`, as a source of model files.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use pool_core::programs::find_on_path;
use tokio::process::Command;

use crate::tool::{self, ToolError};
use pool_core::terminal::interrupt::Interrupt;

/// Where `hf` is: in the PATH, else in the private environment that `llorch-pool dev setup` makes.
pub fn find(venv: &Path) -> Option<PathBuf> {
    let private = venv.join("bin/hf");
    find_on_path("hf").or_else(|| private.is_file().then_some(private))
}

/// Fetches `file` of a repository into `folder` and returns where it lies. The parts of a source were checked when the
/// catalogue was read: none of them can be taken for an option.
pub async fn download(
    hf: &Path,
    (repo, file, revision): (&str, &str, Option<&str>),
    folder: &Path,
    interrupt: &Interrupt,
    tick: impl FnMut() -> ControlFlow<String>,
) -> Result<PathBuf, ToolError> {
    let mut command = Command::new(hf);
    command
        .args(arguments(repo, file, revision, folder))
        .current_dir(folder);
    command
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
    tool::run("hf", command, interrupt, tick).await?;
    Ok(folder.join(file))
}

fn arguments(
    repo: &str,
    file: &str,
    revision: Option<&str>,
    folder: &Path,
) -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<std::ffi::OsString> = vec!["download".into(), repo.into(), file.into()];
    if let Some(revision) = revision {
        arguments.extend(["--revision".into(), revision.into()]);
    }
    arguments.extend(["--local-dir".into(), folder.into()]);
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCTL-010]
    fn the_argument_list_is_the_documented_one() {
        let list = |revision| {
            arguments(
                "org/repo",
                "sub/m.gguf",
                revision,
                Path::new("/models/.partial/m"),
            )
        };
        assert_eq!(
            list(None),
            [
                "download",
                "org/repo",
                "sub/m.gguf",
                "--local-dir",
                "/models/.partial/m"
            ]
        );
        assert_eq!(
            list(Some("v1")),
            [
                "download",
                "org/repo",
                "sub/m.gguf",
                "--revision",
                "v1",
                "--local-dir",
                "/models/.partial/m"
            ]
        );
    }
}
