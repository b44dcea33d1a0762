//! The worker: one model on one device, serving jobs concurrently over HTTP.
//!
//! The worker binds its port, loads the model on a separate thread, and then notifies the pool. `engine` knows nothing of HTTP,
//! `executions` holds the events for readers, and `api` joins the two.

pub mod api;
pub mod backend;
pub mod chat_template;
pub mod compute;
pub mod engine;
pub mod executions;
pub mod metrics;
pub mod model;
pub mod panics;
mod ready;
pub mod status;
pub mod tokenizer;

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pool_core::WORKER_API_VERSION;
use pool_core::kit::secret::Secret;
use pool_core::kit::service::{BindError, Service, ServiceOptions, Shutdown};
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

/// Largest request body in bytes: a task of the largest size with the token ids to resume from, as JSON.
const BODY_LIMIT: usize = 16 << 20;
/// Interval between sweeps for expired buffers.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// The settings of a worker.
#[derive(Debug, Clone)]
pub struct Config {
    /// Command line, as built by the pool.
    pub args: WorkerArgs,
    /// Secret that every route but `/health` requires.
    pub secret: Secret,
    /// Value that distinguishes this start of the worker from others.
    pub nonce: String,
    /// Number of compute threads.
    pub threads: usize,
    /// True if tokens are guessed from the preceding text and verified together.
    pub speculates: bool,
    /// Lifetime of an execution's buffer after its end.
    pub execution_ttl: Duration,
    /// Bytes that all buffers together may take.
    pub buffer_bytes: usize,
}

/// A failure that ends the worker.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The environment contains no secret.
    #[error("{SECRET_VAR} is not set: without a secret, a worker would accept jobs from anyone")]
    NoSecret,
    /// The worker can't listen on its port.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The worker can't compute on the device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The worker can't use the model file.
    #[error("`{model}` can't be served")]
    Model {
        /// Path of the model file.
        model: String,
        /// Reason why the file can't be served.
        source: Box<LoadError>,
    },
    /// The system refused a resource.
    #[error("could not start")]
    System(#[from] std::io::Error),
    /// The metrics can't be registered.
    #[error("could not set up metrics")]
    Metrics(#[from] prometheus::Error),
    /// The compute thread ended without an outcome.
    #[error("the compute thread ended unexpectedly")]
    ComputeGone,
}

impl RunError {
    /// Returns the exit code, which tells the pool the kind of failure.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NoSecret => 2,
            Self::Model { source, .. } if source.is_usage() => 2,
            // A system error may be temporary, but the orchestrator never retries a refused file.
            Self::Model { source, .. } if source.is_io() => 1,
            Self::Bind(BindError::InUse { .. }) => EXIT_PORT_TAKEN,
            Self::Model { .. } => EXIT_MODEL_INVALID,
            _ => 1,
        }
    }

    /// Returns what to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoSecret => Some("start workers with `llorch-pool worker spawn`, which sets it"),
            Self::Bind(error) => error.hint(),
            Self::Model { source, .. } => source.hint(),
            _ => None,
        }
    }
}

/// Returns the secret and the nonce that the pool passes in the environment. A missing nonce is empty.
pub fn secret_and_nonce() -> Result<(Secret, String), RunError> {
    let secret = std::env::var(SECRET_VAR)
        .ok()
        .filter(|secret| !secret.is_empty())
        .ok_or(RunError::NoSecret)?;
    Ok((
        Secret::new(secret),
        std::env::var(NONCE_VAR).unwrap_or_default(),
    ))
}

/// Runs a worker until `shutdown`. Calls `listening` with the bound address, which is not known earlier if the port is 0.
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
        // Every request counts as control traffic: only the fleet has the secret, and other callers are refused after their
        // request head.
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
        // The server has already reported a panic of its own.
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
    let notify = async {
        if let Some(pool_url) = &args.pool_url {
            ready::report(pool_url, secret, health).await;
        }
        std::future::pending::<()>().await;
    };
    let sweep = async {
        let mut every = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            every.tick().await;
            executions.sweep();
        }
    };
    tokio::select! {
        () = shutdown.requested() => {}
        () = notify => {}
        () = sweep => {}
    }
    // The port stays open while jobs drain, so that readers that lost their connection can return for the end.
    executions.drain(args.stop_grace()).await;
    Ok(())
}
