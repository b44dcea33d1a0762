//! Settings of a pool host, read by `pool-managerd`, and by `llorch-pool` when it works without the daemon.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::pool::HEARTBEAT_INTERVAL_MS;
use crate::kit::address;
use crate::kit::home::Home;
use crate::kit::log_config::LogConfig;
use crate::kit::settings::{self, Loaded, Origin, SettingsError, UnknownVariable};
use crate::worker_args::{DEFAULT_STOP_GRACE_S, MAX_STOP_GRACE_S, MAX_THREADS};

/// Default port of the pool manager.
pub const DEFAULT_PORT: u16 = 9200;
/// Default URL of an orchestrator on the same host.
pub const STANDARD_ORCHESTRATOR_URL: &str = "http://127.0.0.1:8080";
/// Name of the settings file in the configuration folder.
pub const FILE_NAME: &str = "pool-managerd.toml";
/// Additional variables as (variable, key). The other documented names (LLORCH_POOL_ID, LLORCH_ORCHESTRATOR_URL,
/// LLORCH_MODELS_DIR) follow from the names of their keys.
pub const ALIASES: [(&str, &str); 1] = [("LLORCH_POOL_BIND", "bind")];
/// Variables of the orchestrator's settings, which may be in the environment of a pool on the same host: full names, or
/// prefixes of a section's names. A test in `orchestrator-core` ensures that none is missing.
pub const ORCHESTRATOR_VARIABLES: [&str; 14] = [
    "LLORCH_MAX_POOLS",
    "LLORCH_ORCHESTRATOR_BIND",
    "LLORCH_POOL_TOKEN_FILE",
    "LLORCH_PREFIX_SHARING",
    "LLORCH_QUEUE_",
    "LLORCH_RECOVERY_WINDOW_MS",
    "LLORCH_SCHEDULER_",
    "LLORCH_SERVICE_BODY_LIMIT_BYTES",
    "LLORCH_SERVICE_BODY_TIMEOUT_S",
    "LLORCH_SERVICE_HEADER_LIMIT_BYTES",
    "LLORCH_SERVICE_HEADER_TIMEOUT_S",
    "LLORCH_SERVICE_KEEP_ALIVE_S",
    "LLORCH_SERVICE_STOP_TIMEOUT_S",
    "LLORCH_STORE_",
];
/// The `orchestrator_url` of a pool without an orchestrator.
const NO_ORCHESTRATOR: &str = "none";

/// The settings in `pool-managerd.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// Name of this pool in the fleet. Default: the host's short name.
    pub pool_id: String,
    /// Address to listen on; port 0 takes a free one. Default `127.0.0.1:9200`. Any address other than loopback requires a
    /// token.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    #[serde(deserialize_with = "address::deserialize_bind")]
    pub bind: SocketAddr,
    /// URL at which the orchestrator reaches this pool. Default: the address it listens on.
    #[serde(deserialize_with = "address::deserialize_url")]
    pub advertise_url: Option<String>,
    /// URL of the orchestrator to register with, or `none`. Default: the one that runs on this home, or, for a pool without a
    /// token, one at the standard address `http://127.0.0.1:8080`.
    #[serde(deserialize_with = "address::deserialize_url")]
    pub orchestrator_url: Option<String>,
    /// File (mode 0600) with the pool's token; the variable `LLORCH_POOL_TOKEN` takes precedence.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub token_file: Option<PathBuf>,
    /// The checkout that `llorch-pool git` works on. Default: the one that contains the current folder.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub repo_path: Option<PathBuf>,
    /// Milliseconds between heartbeats when nothing changes, 20 to 600000. Default 15000.
    pub heartbeat_interval_ms: u64,
    /// Start, supervision and stop of workers.
    pub workers: WorkersConfig,
    /// Memory available to workers.
    pub memory: MemoryConfig,
    /// Access to GPUs.
    pub gpu: GpuConfig,
    /// Models that may be used.
    pub models: ModelsConfig,
    /// Limits of the HTTP server.
    pub service: ServiceConfig,
    /// Settings of the daemon's log.
    pub log: LogConfig,
}

