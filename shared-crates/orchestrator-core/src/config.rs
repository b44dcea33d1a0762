//! Configuration of `orchestratord`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use pool_core::config::PoolConfig;
use pool_core::kit::home::Home;
use pool_core::kit::log_config::LogConfig;
use pool_core::kit::settings::{self, Loaded, SettingsError, UnknownVariable};
use serde::{Deserialize, Serialize};

use crate::queue::{Capacity, JobQueue, QueueOrder};
use crate::scheduler::{BuiltIn, Settings};

/// Name of the settings file in the configuration folder.
pub const FILE_NAME: &str = "orchestratord.toml";
/// Additional environment variables, as pairs of variable and key. Every key also has a variable of its own.
pub const ALIASES: [(&str, &str); 1] = [("LLORCH_ORCHESTRATOR_BIND", "bind")];

/// `orchestratord.toml`. Flags override `LLORCH_*` variables, variables override the file, and the file overrides these
/// defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct OrchestratorConfig {
    /// Address to listen on. Default `127.0.0.1:8080`; port 0 takes a free one. Any address other than loopback requires a
    /// token.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    #[serde(deserialize_with = "pool_core::kit::address::deserialize_bind")]
    pub bind: SocketAddr,
    /// File with the token of clients and operators, mode 0600; `LLORCH_API_TOKEN` takes precedence. Default: none.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub token_file: Option<PathBuf>,
    /// File with the token of the pools, mode 0600; `LLORCH_POOL_TOKEN` takes precedence. Default: none.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub pool_token_file: Option<PathBuf>,
    /// Recovery window in milliseconds: for this long after a start, and after the last of all pools fell silent, no attempt is
    /// given up because its pool is silent. Default 20000, a little more than the default interval of the pools' heartbeats;
    /// raise it along with that interval.
    pub recovery_window_ms: u64,
    /// Most registered pools, silent ones included. Further pools get 429; a registered pool never does. Default 1000, the size
    /// that the scheduler is designed for.
    pub max_pools: u32,
    /// Jobs among which a worker computes a common prompt prefix only once: `all`, or those of one `session`. With `all`, the
    /// time to a job's first token reveals to its submitter whether another submitter's prompt had the same prefix: choose
    /// `session` if submitters don't trust each other. Default `all`.
    pub prefix_sharing: PrefixSharing,
    /// The queue of waiting jobs.
    pub queue: QueueConfig,
    /// Retention of finished jobs.
    pub store: StoreConfig,
    /// Scheduling policy and its limits.
    pub scheduler: SchedulerConfig,
    /// Limits of the HTTP server.
    pub service: ServiceConfig,
    /// Settings of the daemon's log.
    pub log: LogConfig,
}

impl Default for OrchestratorConfig {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 8080)),
            token_file: None,
            pool_token_file: None,
            recovery_window_ms: 20_000,
            max_pools: 1000,
            prefix_sharing: PrefixSharing::All,
            queue: QueueConfig::default(),
            store: StoreConfig::default(),
            scheduler: SchedulerConfig::default(),
            service: ServiceConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// Scope within which jobs share the computation of a common prompt prefix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum PrefixSharing {
    /// All jobs.
    #[default]
    All,
    /// Jobs of one session. A job without a session shares nothing.
    Session,
}

/// The `[queue]` section: order and limits of the queue of waiting jobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// Most waiting jobs; further submits get 429. Default 10000; -1 is unbounded. Jobs that nothing can run at present
    /// (no pool that takes work has both the model and a device that it fits on) are counted separately: a tenth as
    /// many may wait in addition, at least one. Jobs that were runnable on arrival may exceed that share after their
    /// pool has gone.
    pub capacity: i64,
    /// Most bytes that the requests of waiting jobs take together; further submits get 429. Default 268435456 (256 MiB);
    /// -1 is unbounded. Jobs that nothing can run at present may take an additional tenth.
    pub capacity_bytes: i64,
    /// Order in which waiting jobs get a place. `fair` (default): interactive jobs before batch jobs, and the sessions of
    /// each class by turns. `fifo`: in the order of their arrival.
    pub order: QueueOrder,
    /// Seconds after which a waiting batch job counts as interactive. Default 300. Has no effect with the order `fifo`.
    pub promote_after_s: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            capacity: 10_000,
            capacity_bytes: 256 << 20,
            order: QueueOrder::Fair,
            promote_after_s: 300,
        }
    }
}

