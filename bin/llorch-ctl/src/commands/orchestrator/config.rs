//! `llorch orchestrator config`: the orchestrator's settings.

use std::path::PathBuf;

use orchestrator_core::config::{ALIASES, ConfigError, FILE_NAME, OrchestratorConfig};
use pool_core::kit::home::Home;
use pool_core::kit::secret::Secret;
use pool_core::kit::settings::{self, Loaded, Setting};
use pool_core::kit::terminal::daemon_commands::ConfigArgs;
use pool_core::kit::terminal::{CliError, Exit, Format, print_json, print_settings, say, write};
use serde::Serialize;

/// `llorch orchestrator config`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Check the settings, and list each with its value and origin; exits with 2 if they are invalid
    Check {
        #[command(flatten)]
        file: ConfigArgs,
        /// Columns, or a JSON object with `file` (null without one), `api_token` and `pool_token` (true if there is one) and
        /// `settings`, an array of objects with `key`, `value`, `source` (variable, file or default) and `origin`
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print a settings file with every key, its value and its meaning; keys at their default are commented out
    Show {
        #[command(flatten)]
        file: ConfigArgs,
        /// Print the defaults, ignoring the settings of this host
        #[arg(long, conflicts_with = "config")]
        defaults: bool,
    },
}

#[derive(Serialize)]
struct Checked {
    file: Option<PathBuf>,
    api_token: bool,
    pool_token: bool,
    settings: Vec<Setting>,
}

impl Command {
    /// Runs the command.
    pub fn run(self, home: &Home) -> Result<Exit, CliError> {
        match self {
            Self::Check { file, format } => check(home, file, format)?,
            Self::Show { file, defaults } => {
                let loaded = if defaults {
                    Loaded {
                        value: OrchestratorConfig::default(),
                        origins: Vec::new(),
                    }
                } else {
                    load(home, &file)?
                };
                write(settings::annotated(&loaded, &ALIASES)?)?;
            }
        }
        Ok(Exit::Done)
    }
}

fn load(home: &Home, file: &ConfigArgs) -> Result<Loaded<OrchestratorConfig>, CliError> {
    OrchestratorConfig::load_traced(home, file.config.as_deref()).map_err(|error| match error {
        ConfigError::Settings(error) => error.into(),
        error => CliError::of(Exit::Usage, &error, None),
    })
}

/// Checks everything that the daemon checks before it listens, and prints the settings.
fn check(home: &Home, file: ConfigArgs, format: Format) -> Result<(), CliError> {
    let loaded = load(home, &file)?;
    let config = &loaded.value;
    let token = |variable: &str, file: &Option<PathBuf>| {
        Secret::load(std::env::var(variable).ok(), file.as_deref())
            .map_err(|error| CliError::of(Exit::Usage, &error, error.hint().map(str::to_owned)))
    };
    let api_token = token("LLORCH_API_TOKEN", &config.token_file)?.is_some();
    let pool_token = token("LLORCH_POOL_TOKEN", &config.pool_token_file)?.is_some();
    if !config.bind.ip().is_loopback() && !api_token {
        let message = format!(
            "{}: `bind` is {}, which other machines can reach, and there is no token",
            loaded.origin("bind"),
            config.bind
        );
        return Err(CliError::new(Exit::Usage, message)
            .hint("set `token_file` (mode 0600) or LLORCH_API_TOKEN, or bind to 127.0.0.1"));
    }
    let own = home.config_file(FILE_NAME);
    let checked = Checked {
        file: file.config.or_else(|| own.exists().then_some(own)),
        api_token,
        pool_token,
        settings: settings::list(&loaded)?,
    };
    if format == Format::Json {
        return print_json(&checked);
    }
    print_settings(&checked.settings)?;
    let file = checked.file.map_or_else(
        || "no settings file".to_owned(),
        |file| file.display().to_string(),
    );
    let said = |there: bool| if there { "a" } else { "no" };
    say(format!(
        "\nthe settings are good ({file}, {} token for clients, {} token for pools)",
        said(api_token),
        said(pool_token)
    ))
}