/// The `[workers]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WorkersConfig {
    /// First port given to workers. Default 8001.
    pub port_min: u16,
    /// Last port given to workers. Default 8999.
    pub port_max: u16,
    /// Seconds that a worker may take to load. Default 120; a file of over 12 GB gets one second per 100 MB.
    pub start_timeout_s: u64,
    /// Address that workers listen on. Default `127.0.0.1`, which only serves an orchestrator on this host. An orchestrator
    /// elsewhere reaches them at the host of `advertise_url`, with the secret of each worker.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    #[serde(deserialize_with = "address::deserialize_ip")]
    pub bind: IpAddr,
    /// Seconds that a worker may take to finish its running jobs when it is asked to stop. It is killed if it is still running
    /// 5 seconds later. Default 10.
    pub stop_timeout_s: u64,
    /// Seconds that a worker may make no progress, 1 to 86400: no step of loading, no token or part of a prompt while it has
    /// work, no answer while it has none. It is then considered stuck and ended. Default 30; a model of over 1 GB gets more
    /// time for its work, one second per 32 MB (320 MB on a GPU).
    pub stall_timeout_s: u64,
    /// Compute threads of a worker on the CPU. Default: one less than the host's processors.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u32>))]
    pub threads: Option<NonZeroU32>,
    /// Number of ended workers whose records and logs are kept. Default 20.
    pub keep_ended: usize,
    /// Folder that is searched first for `llorch-candled`. Default: next to the running program, then the PATH.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub programs_dir: Option<PathBuf>,
}

/// The `[memory]` section.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Bytes of main memory that all workers together may take. Default: all memory of the host, or of the memory cgroup that
    /// the pool runs in.
    pub cpu_limit_bytes: Option<u64>,
    /// Bytes of GPU memory that all workers on one GPU may take together. Default: all memory of the GPU.
    pub gpu_limit_bytes: Option<u64>,
}

/// The `[gpu]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct GpuConfig {
    /// Path of NVIDIA's management library. Default: `libnvidia-ml.so.1` from the system's library path.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub nvml_library: Option<PathBuf>,
    /// Milliseconds between two readings of a GPU, 100 to 600000. Default 2000.
    pub poll_interval_ms: u64,
    /// Milliseconds after which a GPU counts as unresponsive if its driver has not answered, 10 to 60000. Default 2000.
    pub deadline_ms: u64,
}

/// The `[models]` section.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// The models folder. Default: `models` of the home.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub dir: Option<PathBuf>,
    /// Folders below which a `file:` reference may point. Default: only the models folder.
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
    pub allow_paths: Vec<PathBuf>,
    /// True if clients of the pool manager may start downloads of `hf:` references that no catalogue entry covers. Default:
    /// false, because any client with the pool's token could fill the disk.
    pub allow_hub: bool,
}

/// The `[service]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ServiceConfig {
    /// Maximum number of simultaneous connections; fewer if the limit on open files or memory is too low. Default 256.
    pub max_connections: usize,
    /// Maximum bytes of a request's body. Default 65536.
    pub body_limit_bytes: usize,
    /// Milliseconds that a client may take to send a request's head. Default 10000.
    pub header_timeout_ms: u64,
    /// Milliseconds that a client may take to send the body after the head. Default 30000.
    pub body_timeout_ms: u64,
    /// Milliseconds that open requests may take to finish after SIGTERM. Default 2000.
    pub shutdown_grace_ms: u64,
    /// Host names that requests without a token may use, in addition to loopback names and the address listened on.
    pub allowed_hosts: Vec<String>,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            pool_id: short_host_name(),
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)),
            advertise_url: None,
            orchestrator_url: None,
            token_file: None,
            repo_path: None,
            heartbeat_interval_ms: 15_000,
            workers: WorkersConfig::default(),
            memory: MemoryConfig::default(),
            gpu: GpuConfig::default(),
            models: ModelsConfig::default(),
            service: ServiceConfig::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for WorkersConfig {
    fn default() -> Self {
        Self {
            port_min: 8001,
            port_max: 8999,
            start_timeout_s: 120,
            bind: Ipv4Addr::LOCALHOST.into(),
            stop_timeout_s: DEFAULT_STOP_GRACE_S,
            stall_timeout_s: 30,
            threads: None,
            keep_ended: 20,
            programs_dir: None,
        }
    }
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            nvml_library: None,
            poll_interval_ms: 2_000,
            deadline_ms: 2_000,
        }
    }
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            max_connections: 256,
            body_limit_bytes: 64 * 1024,
            header_timeout_ms: 10_000,
            body_timeout_ms: 30_000,
            shutdown_grace_ms: 2_000,
            allowed_hosts: Vec::new(),
        }
    }
}

/// The orchestrator that a pool reports to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orchestrator<'a> {
    /// The orchestrator of this host, at whichever address it listens.
    Local,
    /// The orchestrator at this URL.
    At(&'a str),
    /// No orchestrator.
    None,
}

/// The reason the pool's settings can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The settings can't be read.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A value is valid for its type but not for its key.
    #[error("{}`{key}`: {reason}", origin.as_ref().map(|origin| format!("{origin}: ")).unwrap_or_default())]
    Invalid {
        /// Place where the value was set, if known.
        origin: Option<String>,
        /// Key, with its section.
        key: &'static str,
        /// Requirement that the value violates.
        reason: String,
    },
}