impl QueueConfig {
    /// Returns the limits of the queue; -1 becomes `None`.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            jobs: usize::try_from(self.capacity).ok(),
            bytes: u64::try_from(self.capacity_bytes).ok(),
        }
    }

    /// Returns an empty queue with this order and these limits.
    pub fn queue(&self) -> Box<dyn JobQueue> {
        let promote_after = i64::try_from(self.promote_after_s).unwrap_or(i64::MAX);
        let promote_after = SignedDuration::from_secs(promote_after);
        self.order.queue(self.capacity(), promote_after)
    }
}

/// The `[store]` section: retention of finished jobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Seconds for which the prompt, the text and the events of a job are kept after its end. Default 604800 (7 days); 0 keeps
    /// them forever.
    pub retention_s: u64,
    /// Seconds for which the rest of a job is kept after its end: its state, times, figures and idempotency key. Default
    /// 7776000 (90 days), at least 86400 (a day), and never shorter than `retention_s`; 0 keeps it forever.
    pub history_s: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            retention_s: 7 * DAY_S,
            history_s: 90 * DAY_S,
        }
    }
}

/// The `[scheduler]` section: scheduling policy and its limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerConfig {
    /// Rule that picks among several possible places for a job or a new worker: `least-loaded`, `most-vram-free` or
    /// `round-robin`. Default `least-loaded`.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub policy: BuiltIn,
    /// Seconds after which an idle worker is stopped. Default 600; 0 never stops a worker for being idle.
    pub idle_ttl_s: u64,
    /// True if idle workers are stopped when a waiting job needs their memory. Default true.
    pub evict: bool,
    /// Longest residence, in seconds after it became ready, of an idle worker that waiting jobs could use, while other
    /// jobs need its memory. Default 60. Within this bound a worker stays for three times its load time: two models
    /// that don't fit in memory together take turns of that length, instead of reloading endlessly. An idle worker that
    /// no waiting job could use is stopped at once.
    pub min_residence_s: u64,
    /// True if pools are asked to download a catalogue model that none of them has. Default false.
    pub download: bool,
    /// A Rhai script that decides in place of the built-in policy. Reloaded when the file changes. Default: none.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub script: Option<PathBuf>,
    /// Milliseconds that the script may take for a pass, 1 to 1000. After that the built-in policy decides. Default 50.
    pub script_limit_ms: u64,
    /// Cost of hosts by pool, for scripts: `costs = { gpu-box = 3.0 }`. A pool without an entry costs 1.
    pub costs: HostCosts,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            policy: BuiltIn::default(),
            idle_ttl_s: 600,
            evict: true,
            min_residence_s: 60,
            download: false,
            script: None,
            script_limit_ms: 50,
            costs: HostCosts::default(),
        }
    }
}

const DAY_S: u64 = 24 * 3600;

impl StoreConfig {
    /// Returns the time for which prompts, texts and events are kept after a job's end. `None` is forever.
    pub fn retention(&self) -> Option<SignedDuration> {
        seconds(self.retention_s)
    }

    /// Returns the time for which the rest of a job is kept after its end, at least as long as its texts. `None` is forever.
    pub fn history(&self) -> Option<SignedDuration> {
        seconds(self.history_s).map(|history| history.max(self.retention().unwrap_or_default()))
    }
}

/// Returns `None` for 0, which stands for no limit.
fn seconds(seconds: u64) -> Option<SignedDuration> {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    (seconds > 0).then(|| SignedDuration::from_secs(seconds))
}

impl SchedulerConfig {
    /// Returns the scheduler's view of these settings.
    pub fn settings(&self) -> Settings {
        let seconds = |s: u64| {
            SignedDuration::from_secs(i64::try_from(s).unwrap_or(i64::MAX).min(MOST_SECONDS))
        };
        Settings {
            idle_ttl: (self.idle_ttl_s > 0).then(|| seconds(self.idle_ttl_s)),
            evict: self.evict,
            min_residence: seconds(self.min_residence_s),
            download: self.download,
        }
    }
}

/// A hundred years. Longer settings are cut to this, so that adding them to a timestamp stays in range.
const MOST_SECONDS: i64 = 100 * 366 * 24 * 3600;

impl SchedulerConfig {
    /// Returns the time that the script may take for a pass.
    pub fn script_limit(&self) -> Duration {
        Duration::from_millis(self.script_limit_ms)
    }
}

/// Cost of each host, by the name of its pool. `validate` ensures that costs are finite and not negative.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(transparent)]
pub struct HostCosts(pub BTreeMap<String, f64>);

/// Holds because `validate` refuses NaN, the only value that differs from itself.
impl Eq for HostCosts {}

