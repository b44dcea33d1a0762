//! The context of every command: the home, the pool's settings, the catalogue and the models folder.

use std::path::Path;

use pool_core::ModelRef;
use pool_core::catalog::store::{ResolveError, Store};
use pool_core::catalog::support::Unsupported;
use pool_core::catalog::{Catalog, CatalogError};
use pool_core::config::{ConfigError, PoolConfig};
use pool_core::kit::files;
use pool_core::kit::home::{Home, HomeError};
use pool_core::kit::terminal::{CliError, Exit};

/// Home and settings of this pool host.
#[derive(Debug, Clone)]
pub struct Context {
    /// Folders of this host's files.
    pub home: Home,
    /// The settings in force.
    pub config: PoolConfig,
}

impl Context {
    /// Loads the context from the environment and `pool-managerd.toml`. Creates no folder: a read-only command must not fail
    /// because a folder is missing.
    pub fn load(config: Option<&Path>) -> Result<Self, CliError> {
        let home = Home::from_env()?;
        let config = PoolConfig::load(&home, config).map_err(config_error)?;
        Ok(Self { home, config })
    }

    /// Loads a context like [`Context::load`] and creates the folders, for commands that work with the registry.
    pub fn open(config: Option<&Path>) -> Result<Self, CliError> {
        let context = Self::load(config)?;
        context.home.ensure()?;
        Ok(context)
    }

    /// Opens a context like [`Context::open`], for read-only commands: the home need not be writable.
    pub fn look() -> Result<Self, CliError> {
        let context = Self::load(None)?;
        match context.home.ensure() {
            Err(HomeError::Prepare { source, .. }) if files::is_read_only(&source) => {}
            ensured => ensured?,
        }
        Ok(context)
    }

    /// Loads the catalogue, the models known by name.
    pub fn catalog(&self) -> Result<Catalog, CliError> {
        Catalog::load(&self.home).map_err(catalog_error)
    }

    /// Returns the store of the models folder.
    pub fn store(&self) -> Store {
        Store::new(self.config.models_dir(&self.home))
    }
}

/// Returns the error for a broken settings file, which counts as wrong usage.
pub fn config_error(error: ConfigError) -> CliError {
    match error {
        ConfigError::Settings(error) => error.into(),
        error => CliError::of(Exit::Usage, &error, error.hint()),
    }
}

/// Returns the error for a broken catalogue, which counts as wrong usage.
pub fn catalog_error(error: CatalogError) -> CliError {
    CliError::of(Exit::Usage, &error, Some(error.hint().to_owned()))
}

/// Returns the error for a model that no worker can run.
pub fn unsupported_error(model: &ModelRef, reason: &Unsupported) -> CliError {
    CliError::new(Exit::Refused, format!("`{model}` can't run: {reason}")).hint(reason.hint())
}

/// Returns the error for a model that can't be used, for example because it is missing or not allowed.
pub fn resolve_error(error: &ResolveError) -> CliError {
    let exit = match error {
        ResolveError::Unknown { .. }
        | ResolveError::NotCatalogued { .. }
        | ResolveError::NotDownloaded { .. }
        | ResolveError::Missing { .. } => Exit::NotFound,
        ResolveError::Ambiguous { .. } => Exit::Usage,
        ResolveError::Forbidden { .. } => Exit::Refused,
        ResolveError::NotAFile { .. } | ResolveError::Io { .. } => Exit::Failed,
    };
    CliError::of(exit, error, error.hint())
}
