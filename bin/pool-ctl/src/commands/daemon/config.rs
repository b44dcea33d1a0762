//! `llorch-pool daemon config`: the pool manager's settings.

use std::net::SocketAddr;
use std::path::PathBuf;

use pool_core::config::{ALIASES, FILE_NAME, PoolConfig};
use pool_core::kit::home::Home;
use pool_core::kit::secret::Secret;
use pool_core::kit::settings::{self, Loaded, Setting, UnknownVariable};
use pool_core::kit::terminal::daemon_commands::ConfigArgs;
use pool_core::kit::terminal::{
    CliError, Exit, Format, note, print_json, print_settings, say, write,
};
use serde::Serialize;

use crate::context::config_error;

/// Subcommands of `llorch-pool daemon config`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Check the settings, and list each with its value and origin. Exits with 2 if they can't be used. `LLORCH_*` variables
    /// that set nothing are listed as well.
    Check {
        #[command(flatten)]
        file: ConfigArgs,
        /// Address to listen on, as in the pool manager's own option.
        #[arg(long, value_name = "ADDRESS:PORT")]
        bind: Option<SocketAddr>,
        /// Output format. JSON: an object with `file` (null without one), `token` (true if there is one), `settings`, an array
        /// of objects with `key`, `value`, `source` (`flag`, `variable`, `file` or `default`) and `origin`, and
        /// `unknown_variables`, an array of objects with `name` and `nearest`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print a settings file with every key, its value and its meaning. Keys with their default value are commented out.
    Show {
        #[command(flatten)]
        file: ConfigArgs,
        /// Print the defaults instead of this host's settings.
        #[arg(long, visible_alias = "print-default", conflicts_with = "config")]
        defaults: bool,
    },
}

#[derive(Serialize)]
struct Checked {
    file: Option<PathBuf>,
    token: bool,
    settings: Vec<Setting>,
    unknown_variables: Vec<UnknownVariable>,
}

impl Command {
    /// Runs the command and returns its exit code.
    pub fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Check { file, bind, format } => check(&file, bind, format),
            Self::Show { defaults: true, .. } => {
                write(explained()?)?;
                Ok(Exit::Done)
            }
            Self::Show { file, .. } => {
                let loaded = load(&Home::from_env()?, &file, None)?;
                write(settings::annotated(&loaded, &ALIASES)?)?;
                Ok(Exit::Done)
            }
        }
    }
}

/// Returns a settings file that explains every key and changes nothing.
pub fn explained() -> Result<String, CliError> {
    let defaults = Loaded {
        value: PoolConfig::default(),
        origins: Vec::new(),
    };
    Ok(settings::annotated(&defaults, &ALIASES)?)
}

fn load(
    home: &Home,
    file: &ConfigArgs,
    bind: Option<SocketAddr>,
) -> Result<Loaded<PoolConfig>, CliError> {
    let env = |name: &str| std::env::var(name).ok();
    PoolConfig::load_traced(home, file.config.as_deref(), bind, &env).map_err(config_error)
}

fn check(file: &ConfigArgs, bind: Option<SocketAddr>, format: Format) -> Result<Exit, CliError> {
    let home = Home::from_env()?;
    let loaded = load(&home, file, bind)?;
    let config = &loaded.value;
    config.check_advertised().map_err(config_error)?;
    let variable = std::env::var("LLORCH_POOL_TOKEN").ok();
    let token = Secret::load(variable, config.token_file.as_deref())
        .map_err(|error| CliError::of(Exit::Usage, &error, error.hint().map(str::to_owned)))?;
    if !config.bind.ip().is_loopback() && token.is_none() {
        return Err(CliError::new(
            Exit::Usage,
            format!(
                "{}: `bind` is {}, which other machines can reach, and there is no token",
                loaded.origin("bind"),
                config.bind
            ),
        )
        .hint("set `token_file` (mode 0600) or LLORCH_POOL_TOKEN, or bind to 127.0.0.1"));
    }
    let own = home.config_file(FILE_NAME);
    let checked = Checked {
        file: file.config.clone().or_else(|| own.exists().then_some(own)),
        token: token.is_some(),
        settings: settings::list(&loaded)?,
        unknown_variables: PoolConfig::unknown_variables(settings::names_in_environment()),
    };
    match format {
        Format::Json => print_json(&checked)?,
        Format::Table => {
            print_settings(&checked.settings)?;
            let file = checked.file.map_or_else(
                || "no settings file".to_owned(),
                |file| file.display().to_string(),
            );
            for variable in &checked.unknown_variables {
                note(format!("warning: {variable}"));
            }
            let token = if checked.token { "a token" } else { "no token" };
            say(format!("\nthe settings are good ({file}, {token})"))?;
        }
    }
    Ok(Exit::Done)
}