/// The `[service]` section: limits of the HTTP server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ServiceConfig {
    /// Most connections at once; fewer if the limit on open files or memory is too low. Further connections are
    /// answered with 503 and closed, unless they send a request of the control path. Default 1024.
    pub max_connections: usize,
    /// Seconds that the headers of a request may take, and that a kept-alive connection may stay idle. Default 10.
    pub header_timeout_s: u64,
    /// Seconds that the body of a request may take, from the end of its headers; a later one gets 408. Default 30.
    pub body_timeout_s: u64,
    /// Most bytes that the headers of a request may have, 8192 to 1048576; larger ones get 431. Default 65536.
    pub header_limit_bytes: usize,
    /// Most bytes that the body of a request may have, 1024 to 67108864; a larger one gets 413. Default 4194304.
    pub body_limit_bytes: usize,
    /// Seconds after which a silent event stream sends a comment as a sign of life. Default 15.
    pub keep_alive_s: u64,
    /// Seconds that open connections have to finish after SIGTERM. Default 5.
    pub stop_timeout_s: u64,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            header_timeout_s: 10,
            body_timeout_s: 30,
            header_limit_bytes: 64 << 10,
            body_limit_bytes: 4 << 20,
            keep_alive_s: 15,
            stop_timeout_s: 5,
        }
    }
}

impl ServiceConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let figure = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        for (key, value, least, most) in [
            ("header_timeout_s", self.header_timeout_s, 1, 3600),
            ("body_timeout_s", self.body_timeout_s, 1, 3600),
            ("keep_alive_s", self.keep_alive_s, 1, 3600),
            // A lower limit would refuse plain requests; a higher one would let a few clients fill the memory.
            (
                "header_limit_bytes",
                figure(self.header_limit_bytes),
                8 << 10,
                1 << 20,
            ),
            (
                "body_limit_bytes",
                figure(self.body_limit_bytes),
                1 << 10,
                64 << 20,
            ),
        ] {
            if !(least..=most).contains(&value) {
                return Err(ConfigError::Service {
                    key,
                    value,
                    least,
                    most,
                });
            }
        }
        Ok(())
    }
}

/// Error in the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or variable can't be read.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// `queue.capacity` is neither -1 nor positive.
    #[error("`queue.capacity` is {0}: use 1 or more, or -1 for an unbounded queue")]
    Capacity(i64),
    /// `store.history_s` is below a day.
    #[error(
        "`store.history_s` is {0}: idempotency keys must be kept for a day, so use 86400 or more, or 0 for ever"
    )]
    History(u64),
    /// `queue.capacity_bytes` is neither -1 nor positive.
    #[error("`queue.capacity_bytes` is {0}: use 1 or more, or -1 for any number of bytes")]
    CapacityBytes(i64),
    /// `scheduler.script_limit_ms` is out of range.
    #[error("`scheduler.script_limit_ms` is {0}: use 1 to 1000")]
    ScriptLimit(u64),
    /// `max_pools` is 0.
    #[error("`max_pools` is 0: no pool could register")]
    MaxPools,
    /// A cost is negative, infinite or not a number.
    #[error("`scheduler.costs` is {cost} for `{pool}`: use a finite number, 0 or more")]
    Cost {
        /// Name of the pool.
        pool: String,
        /// Rejected value.
        cost: f64,
    },
    /// `service.max_connections` is 0.
    #[error("`service.max_connections` is 0: no client could connect")]
    MaxConnections,
    /// A setting of the log has an invalid value.
    #[error("`{key}` {reason}")]
    Log {
        /// Dotted key of the setting.
        key: &'static str,
        /// Problem with its value, as part of a sentence.
        reason: &'static str,
    },
    /// A limit of the HTTP server is outside its range.
    #[error("`service.{key}` is {value}: use {least} to {most}")]
    Service {
        /// Key within `[service]`.
        key: &'static str,
        /// Rejected value.
        value: u64,
        /// Lowest value allowed.
        least: u64,
        /// Highest value allowed.
        most: u64,
    },
}

impl ConfigError {
    /// Returns a remedy, if there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Settings(error) => error.hint(),
            _ => None,
        }
    }
}

impl OrchestratorConfig {
    /// Loads `explicit`, or else `orchestratord.toml` of the configuration folder if it exists. Environment variables override
    /// both.
    pub fn load(home: &Home, explicit: Option<&Path>) -> Result<Self, ConfigError> {
        Self::load_traced(home, explicit).map(|loaded| loaded.value)
    }

