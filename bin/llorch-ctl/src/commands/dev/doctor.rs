//! `llorch dev doctor`.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::Args;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::pool::PoolLiveness;
use pool_core::home::Home;
use pool_core::terminal::daemon::{find_sibling, status};
use pool_core::terminal::doctor::{Finding, report};
use pool_core::terminal::{CliError, Exit, Format, human_bytes};

use crate::commands::orchestrator::NAME;
use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Free bytes of the database's disk below which it is time to make room: a day of many long answers.
const DISK_WARN_BYTES: u64 = 1_000_000_000;
/// Free bytes below which a submit may fail any moment.
const DISK_FAIL_BYTES: u64 = 50_000_000;

/// Check what this machine has and lacks as the orchestrator's host, with the command that mends each finding.
///
/// Exits with 1 if something required is missing. A pool's host has a doctor of its own: `llorch-pool dev doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    connect: ConnectArgs,
    /// Columns, or a JSON array of findings with `check`, `status` (ok, warn, fail), `message` and `fix`
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Doctor {
    /// Looks at everything, then says what was found.
    pub async fn run(self) -> Result<Exit, CliError> {
        let home = Home::from_env()?;
        let mut findings = vec![program()];
        let config = OrchestratorConfig::load(&home, None);
        findings.push(match &config {
            Ok(_) => Finding::ok(
                "settings",
                format!(
                    "usable ({})",
                    home.config_file("orchestratord.toml").display()
                ),
            ),
            Err(error) => {
                let message =
                    std::iter::successors(std::error::Error::source(error), |cause| cause.source())
                        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
                Finding::fail(
                    "settings",
                    message,
                    format!("edit {}", home.config_file("orchestratord.toml").display()),
                )
            }
        });
        findings.push(folder("state folder", &home.orchestratord_state()));
        findings.push(folder("log folder", &home.logs_dir()));
        findings.push(disk(&home.orchestratord_state()));
        findings.push(port(&home, config.unwrap_or_default().bind));
        findings.extend(daemon(&self.connect).await);
        report(&findings, self.format)
    }
}

fn program() -> Finding {
    match find_sibling(NAME) {
        Ok(path) => Finding::ok(NAME, path.display().to_string()),
        Err(_) => Finding::fail(
            NAME,
            "not beside this program or on the PATH",
            "in a checkout: cargo build --release -p orchestratord",
        ),
    }
}

/// A folder of ours must be writable for us and closed to others: it holds prompts and answers.
fn folder(check: &'static str, path: &Path) -> Finding {
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Finding::fail(
            check,
            format!("{} is no folder", path.display()),
            format!("mv {0} {0}.old", path.display()),
        ),
        Ok(_) if tempfile::tempfile_in(path).is_err() => Finding::fail(
            check,
            format!("{} can't be written to", path.display()),
            format!("sudo chown $USER {}", path.display()),
        ),
        Ok(found) if found.permissions().mode() & 0o077 != 0 => {
            let mode = found.permissions().mode() & 0o777;
            Finding::warn(
                check,
                format!("{} is open to others ({mode:o})", path.display()),
                format!("chmod 700 {}", path.display()),
            )
        }
        Ok(_) => Finding::ok(check, path.display().to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::ok(
            check,
            format!("{} is made by the first start", path.display()),
        ),
        Err(error) => Finding::fail(
            check,
            format!("{}: {error}", path.display()),
            "check its owner and mode, or set LLORCH_HOME",
        ),
    }
}

/// The disk that holds the jobs, or will once the folder is made.
fn disk(path: &Path) -> Finding {
    let Some(existing) = path.ancestors().find(|path| path.exists()) else {
        return Finding::warn(
            "disk",
            format!("nothing of {} exists", path.display()),
            "set LLORCH_HOME to a folder that may be used",
        );
    };
    let free = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => {
            return Finding::warn(
                "disk",
                format!("{}: {error}", existing.display()),
                "check the disk",
            );
        }
    };
    let message = format!(
        "{} free for jobs at {}",
        human_bytes(free),
        existing.display()
    );
    let fix = "make room, or set LLORCH_HOME to a folder on another disk";
    match free {
        0..DISK_FAIL_BYTES => Finding::fail("disk", message, fix),
        DISK_FAIL_BYTES..DISK_WARN_BYTES => Finding::warn("disk", message, fix),
        _ => Finding::ok("disk", message),
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
    match TcpListener::bind(bind) {
        Ok(_) => Finding::ok("port", format!("{bind} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Finding::fail(
            "port",
            format!("{bind} is taken by another program"),
            "LLORCH_ORCHESTRATOR_BIND=127.0.0.1:8081 llorch orchestrator start",
        ),
        Err(error) => Finding::fail(
            "port",
            format!("{bind} can't be listened on: {error}"),
            "set `bind` in orchestratord.toml",
        ),
    }
}

/// The orchestrator as a client sees it, and its pools.
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
        Ok(pools) => {
            let away: Vec<_> = pools
                .iter()
                .filter(|pool| pool.liveness != PoolLiveness::Online)
                .map(|pool| pool.id.as_str())
                .collect();
            let online = pools.len() - away.len();
            if away.is_empty() {
                Finding::ok("pools", format!("{online} online"))
            } else {
                let message = format!("{online} online, not heard from: {}", away.join(", "));
                Finding::warn("pools", message, "on that host: llorch-pool daemon start")
            }
        }
    });
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::terminal::doctor::Verdict;

    #[test] // [LLORCH-051]
    fn a_folder_that_others_can_read_is_found() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder("f", dir.path()).status, Verdict::Ok);
        assert_eq!(folder("f", &dir.path().join("missing")).status, Verdict::Ok);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let open = folder("f", dir.path());
        assert_eq!(
            (open.status, open.fix),
            (
                Verdict::Warn,
                Some(format!("chmod 700 {}", dir.path().display()))
            )
        );
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(folder("f", &file).status, Verdict::Fail);
    }

    #[test] // [LLORCH-051]
    fn a_taken_port_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = port(&home, taken.local_addr().unwrap());
        assert_eq!(found.status, Verdict::Fail);
        assert!(
            found.message.contains("taken by another program"),
            "{}",
            found.message
        );
        assert_eq!(
            port(&home, "127.0.0.1:0".parse().unwrap()).status,
            Verdict::Ok
        );
    }
}
