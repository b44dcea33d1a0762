//! Detection of a variable that names another daemon, for commands about the daemon of this home.

use std::path::Path;

use reqwest::Url;

use super::{CliError, Exit, note};
use crate::kit::client::ApiClient;
use crate::kit::run_files;

/// A daemon named in the environment that may differ from the one of this home.
#[derive(Debug)]
pub struct Elsewhere {
    variable: &'static str,
    name: &'static str,
    /// Address in the variable; `None` if unset, or if it belongs to the daemon of this home.
    named: Option<String>,
    /// Address of the daemon of this home; `None` if not running.
    local: Option<String>,
}

impl Elsewhere {
    /// Reads `variable`, which may hold the address of a daemon called `name`. The daemon of this home keeps its state in
    /// `state_dir`.
    pub fn from_env(variable: &'static str, name: &'static str, state_dir: &Path) -> Self {
        let named = std::env::var(variable).ok();
        Self::new(variable, name, named, run_files::local_url(state_dir))
    }

    fn new(
        variable: &'static str,
        name: &'static str,
        named: Option<String>,
        local: Option<String>,
    ) -> Self {
        let named = named
            // `none` in the same variable tells a pool to report to no orchestrator.
            .filter(|url| !url.is_empty() && url != "none")
            .filter(|url| local.as_ref().is_none_or(|local| !is_same(url, local)));
        Self {
            variable,
            name,
            named,
            local,
        }
    }

    /// Returns the address of the other daemon, if the variable names one.
    pub fn url(&self) -> Option<&str> {
        self.named.as_deref()
    }

    /// Fails if `command`, which acts on the daemon of this home, may be meant for the other daemon.
    pub fn refuse(&self, command: &str) -> Result<(), CliError> {
        let Some(named) = &self.named else {
            return Ok(());
        };
        let Self { variable, name, .. } = self;
        let of_home = match &self.local {
            Some(local) => format!("{name} of this home, at {local}"),
            // No daemon is running here, so the variable may name the daemon of this home, which has stopped.
            None if is_loopback(named) => {
                self.note(&format!("`{command}`"));
                return Ok(());
            }
            None => format!("{name} of this home"),
        };
        Err(CliError::new(
            Exit::Usage,
            format!("{variable} points to {named}, but `{command}` works on {of_home}"),
        )
        .hint(format!(
            "unset {variable} to use the daemon of this home; for the other one, run the command on its host"
        )))
    }

    /// Prints a note that `what` is about the daemon of this home, if the variable names another one.
    pub fn note(&self, what: &str) {
        let Self { variable, name, .. } = self;
        if let Some(named) = &self.named {
            note(format!(
                "{what} concerns {name} of this home; {variable} points to {named}"
            ));
        }
    }
}

/// Returns whether two addresses have the same host and port. Resolves no name but `localhost`.
fn is_same(a: &str, b: &str) -> bool {
    let place = |text: &str| {
        let client = ApiClient::new(text, None).ok()?;
        let url = Url::parse(client.base_url()).ok()?;
        let host = match url.host_str()? {
            "localhost" => "127.0.0.1".to_owned(),
            host => host.to_owned(),
        };
        Some((host, url.port_or_known_default()))
    };
    place(a).is_some_and(|a| place(b) == Some(a))
}

fn is_loopback(url: &str) -> bool {
    ApiClient::new(url, None)
        .ok()
        .and_then(|client| Url::parse(client.base_url()).ok())
        .and_then(|url| url.host_str().map(str::to_owned))
        .is_some_and(|host| host == "localhost" || host.starts_with("127.") || host == "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-095]
    fn a_variable_that_names_the_daemon_of_this_home_is_no_other() {
        let elsewhere = |named: &str, local: Option<&str>| {
            let local = local.map(str::to_owned);
            Elsewhere::new("LLORCH_X_URL", "xd", Some(named.to_owned()), local)
        };
        let here = Some("http://127.0.0.1:8080");
        for same in [
            "",
            "none",
            "http://127.0.0.1:8080/",
            "http://localhost:8080",
        ] {
            assert_eq!(elsewhere(same, here).url(), None, "{same}");
        }
        let other = elsewhere("http://127.0.0.1:8081", here);
        assert_eq!(other.url(), Some("http://127.0.0.1:8081"));
        let refused = other.refuse("x stop").unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        for part in ["http://127.0.0.1:8080", "http://127.0.0.1:8081", "x stop"] {
            assert!(refused.message.contains(part), "{}", refused.message);
        }
        elsewhere("http://host.lan:8080", None)
            .refuse("x stop")
            .unwrap_err();
        // The address may be that of the daemon of this home, which has stopped.
        elsewhere("http://127.0.0.1:8080", None)
            .refuse("x stop")
            .unwrap();
    }
}
