//! The worker's command line. One type builds it (in the pool) and parses it (in `llorch-candled`), so that the two cannot
//! diverge.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ModelRef;
use crate::worker::{Backend, CacheType};

/// Environment variable with the bearer token that the worker requires.
pub const SECRET_VAR: &str = "LLORCH_WORKER_SECRET";
/// Environment variable with the nonce, which distinguishes one start of a worker from another.
pub const NONCE_VAR: &str = "LLORCH_WORKER_NONCE";

/// Maximum number of sequences that a worker can run at once.
pub const MAX_SLOTS: u32 = 64;

/// Maximum number of compute threads of a worker: more than any host has processors.
pub const MAX_THREADS: u32 = 1024;

/// Exit code of a worker whose port was taken, after which the pool tries the next port.
pub const EXIT_PORT_TAKEN: i32 = 75;
/// Exit code of a worker that rejects its model file; the last log line that begins with `error: ` has the reason.
pub const EXIT_MODEL_INVALID: i32 = 65;

/// Default number of seconds that running jobs may take to finish once a worker is asked to stop.
pub const DEFAULT_STOP_GRACE_S: u64 = 10;
/// Maximum of that number: a day.
pub const MAX_STOP_GRACE_S: u64 = 86_400;
/// Time that readers have to fetch the last events once everything has ended.
pub const STOP_FLUSH: Duration = Duration::from_secs(2);
/// Time that a worker has, beyond the grace period and the flush, to exit.
const STOP_MARGIN: Duration = Duration::from_secs(3);

/// Command-line arguments of `llorch-candled`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct WorkerArgs {
    /// Id of this worker on its pool.
    #[cfg_attr(feature = "cli", arg(long))]
    pub worker_id: String,
    /// GGUF file to load.
    #[cfg_attr(feature = "cli", arg(long, value_name = "PATH"))]
    pub model: PathBuf,
    /// Reference that users name the model by.
    #[cfg_attr(feature = "cli", arg(long))]
    pub model_ref: Option<ModelRef>,
    /// SHA-256 of the model file as known to the pool, repeated in `/health`.
    #[cfg_attr(feature = "cli", arg(long, value_name = "HEX"))]
    pub sha256: Option<String>,
    /// Backend to compute on.
    #[cfg_attr(feature = "cli", arg(long, value_enum))]
    pub backend: Backend,
    /// Number of the GPU for `cuda` and `metal`.
    #[cfg_attr(feature = "cli", arg(long, default_value_t = 0))]
    pub gpu: u32,
    /// Address to listen on.
    #[cfg_attr(feature = "cli", arg(long, default_value = "127.0.0.1"))]
    pub bind: IpAddr,
    /// Port to listen on.
    #[cfg_attr(feature = "cli", arg(long))]
    pub port: u16,
    /// URL of the pool manager to notify when the model is loaded.
    #[cfg_attr(feature = "cli", arg(long, value_name = "URL"))]
    pub pool_url: Option<String>,
    /// Tokens of context per sequence [default: the model's context, at most 8192].
    #[cfg_attr(feature = "cli", arg(long, value_name = "TOKENS"))]
    pub context_length: Option<u32>,
    /// Tokens of cache that all sequences share; at least one sequence of full context, which is the default.
    #[cfg_attr(feature = "cli", arg(long, value_name = "TOKENS"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
    /// Element type of the KV cache. `q8_0` takes about half the memory and changes answers slightly.
    #[cfg_attr(
        feature = "cli",
        arg(long, value_enum, value_name = "TYPE", default_value_t)
    )]
    #[serde(default, skip_serializing_if = "CacheType::is_default")]
    pub cache_type: CacheType,
    /// Maximum number of sequences that run at once.
    #[cfg_attr(feature = "cli", arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SLOTS))))]
    pub slots: u32,
    /// Compute threads [default: one less than the host's processors].
    #[cfg_attr(feature = "cli", arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_THREADS))))]
    pub threads: Option<u32>,
    /// Seconds that running jobs may take to finish once the worker is asked to stop.
    #[cfg_attr(feature = "cli", arg(long, value_name = "SECONDS", default_value_t = DEFAULT_STOP_GRACE_S, value_parser = clap::value_parser!(u64).range(..=MAX_STOP_GRACE_S)))]
    #[serde(default = "default_stop_grace_s")]
    pub stop_grace_s: u64,
}

/// Returns the value for records of an earlier version, which lack the field.
fn default_stop_grace_s() -> u64 {
    DEFAULT_STOP_GRACE_S
}

impl WorkerArgs {
    /// Returns the time that running jobs may take to finish once the worker is asked to stop.
    pub fn stop_grace(&self) -> Duration {
        Duration::from_secs(self.stop_grace_s)
    }

    /// Returns the time after a stop request at which a worker counts as stuck: its own grace period and flush, and a margin.
    pub fn stop_timeout(&self) -> Duration {
        self.stop_grace() + STOP_FLUSH + STOP_MARGIN
    }

    /// Returns the argument list, which [`WorkerArgs`] parses back to the same value.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut push = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
        push("--worker-id", self.worker_id.clone().into());
        push("--model", self.model.clone().into());
        push("--backend", self.backend.as_str().into());
        push("--gpu", self.gpu.to_string().into());
        push("--bind", self.bind.to_string().into());
        push("--port", self.port.to_string().into());
        push("--slots", self.slots.to_string().into());
        push("--stop-grace-s", self.stop_grace_s.to_string().into());
        let optional = [
            (
                "--model-ref",
                self.model_ref.as_ref().map(ToString::to_string),
            ),
            ("--sha256", self.sha256.clone()),
            ("--pool-url", self.pool_url.clone()),
            (
                "--context-length",
                self.context_length.map(|n| n.to_string()),
            ),
            ("--cache-tokens", self.cache_tokens.map(|n| n.to_string())),
            // Programs of earlier builds support only the default cache, and do not know the option.
            (
                "--cache-type",
                (!self.cache_type.is_default()).then(|| self.cache_type.to_string()),
            ),
            ("--threads", self.threads.map(|n| n.to_string())),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                push(name, value.into());
            }
        }
        args
    }
}

#[cfg(all(test, feature = "cli"))]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        args: WorkerArgs,
    }

    // [POOLCORE-005]
    #[test]
    fn what_is_built_is_what_is_parsed() {
        let full = WorkerArgs {
            worker_id: "worker-cpu-0".into(),
            model: "/models/with space/a.gguf".into(),
            model_ref: Some("smollm2-135m".parse().unwrap()),
            sha256: Some("ab".repeat(32)),
            backend: Backend::Cpu,
            gpu: 0,
            bind: "::1".parse().unwrap(),
            port: 8001,
            pool_url: Some("http://127.0.0.1:9200".into()),
            context_length: Some(2048),
            cache_tokens: Some(8192),
            cache_type: CacheType::Q8_0,
            slots: 2,
            threads: Some(4),
            stop_grace_s: 30,
        };
        let bare = WorkerArgs {
            model_ref: None,
            sha256: None,
            pool_url: None,
            context_length: None,
            cache_tokens: None,
            cache_type: CacheType::F16,
            threads: None,
            ..full.clone()
        };
        for args in [full, bare] {
            let parsed = Program::try_parse_from(
                [OsString::from("llorch-candled")]
                    .into_iter()
                    .chain(args.to_args()),
            );
            assert_eq!(parsed.map(|p| p.args).map_err(|e| e.to_string()), Ok(args));
        }
    }
}
