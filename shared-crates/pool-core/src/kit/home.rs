//! Folders of llama-orch: below `LLORCH_HOME`, otherwise in the XDG base directories.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The folders of one installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    root: Option<PathBuf>,
    config: PathBuf,
    models: PathBuf,
    venv: PathBuf,
    logs: PathBuf,
    orchestratord: PathBuf,
    pool: PathBuf,
}

/// Folders that could not be determined or created.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// An environment with neither `LLORCH_HOME` nor `HOME`.
    #[error("neither LLORCH_HOME nor HOME is set")]
    Unknown,
    /// A folder that can't be created or protected.
    #[error("could not prepare the folder {}", path.display())]
    Prepare {
        /// Path of the folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl HomeError {
    /// Returns a remedy.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unknown => Some("set LLORCH_HOME to a folder that llama-orch may use"),
            Self::Prepare { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory
                ) =>
            {
                Some("a file is in the way: move it, or set LLORCH_HOME")
            }
            Self::Prepare { .. } => {
                Some("check its owner and mode, or set LLORCH_HOME to another folder")
            }
        }
    }
}

impl Home {
    /// Returns the home that the environment describes: `LLORCH_HOME`, otherwise XDG. `LLORCH_MODELS_DIR` overrides the folder
    /// of models.
    pub fn from_env() -> Result<Self, HomeError> {
        Self::from_lookup(&|name| std::env::var(name).ok())
    }

    /// Like [`Home::from_env`], with the environment passed in.
    pub fn from_lookup(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, HomeError> {
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let mut home = match set("LLORCH_HOME") {
            Some(root) => Self::at(root),
            None => {
                let user = set("HOME").map(PathBuf::from);
                // The XDG specification requires relative paths to be ignored.
                let base = |name: &str, default: &str| {
                    set(name)
                        .map(PathBuf::from)
                        .filter(|path| path.is_absolute())
                        .or_else(|| user.as_ref().map(|user| user.join(default)))
                        .map(|base| base.join("llorch"))
                        .ok_or(HomeError::Unknown)
                };
                let state = base("XDG_STATE_HOME", ".local/state")?;
                Self {
                    root: None,
                    config: base("XDG_CONFIG_HOME", ".config")?,
                    models: base("XDG_DATA_HOME", ".local/share")?.join("models"),
                    venv: base("XDG_DATA_HOME", ".local/share")?.join("venv"),
                    logs: state.join("logs"),
                    orchestratord: state.join("state/orchestratord"),
                    pool: state.join("state/pool"),
                }
            }
        };
        if let Some(models) = set("LLORCH_MODELS_DIR") {
            home.models = absolute(models.into());
        }
        Ok(home)
    }

    /// Returns a home with everything under `root`. A relative `root` is resolved now, against the current directory.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = absolute(root.into());
        Self {
            config: root.join("config"),
            models: root.join("models"),
            venv: root.join("venv"),
            logs: root.join("logs"),
            orchestratord: root.join("state/orchestratord"),
            pool: root.join("state/pool"),
            root: Some(root),
        }
    }

    /// Returns the root folder, for the `LLORCH_HOME` of a child process; `None` for a home in XDG directories.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Returns the folder of configuration files and of the user's own `catalog.toml`.
    pub fn config_dir(&self) -> PathBuf {
        self.config.clone()
    }

    /// Returns the path of a file in the configuration folder, such as `orchestratord.toml`.
    pub fn config_file(&self, name: &str) -> PathBuf {
        self.config.join(name)
    }

    /// Returns the folder of downloaded models.
    pub fn models_dir(&self) -> PathBuf {
        self.models.clone()
    }

    /// Returns the folder of the private Python environment that `llorch-pool dev setup` creates.
    pub fn venv_dir(&self) -> PathBuf {
        self.venv.clone()
    }

    /// Returns the folder of the daemons' and workers' log files.
    pub fn logs_dir(&self) -> PathBuf {
        self.logs.clone()
    }

    /// Returns the state folder of `orchestratord`: `jobs.db`, `lock`, `pid.json`, `addr`.
    pub fn orchestratord_state(&self) -> PathBuf {
        self.orchestratord.clone()
    }

    /// Returns the state folder of the pool: `workers/ID.json`, `lock`, `pid.json`, `addr`.
    pub fn pool_state(&self) -> PathBuf {
        self.pool.clone()
    }

    /// Returns the folder of the worker registry, inside [`Home::pool_state`].
    pub fn workers_dir(&self) -> PathBuf {
        self.pool.join("workers")
    }

    /// Creates missing folders with mode 0700. Existing folders of state and logs are restricted to that mode too;
    /// configuration and models keep the mode that their owner chose.
    pub fn ensure(&self) -> Result<(), HomeError> {
        for dir in [&self.config, &self.models] {
            make(dir)?;
        }
        for dir in [
            &self.logs,
            &self.orchestratord,
            &self.pool,
            &self.workers_dir(),
        ] {
            make(dir)?;
            tighten(dir)?;
        }
        Ok(())
    }
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn make(dir: &Path) -> Result<(), HomeError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| HomeError::Prepare {
            path: dir.to_path_buf(),
            source,
        })
}

fn tighten(dir: &Path) -> Result<(), HomeError> {
    let prepare = |source| HomeError::Prepare {
        path: dir.to_path_buf(),
        source,
    };
    let mode = fs::metadata(dir).map_err(prepare)?.permissions().mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(prepare)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env<'a>(vars: &'a [(&str, &str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        }
    }

    #[test] // [POOLCORE-001]
    fn llorch_home_puts_everything_under_one_folder() {
        let home =
            Home::from_lookup(&env(&[("LLORCH_HOME", "/srv/l"), ("HOME", "/home/a")])).unwrap();
        assert_eq!(home, Home::at("/srv/l"));
        assert_eq!(
            home.config_file("catalog.toml"),
            Path::new("/srv/l/config/catalog.toml")
        );
        assert_eq!(home.workers_dir(), Path::new("/srv/l/state/pool/workers"));
    }

    #[test] // [POOLCORE-001]
    fn without_it_the_xdg_folders_are_used_and_models_can_be_moved() {
        let home = Home::from_lookup(&env(&[
            ("HOME", "/home/a"),
            ("XDG_CONFIG_HOME", "relative/is/ignored"),
            ("XDG_STATE_HOME", "/var/state"),
            ("LLORCH_MODELS_DIR", "/big/models"),
        ]))
        .unwrap();
        assert_eq!(home.config_dir(), Path::new("/home/a/.config/llorch"));
        assert_eq!(
            home.orchestratord_state(),
            Path::new("/var/state/llorch/state/orchestratord")
        );
        assert_eq!(home.logs_dir(), Path::new("/var/state/llorch/logs"));
        assert_eq!(home.models_dir(), Path::new("/big/models"));
        assert!(matches!(
            Home::from_lookup(&env(&[])),
            Err(HomeError::Unknown)
        ));
    }

    #[test] // [POOLCORE-002]
    fn folders_are_made_private() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("new"));
        fs::create_dir_all(home.logs_dir()).unwrap();
        fs::set_permissions(home.logs_dir(), Permissions::from_mode(0o755)).unwrap();
        home.ensure().unwrap();
        for dir in [
            home.config_dir(),
            home.models_dir(),
            home.logs_dir(),
            home.pool_state(),
            home.workers_dir(),
        ] {
            assert_eq!(
                fs::metadata(&dir).unwrap().permissions().mode() & 0o777,
                0o700,
                "{}",
                dir.display()
            );
        }
        home.ensure().unwrap();
    }
}
