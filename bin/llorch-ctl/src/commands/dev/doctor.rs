//! `llorch dev doctor`.

use std::error::Error;
use std::net::SocketAddr;

use clap::Args;
use orchestrator_core::api::pools::{PoolView, PoolViewState};
use orchestrator_core::config::{ConfigError, OrchestratorConfig};
use pool_core::kit::home::Home;
use pool_core::kit::terminal::daemon::{find_sibling, status};
use pool_core::kit::terminal::doctor::host::{self, Room};
use pool_core::kit::terminal::doctor::{Finding, report};
use pool_core::kit::terminal::{CliError, Exit, Format};

use crate::commands::orchestrator::NAME;
use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Limits of free disk space. Below the first, about a day of many long answers is left; below the second, any submit may fail.
const ROOM: Room = Room {
    warn_bytes: 1_000_000_000,
    fail_bytes: 50_000_000,
};

/// Check this machine as the orchestrator's host, and show the command that fixes each finding.
///
/// Exits with 1 if something required is missing. To check a pool's host, use `llorch-pool dev doctor` there.
#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    connect: ConnectArgs,
    /// Columns, or a JSON array of findings with `check`, `status` (ok, warn, fail), `message` and `fix`
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Doctor {
    /// Runs all checks, then prints the findings.
    pub async fn run(self) -> Result<Exit, CliError> {
        let home = Home::from_env()?;
        let mut findings = vec![program()];
        let config = OrchestratorConfig::load(&home, None);
        let file = home.config_file("orchestratord.toml");
        let broken = config.as_ref().err();
        findings.push(host::settings(
            &file,
            broken.map(|error| (error as &dyn Error, hint_of(error))),
        ));
        let state = home.orchestratord_state();
        findings.push(host::private_folder("state folder", &state));
        findings.push(host::private_folder("log folder", &home.logs_dir()));
        let fix = "make room, or set LLORCH_HOME to a folder on another disk";
        findings.push(host::disk(&state, "jobs", ROOM, fix));
        findings.push(port(&home, config.unwrap_or_default().bind));
        findings.extend(daemon(&self.connect).await);
        report(&findings, self.format)
    }
}

fn hint_of(error: &ConfigError) -> Option<String> {
    match error {
        ConfigError::Settings(error) => error.hint(),
        _ => None,
    }
}

fn program() -> Finding {
    match find_sibling(NAME) {
        Ok(path) => Finding::ok(NAME, path.display().to_string()),
        Err(_) => Finding::fail(
            NAME,
            "neither next to this program nor on the PATH",
            "in a checkout: cargo build --release -p orchestratord",
        ),
    }
}

fn port(home: &Home, bind: SocketAddr) -> Finding {
    if let Some(running) = status(&home.orchestratord_state()) {
        return Finding::ok(
            "port",
            format!(
                "{NAME} {} listens at {} (pid {})",
                running.version, running.url, running.process.pid
            ),
        );
    }
    match host::port_free(bind) {
        Ok(()) => Finding::ok("port", format!("{bind} is free")),
        Err(reason) => Finding::fail(
            "port",
            reason,
            "LLORCH_ORCHESTRATOR_BIND=127.0.0.1:8081 llorch orchestrator start",
        ),
    }
}

/// Checks the orchestrator as a client sees it, and its pools.
async fn daemon(connect: &ConnectArgs) -> Vec<Finding> {
    let orchestrator = match Orchestrator::find(connect) {
        Ok(orchestrator) => orchestrator,
        Err(error) => {
            return vec![Finding::fail(
                "token",
                error.message,
                error
                    .hint
                    .unwrap_or_else(|| "check the token's file".into()),
            )];
        }
    };
    let version = match orchestrator.version().await {
        Ok(version) => version,
        Err(error) => {
            let error = shown(error);
            let fix = error
                .hint
                .unwrap_or_else(|| "llorch orchestrator logs".into());
            return vec![if error.exit == Exit::Unreachable
                && error.message.starts_with("could not reach")
            {
                Finding::warn("orchestrator", error.message, fix)
            } else {
                Finding::fail("orchestrator", error.message, fix)
            }];
        }
    };
    let ours = env!("CARGO_PKG_VERSION");
    let at = orchestrator.url();
    let mut findings = vec![if version.version == ours {
        Finding::ok(
            "orchestrator",
            format!("{} {} answers at {at}", version.name, version.version),
        )
    } else {
        let message = format!(
            "{} {} answers at {at}; this program is {ours}",
            version.name, version.version
        );
        Finding::warn(
            "orchestrator",
            message,
            "llorch orchestrator stop && llorch orchestrator start",
        )
    }];
    findings.push(match orchestrator.pools().await {
        Err(error) => Finding::fail("pools", error.to_string(), "llorch orchestrator logs"),
        Ok(pools) if pools.is_empty() => Finding::warn(
            "pools",
            "none has registered",
            format!("on a pool's host: LLORCH_ORCHESTRATOR_URL={at} llorch-pool daemon start"),
        ),
        Ok(pools) => pools_finding(&pools),
    });
    findings
}

fn pools_finding(pools: &[PoolView]) -> Finding {
    if let Some(contested) = pools.iter().find(|pool| pool.conflict.is_some()) {
        let other = contested.conflict.as_ref().map_or("", |other| &other.url);
        let message = format!(
            "pool id `{}` is held by {}, and {other} claims it too",
            contested.id, contested.url
        );
        let fix = "on one of the two hosts: set LLORCH_POOL_ID or `pool_id`, then llorch-pool daemon stop && llorch-pool daemon start";
        return Finding::fail("pools", message, fix);
    }
    let (online, others): (Vec<_>, Vec<_>) = pools
        .iter()
        .partition(|pool| pool.state == PoolViewState::Online);
    let mut message = format!("{} online", online.len());
    for pool in &others {
        message += &format!(", {} {}", pool.id, pool.state.as_str());
    }
    let drains =
        |pool: &&PoolView| matches!(pool.state, PoolViewState::Draining | PoolViewState::Drained);
    match &others[..] {
        [] => Finding::ok("pools", message),
        others if others.iter().all(drains) => {
            Finding::warn("pools", message, "on that host: llorch-pool daemon resume")
        }
        _ => Finding::warn("pools", message, "on that host: llorch-pool daemon start"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use pool_core::kit::terminal::doctor::CheckStatus;

    #[test] // [LLORCH-051]
    fn a_taken_port_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = port(&home, taken.local_addr().unwrap());
        assert_eq!(found.status, CheckStatus::Fail);
        assert!(found.message.contains("is taken by"), "{}", found.message);
        assert_eq!(
            port(&home, "127.0.0.1:0".parse().unwrap()).status,
            CheckStatus::Ok
        );
    }
}
