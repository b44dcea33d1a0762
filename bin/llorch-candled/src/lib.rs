//! The worker: one model on one device, answering jobs side by side over HTTP.
//!
//! It binds its port, then loads the model on a thread of its own, then tells the pool. The `engine` knows nothing of
//! HTTP; `executions` holds what readers see; `api` joins the two.

pub mod api;
pub mod backend;
pub mod chat_template;
pub mod compute;
pub mod engine;
pub mod executions;
pub mod metrics;
pub mod panics;
mod ready;
pub mod status;
pub mod tokenizer;

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pool_core::WORKER_API_VERSION;
use pool_core::secret::Secret;
use pool_core::service::{BindError, Service, ServiceOptions, Shutdown};
use pool_core::worker_args::{
    EXIT_MODEL_INVALID, EXIT_PORT_TAKEN, NONCE_VAR, SECRET_VAR, STOP_FLUSH, WorkerArgs,
};
use tokio::sync::oneshot;

use backend::BackendError;
use compute::Compute;
use engine::{LoadError, Sizes};
use executions::{Executions, Limits};
use metrics::Metrics;
use status::Status;

/// A task of the largest size with the ids to resume from, as JSON.
const BODY_LIMIT: usize = 16 << 20;
/// How often buffers that have outlived their time are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// What a worker is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// The command line that the pool builds.
    pub args: WorkerArgs,
    /// The secret that opens its routes.
    pub secret: Secret,
    /// Tells this start of the worker from others.
    pub nonce: String,
    /// Number of threads that compute.
    pub threads: usize,
    /// True if tokens are guessed from the text before and checked together.
    pub speculates: bool,
    /// How long an execution's buffer lives after its end.
    pub execution_ttl: Duration,
    /// Bytes of all buffers together.
    pub buffer_bytes: usize,
}

/// Why a worker ends badly.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The secret is missing.
    #[error("{SECRET_VAR} is not set: without a secret a worker would execute for anybody")]
    NoSecret,
    /// It can't listen.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// It can't compute on the device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// It can't use the model.
    #[error("`{model}` can't be served")]
    Model {
        /// The file.
        model: String,
        /// What is wrong with it.
        source: Box<LoadError>,
    },
    /// The system refuses what it needs.
    #[error("could not start")]
    System(#[from] std::io::Error),
    /// Its figures can't be set up.
    #[error("could not set up metrics")]
    Metrics(#[from] prometheus::Error),
    /// The compute thread is gone.
    #[error("the compute thread ended")]
    ComputeGone,
}

impl RunError {
    /// The exit code that tells the pool what happened.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NoSecret => 2,
            Self::Model { source, .. } if source.is_usage() => 2,
            // The system's trouble may pass, and the orchestrator gives a refused file no second chance.
            Self::Model { source, .. } if source.is_io() => 1,
            Self::Bind(BindError::InUse { .. }) => EXIT_PORT_TAKEN,
            Self::Model { .. } => EXIT_MODEL_INVALID,
            _ => 1,
        }
    }

    /// What to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoSecret => {
                Some("start workers with `llorch-pool worker spawn`, which makes one")
            }
            Self::Bind(error) => error.hint(),
            Self::Model { source, .. } => source.hint(),
            _ => None,
        }
    }
}

/// The secret and the nonce that the pool hands over in the environment.
pub fn handed_over() -> Result<(Secret, String), RunError> {
    let secret = std::env::var(SECRET_VAR)
        .ok()
        .filter(|secret| !secret.is_empty())
        .ok_or(RunError::NoSecret)?;
    Ok((
        Secret::new(secret),
        std::env::var(NONCE_VAR).unwrap_or_default(),
    ))
}

/// Runs a worker until `shutdown`. `listening` hears its address, which port 0 leaves open until then.
pub async fn run(
    config: Config,
    shutdown: Shutdown,
    listening: impl FnOnce(SocketAddr),
) -> Result<(), RunError> {
    let Config {
        args,
        secret,
        nonce,
        threads,
        speculates,
        execution_ttl,
        buffer_bytes,
    } = config;
    let options = ServiceOptions {
        token: Some(secret.clone()),
        open_paths: vec!["/health"],
        body_limit: BODY_LIMIT,
        // Only the fleet has the secret; a caller without the secret is refused as soon as its head is read.
        is_control: |_, _| true,
        is_stream: |_, _, _| false,
        ..ServiceOptions::new(
            "llorch-candled",
            env!("CARGO_PKG_VERSION"),
            WORKER_API_VERSION,
        )
    };
    let service = Service::bind(SocketAddr::new(args.bind, args.port), options).await?;
    let device = backend::Device::of(args.backend, threads)?;
    let (submit, queue) = mpsc::channel();
    let limits = Limits {
        slots: args.slots as usize,
        ttl: execution_ttl,
        buffer_bytes,
    };
    let executions = Arc::new(Executions::new(limits, submit));
    let status = Arc::new(Status::new(args.clone(), nonce));
    let metrics = Arc::new(Metrics::new(service.load())?);
    let (loaded_sender, loaded) = oneshot::channel();
    let compute = Compute {
        model: args.model.clone(),
        sha256: args.sha256.clone(),
        device,
        sizes: Sizes {
            context_length: args.context_length.map(|tokens| tokens as usize),
            cache_tokens: args.cache_tokens.map(|tokens| tokens as usize),
            cache_type: args.cache_type,
            slots: limits.slots,
        },
        speculates,
        status: Arc::clone(&status),
        executions: Arc::clone(&executions),
        metrics: Arc::clone(&metrics),
    };
    tracing::info!(worker_id = args.worker_id, addr = %service.local_addr(), "listening, loading the model");
    listening(service.local_addr());
    compute.start(queue, loaded_sender)?;

    let app = api::App {
        status: Arc::clone(&status),
        executions: Arc::clone(&executions),
        metrics,
        shutdown: shutdown.clone(),
    };
    let closing = Shutdown::manual();
    let server = tokio::spawn(service.serve(api::router(app), closing.clone(), STOP_FLUSH));
    let outcome = serve(&args, secret, &status, &executions, &shutdown, loaded).await;
    closing.trigger();
    if outcome.is_ok() {
        // A panic in the server has been reported already.
        let _ = server.await;
    }
    outcome
}

async fn serve(
    args: &WorkerArgs,
    secret: Secret,
    status: &Status,
    executions: &Executions,
    shutdown: &Shutdown,
    loaded: oneshot::Receiver<Result<(), LoadError>>,
) -> Result<(), RunError> {
    tokio::select! {
        () = shutdown.requested() => return Ok(()),
        outcome = loaded => match outcome {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(RunError::Model { model: args.model.display().to_string(), source: Box::new(source) }),
            Err(_) => return Err(RunError::ComputeGone),
        },
    }
    let health = status.health(0);
    tracing::info!(
        context_length = health.context_length,
        measured_bytes = health.measured_bytes,
        "the model is loaded"
    );
    let told = async {
        if let Some(pool_url) = &args.pool_url {
            ready::report(pool_url, secret, health).await;
        }
        std::future::pending::<()>().await;
    };
    let swept = async {
        let mut every = tokio::time::interval(SWEEP);
        loop {
            every.tick().await;
            executions.sweep();
        }
    };
    tokio::select! {
        () = shutdown.requested() => {}
        () = told => {}
        () = swept => {}
    }
    // The port stays open meanwhile: readers that lost their connection can come back for the end.
    executions.drain(args.stop_grace()).await;
    Ok(())
}
