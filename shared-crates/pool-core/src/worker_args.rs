//! The worker's command line. One type builds it (in the pool) and parses it (in `llorch-candled`), so that the two
//! cannot drift apart.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ModelRef;
use crate::worker::{Backend, CacheType};

/// Environment variable with the secret without which a worker executes nothing.
pub const SECRET_VAR: &str = "LLORCH_WORKER_SECRET";
/// Environment variable with the number that tells one start of a worker from another.
pub const NONCE_VAR: &str = "LLORCH_WORKER_NONCE";

/// The most sequences that a worker may be asked to run at once.
pub const MAX_SLOTS: u32 = 64;

/// Exit code of a worker whose port was taken: the pool tries the next port.
pub const EXIT_PORT_TAKEN: i32 = 75;
/// Exit code of a worker that refuses its model file; the last log line that begins with `error: ` says why.
pub const EXIT_MODEL_INVALID: i32 = 65;

/// Seconds that what runs may take to finish once a worker is told to stop, where nothing else is said.
pub const DEFAULT_STOP_GRACE_S: u64 = 10;
/// How long readers have to fetch the last events once everything has ended.
pub const STOP_FLUSH: Duration = Duration::from_secs(2);
/// How long a worker has, beyond its grace and the flush, to notice that its time is up and be gone.
const STOP_MARGIN: Duration = Duration::from_secs(3);

/// Arguments of `llorch-candled`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct WorkerArgs {
    /// Id of this worker on its pool.
    #[cfg_attr(feature = "cli", arg(long))]
    pub worker_id: String,
    /// GGUF file to load.
    #[cfg_attr(feature = "cli", arg(long, value_name = "PATH"))]
    pub model: PathBuf,
    /// The model as users name it.
    #[cfg_attr(feature = "cli", arg(long))]
    pub model_ref: Option<ModelRef>,
    /// SHA-256 of the model file as the pool knows it, passed on in `/health`.
    #[cfg_attr(feature = "cli", arg(long, value_name = "HEX"))]
    pub sha256: Option<String>,
    /// Where to compute.
    #[cfg_attr(feature = "cli", arg(long, value_enum))]
    pub backend: Backend,
    /// GPU to use with `cuda` and `metal`.
    #[cfg_attr(feature = "cli", arg(long, default_value_t = 0))]
    pub gpu: u32,
    /// Address to listen on.
    #[cfg_attr(feature = "cli", arg(long, default_value = "127.0.0.1"))]
    pub bind: IpAddr,
    /// Port to listen on.
    #[cfg_attr(feature = "cli", arg(long))]
    pub port: u16,
    /// Address of the pool manager to tell when the model is loaded.
    #[cfg_attr(feature = "cli", arg(long, value_name = "URL"))]
    pub pool_url: Option<String>,
    /// Tokens of context [default: the smaller of the model's and 8192].
    #[cfg_attr(feature = "cli", arg(long, value_name = "TOKENS"))]
    pub context_length: Option<u32>,
    /// Tokens that all sequences together have room for [default: one sequence of the context's length].
    #[cfg_attr(feature = "cli", arg(long, value_name = "TOKENS"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
    /// Form of keys and values in the cache. `q8_0` takes about half the memory, and changes answers a little.
    #[cfg_attr(
        feature = "cli",
        arg(long, value_enum, value_name = "TYPE", default_value_t)
    )]
    #[serde(default, skip_serializing_if = "CacheType::is_default")]
    pub cache_type: CacheType,
    /// Sequences that run at once.
    #[cfg_attr(feature = "cli", arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SLOTS))))]
    pub slots: u32,
    /// Compute threads [default: one less than the host's processors].
    #[cfg_attr(feature = "cli", arg(long))]
    pub threads: Option<u32>,
    /// Seconds that a running execution may take to finish once the worker is told to stop.
    #[cfg_attr(feature = "cli", arg(long, value_name = "SECONDS", default_value_t = DEFAULT_STOP_GRACE_S))]
    #[serde(default = "default_stop_grace_s")]
    pub stop_grace_s: u64,
}

/// Of records that an earlier version wrote.
fn default_stop_grace_s() -> u64 {
    DEFAULT_STOP_GRACE_S
}

impl WorkerArgs {
    /// How long what runs may take to finish once the worker is told to stop.
    pub fn stop_grace(&self) -> Duration {
        Duration::from_secs(self.stop_grace_s)
    }

    /// How long after it was told to stop a worker is taken for stuck: what it was promised itself, and a margin.
    pub fn stop_timeout(&self) -> Duration {
        self.stop_grace() + STOP_FLUSH + STOP_MARGIN
    }

    /// The argument list that [`WorkerArgs`] parses back to the same value.
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
            // Programs of earlier builds know no other cache, and not the option.
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