    /// Loads as [`OrchestratorConfig::load`] does, and also returns the origin of each setting.
    pub fn load_traced(home: &Home, explicit: Option<&Path>) -> Result<Loaded<Self>, ConfigError> {
        let environment = |name: &str| std::env::var(name).ok();
        let own = home.config_file(FILE_NAME);
        let loaded: Loaded<Self> = settings::load_traced(explicit, &own, &environment, &ALIASES)?;
        loaded.value.validate()?;
        Ok(loaded)
    }

    /// Returns the variables of `set` that set nothing, neither here nor in a pool manager on the same host.
    pub fn unknown_variables(set: impl IntoIterator<Item = String>) -> Vec<UnknownVariable> {
        // The fallback is never used: default settings always form a tree of keys.
        let own = settings::variables::<Self>(&ALIASES).unwrap_or_default();
        let pools =
            settings::variables::<PoolConfig>(&pool_core::config::ALIASES).unwrap_or_default();
        let pools: Vec<&str> = pools.iter().map(String::as_str).collect();
        settings::unknown_variables(set, &own, &pools)
    }

    /// Returns the time for which silence does not count as a loss, because our own downtime may have caused it.
    pub fn recovery_window(&self) -> SignedDuration {
        SignedDuration::from_millis(i64::try_from(self.recovery_window_ms).unwrap_or(i64::MAX))
    }

    /// Rejects values that parse but make no sense.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.queue.capacity < -1 || self.queue.capacity == 0 {
            return Err(ConfigError::Capacity(self.queue.capacity));
        }
        if (1..DAY_S).contains(&self.store.history_s) {
            return Err(ConfigError::History(self.store.history_s));
        }
        if self.queue.capacity_bytes < -1 || self.queue.capacity_bytes == 0 {
            return Err(ConfigError::CapacityBytes(self.queue.capacity_bytes));
        }
        if !(1..=1000).contains(&self.scheduler.script_limit_ms) {
            return Err(ConfigError::ScriptLimit(self.scheduler.script_limit_ms));
        }
        let unfit = |cost: f64| !cost.is_finite() || cost < 0.0;
        let costs = &self.scheduler.costs.0;
        if let Some((pool, &cost)) = costs.iter().find(|(_, cost)| unfit(**cost)) {
            let pool = pool.clone();
            return Err(ConfigError::Cost { pool, cost });
        }
        if let Some((key, reason)) = self.log.fault() {
            return Err(ConfigError::Log { key, reason });
        }
        if self.max_pools == 0 {
            return Err(ConfigError::MaxPools);
        }
        if self.service.max_connections == 0 {
            return Err(ConfigError::MaxConnections);
        }
        self.service.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [ORCHCORE-160]
    fn bounds_of_the_server_are_checked_and_named() {
        let with = |change: fn(&mut ServiceConfig)| {
            let mut config = OrchestratorConfig::default();
            change(&mut config.service);
            config.validate().map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| {}), Ok(()));
        let told = with(|service| service.header_limit_bytes = 100).unwrap_err();
        assert_eq!(
            told,
            "`service.header_limit_bytes` is 100: use 8192 to 1048576"
        );
        let wrong: [fn(&mut ServiceConfig); 5] = [
            |service| service.header_timeout_s = 0,
            |service| service.body_timeout_s = 0,
            |service| service.keep_alive_s = 3601,
            |service| service.body_limit_bytes = usize::MAX,
            |service| service.max_connections = 0,
        ];
        for change in wrong {
            assert!(with(change).is_err());
        }
        let no_pools = OrchestratorConfig {
            max_pools: 0,
            ..OrchestratorConfig::default()
        };
        assert!(no_pools.validate().is_err());
    }

    #[test] // [POOLCORE-047]
    fn a_pool_on_the_same_host_knows_every_variable_of_an_orchestrator_and_the_other_way_round() {
        let own = settings::variables::<OrchestratorConfig>(&ALIASES).expect("a tree of keys");
        assert!(own.contains(&"LLORCH_QUEUE_CAPACITY".to_owned()), "{own:?}");
        let told = PoolConfig::unknown_variables(own);
        assert!(
            told.is_empty(),
            "pool_core::config::ORCHESTRATOR_VARIABLES lacks these: {told:?}"
        );
        let pools = settings::variables::<PoolConfig>(&pool_core::config::ALIASES);
        let told = OrchestratorConfig::unknown_variables(pools.expect("a tree of keys"));
        assert!(told.is_empty(), "{told:?}");

        let told = OrchestratorConfig::unknown_variables(["LLORCH_QUEUE_CAPACTIY".to_owned()]);
        assert_eq!(
            told[0].to_string(),
            "unknown variable LLORCH_QUEUE_CAPACTIY: did you mean LLORCH_QUEUE_CAPACITY?"
        );
    }
}