impl ConfigError {
    /// Returns what to try next, if anything is known to help.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Settings(error) => error.hint(),
            Self::Invalid {
                key: "advertise_url",
                ..
            } => Some(
                "set it to the address at which the orchestrator reaches this pool, with `advertise_url = \"http://HOST:9200\"` \
                 or LLORCH_ADVERTISE_URL"
                    .to_owned(),
            ),
            Self::Invalid { .. } => None,
        }
    }
}

impl PoolConfig {
    /// Loads the settings: `LLORCH_*` variables override the file, which overrides the defaults. `explicit` is the file named
    /// by the user. Without it, `pool-managerd.toml` of the configuration folder is used, if it exists.
    pub fn load(home: &Home, explicit: Option<&Path>) -> Result<Self, ConfigError> {
        Self::load_with(home, explicit, &|name| std::env::var(name).ok())
    }

    /// Returns those of the variables `set` that no program of this project reads.
    pub fn unknown_variables(set: impl IntoIterator<Item = String>) -> Vec<UnknownVariable> {
        // The default settings always serialise to a tree of keys, as loading requires.
        let own = settings::variables::<Self>(&ALIASES).unwrap_or_default();
        settings::unknown_variables(set, &own, &ORCHESTRATOR_VARIABLES)
    }

    /// Loads the settings like [`PoolConfig::load`], with the environment passed in.
    pub fn load_with(
        home: &Home,
        explicit: Option<&Path>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        Self::load_traced(home, explicit, None, env).map(|loaded| loaded.value)
    }

