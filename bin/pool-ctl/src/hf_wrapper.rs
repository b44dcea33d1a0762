//! `hf`, the hub's own program, as a source of model files.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use pool_core::kit::programs::find_on_path;
use tokio::process::Command;

use crate::tool::{self, ToolError};
use pool_core::kit::terminal::interrupt::Interrupt;

/// Finds `hf` on the PATH, or else in the private environment that `llorch-pool dev setup` makes.
pub fn find(venv: &Path) -> Option<PathBuf> {
    let private = venv.join("bin/hf");
    find_on_path("hf").or_else(|| private.is_file().then_some(private))
}

/// Downloads `file` of a repository into `folder` and returns its path. The parts of a source were checked when the catalogue
/// was read, so none of them can be taken for an option. `started` receives the program's process id.
pub async fn download(
    hf: &Path,
    (repo, file, revision): (&str, &str, Option<&str>),
    folder: &Path,
    interrupt: &Interrupt,
    started: impl FnOnce(u32),
    tick: impl FnMut() -> ControlFlow<String>,
) -> Result<PathBuf, ToolError> {
    let mut command = Command::new(hf);
    command
        .args(arguments(repo, file, revision, folder))
        .current_dir(folder);
    command
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        .env("HF_HUB_DISABLE_UPDATE_CHECK", "1")
        // The Xet transport writes a file in any order. Over plain HTTP the file on disk is always a beginning, which a later
        // run can continue.
        .env("HF_HUB_DISABLE_XET", "1");
    tool::run("hf", command, interrupt, started, tick).await?;
    Ok(folder.join(file))
}

/// Returns the file that `hf` is filling below `folder`, with the entity tag from its name:
/// `.cache/huggingface/download/[FOLDERS/]HASH.ETAG.UNIQUE.incomplete`.
pub fn incomplete(folder: &Path) -> Option<(PathBuf, String)> {
    let mut todo = vec![folder.join(".cache/huggingface/download")];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(path);
            } else if let Some(etag) = entry.file_name().to_str().and_then(etag_of) {
                return Some((path, etag));
            }
        }
    }
    None
}

fn etag_of(name: &str) -> Option<String> {
    let (rest, unique) = name.strip_suffix(".incomplete")?.rsplit_once('.')?;
    let (_, etag) = rest.split_once('.')?;
    (!etag.is_empty() && !unique.is_empty()).then(|| etag.to_owned())
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

    #[test] // [POOLCTL-017]
    fn the_file_being_filled_names_its_entity_tag() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(incomplete(dir.path()), None);
        let inner = dir.path().join(".cache/huggingface/download/sub");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(inner.join("m.gguf.lock"), "").unwrap();
        let file = inner.join("x1_-=.ab.cd-1.0f3e9a77.incomplete");
        std::fs::write(&file, "half").unwrap();
        assert_eq!(incomplete(dir.path()), Some((file, "ab.cd-1".to_owned())));
        assert_eq!(etag_of("a.b.incomplete"), None);
    }

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