    /// Loads the settings like [`PoolConfig::load_with`], along with the origin of each. `bind`, from the flag `--bind`,
    /// overrides all other origins.
    pub fn load_traced(
        home: &Home,
        explicit: Option<&Path>,
        bind: Option<SocketAddr>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Loaded<Self>, ConfigError> {
        let mut loaded: Loaded<Self> =
            settings::load_traced(explicit, &home.config_file(FILE_NAME), env, &ALIASES)?;
        if let Some(bind) = bind {
            loaded.value.bind = bind;
            loaded.origins.push(("bind".into(), Origin::Flag("--bind")));
        }
        match loaded.value.validate() {
            Ok(()) => {
                loaded.value.complete_addresses();
                Ok(loaded)
            }
            Err(ConfigError::Invalid { key, reason, .. }) => {
                let origin = loaded.origin(key);
                Err(ConfigError::Invalid {
                    origin: (origin != Origin::Default).then(|| origin.to_string()),
                    key,
                    reason,
                })
            }
            Err(other) => Err(other),
        }
    }

    /// Completes addresses to URLs, which other programs can parse.
    fn complete_addresses(&mut self) {
        for setting in [&mut self.advertise_url, &mut self.orchestrator_url] {
            if let Some(url) = setting.as_deref().and_then(|text| address::url(text).ok()) {
                *setting = Some(url);
            }
        }
    }

    /// Fails if an orchestrator on another host cannot find out how to reach the pool. Only a pool manager needs this check;
    /// commands that merely read settings do not.
    pub fn check_advertised(&self) -> Result<(), ConfigError> {
        let elsewhere = matches!(self.orchestrator(), Orchestrator::At(_));
        if self.advertise_url.is_some() || !elsewhere || !self.bind.ip().is_unspecified() {
            return Ok(());
        }
        Err(ConfigError::Invalid {
            origin: None,
            key: "advertise_url",
            reason: "is required because `bind` is a wildcard address".to_owned(),
        })
    }

    /// Rejects values that are valid for their type but not for their key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |key, reason: &str| {
            Err(ConfigError::Invalid {
                origin: None,
                key,
                reason: reason.to_owned(),
            })
        };
        let id_ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !(1..=64).contains(&self.pool_id.len())
            || !self.pool_id.chars().all(id_ok)
            || !self
                .pool_id
                .starts_with(|c: char| c.is_ascii_alphanumeric())
            || self.pool_id.contains("..")
        {
            return refuse(
                "pool_id",
                "must be 1 to 64 letters, digits, `.`, `_` or `-`, and begin with a letter or digit",
            );
        }
        let orchestrator_url = match self.orchestrator() {
            Orchestrator::At(url) => Some(url),
            Orchestrator::Local | Orchestrator::None => None,
        };
        for (key, url) in [
            ("advertise_url", self.advertise_url.as_deref()),
            ("orchestrator_url", orchestrator_url),
        ] {
            let fault = match url.map(address::url) {
                Some(Ok(url)) if !(url.starts_with("http://") || url.starts_with("https://")) => {
                    Some("it must begin with http:// or https://".to_owned())
                }
                Some(Err(fault)) => Some(fault),
                Some(Ok(_)) | None => None,
            };
            if let Some(fault) = fault {
                return refuse(key, &fault);
            }
        }
        if let Some((key, reason)) = self.log.fault() {
            return refuse(key, reason);
        }
        if !HEARTBEAT_INTERVAL_MS.contains(&self.heartbeat_interval_ms) {
            let (least, most) = HEARTBEAT_INTERVAL_MS.into_inner();
            return refuse(
                "heartbeat_interval_ms",
                &format!("must be {least} to {most}"),
            );
        }
        let WorkersConfig {
            port_min,
            port_max,
            start_timeout_s,
            stop_timeout_s,
            stall_timeout_s,
            ..
        } = self.workers;
        if port_min == 0 || port_min > port_max {
            return refuse(
                "workers.port_min",
                "must be at least 1 and at most `workers.port_max`",
            );
        }
        if self
            .workers
            .threads
            .is_some_and(|threads| threads.get() > MAX_THREADS)
        {
            return refuse("workers.threads", &format!("must be 1 to {MAX_THREADS}"));
        }
        if !(1..=86_400).contains(&start_timeout_s) {
            return refuse("workers.start_timeout_s", "must be 1 to 86400");
        }
        if stop_timeout_s > MAX_STOP_GRACE_S {
            let reason = format!("must be at most {MAX_STOP_GRACE_S}");
            return refuse("workers.stop_timeout_s", &reason);
        }
        if !(1..=86_400).contains(&stall_timeout_s) {
            return refuse("workers.stall_timeout_s", "must be 1 to 86400");
        }
        for (key, value, range) in [
            (
                "gpu.poll_interval_ms",
                self.gpu.poll_interval_ms,
                100..=600_000,
            ),
            ("gpu.deadline_ms", self.gpu.deadline_ms, 10..=60_000),
        ] {
            if !range.contains(&value) {
                let (least, most) = range.into_inner();
                return refuse(key, &format!("must be {least} to {most}"));
            }
        }
        let folders = self
            .models
            .allow_paths
            .iter()
            .map(|path| ("models.allow_paths", path));
        let folders = folders.chain(self.models.dir.iter().map(|path| ("models.dir", path)));
        let folders = folders.chain(self.repo_path.iter().map(|path| ("repo_path", path)));
        for (key, path) in folders.chain(
            self.workers
                .programs_dir
                .iter()
                .map(|path| ("workers.programs_dir", path))
                .chain(
                    self.gpu
                        .nvml_library
                        .iter()
                        .map(|path| ("gpu.nvml_library", path)),
                ),
        ) {
            if !path.is_absolute() {
                return refuse(key, "must be an absolute path");
            }
        }
        if self.service.max_connections == 0 {
            return refuse("service.max_connections", "must be at least 1");
        }
        Ok(())
    }

    /// Returns the orchestrator to report to.
    pub fn orchestrator(&self) -> Orchestrator<'_> {
        match self.orchestrator_url.as_deref() {
            None => Orchestrator::Local,
            Some("" | NO_ORCHESTRATOR) => Orchestrator::None,
            Some(url) => Orchestrator::At(url),
        }
    }

    /// Returns the models folder.
    pub fn models_dir(&self, home: &Home) -> PathBuf {
        self.models.dir.clone().unwrap_or_else(|| home.models_dir())
    }

    /// Returns the folders below which a `file:` reference may point.
    pub fn allow_paths(&self, home: &Home) -> Vec<PathBuf> {
        if self.models.allow_paths.is_empty() {
            vec![self.models_dir(home)]
        } else {
            self.models.allow_paths.clone()
        }
    }
}

impl WorkersConfig {
    /// Returns the time that a worker may take to load a model file of this size. A disk or network share slower than 100 MB/s
    /// counts as stuck.
    pub fn start_timeout(&self, file_bytes: u64) -> Duration {
        Duration::from_secs(self.start_timeout_s.max(file_bytes / 100_000_000))
    }

    /// Returns the shortest time limit for a worker without progress.
    pub fn stall_timeout(&self) -> Duration {
        Duration::from_secs(self.stall_timeout_s)
    }
}

/// Returns the host's name up to the first dot, with `-` in place of characters that a pool's name can't have.
fn short_host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let short: String = name
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') {
                c
            } else {
                '-'
            }
        })
        .take(64)
        .collect();
    let short = short.trim_start_matches(['-', '_']);
    if short.is_empty() {
        "pool".to_owned()
    } else {
        short.to_owned()
    }
}

#[cfg(test)]
mod tests;
