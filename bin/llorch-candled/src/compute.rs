//! The compute thread: loads the model, then runs one execution after the other. Nothing here ever runs on the async
//! runtime, so `/health` answers however busy the processors are.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use pool_core::api::worker::{
    ExecuteRequest, WorkerEnd, WorkerError, WorkerErrorCode, WorkerEvent,
};
use pool_core::crash::crash_point;
use tokio::sync::oneshot;

use crate::backend::Device;
use crate::backend::cpu::host::private_bytes;
use crate::engine::{Control, Engine, Failure, Halted, LoadError};
use crate::executions::{Execution, Executions};
use crate::metrics::Metrics;
use crate::panics::caught;
use crate::status::{Loaded, Status};

/// What the thread works with.
pub struct Compute {
    /// The model file.
    pub model: PathBuf,
    /// Its hash, where the pool knows it.
    pub sha256: Option<String>,
    /// Where to compute.
    pub device: Device,
    /// Tokens of context asked for.
    pub context_length: Option<usize>,
    /// Sequences that may hold a cache at once.
    pub slots: usize,
    /// The worker's account of itself.
    pub status: Arc<Status>,
    /// Where events go.
    pub executions: Arc<Executions>,
    /// Figures.
    pub metrics: Arc<Metrics>,
}

impl Compute {
    /// Starts the thread. `loaded` hears how loading went.
    pub fn start(
        self,
        queue: Receiver<Arc<Execution>>,
        loaded: oneshot::Sender<Result<(), LoadError>>,
    ) -> std::io::Result<()> {
        std::thread::Builder::new()
            .name("compute".to_owned())
            .spawn(move || self.run(&queue, loaded))
            .map(|_| ())
    }

    fn run(
        &self,
        queue: &Receiver<Arc<Execution>>,
        loaded: oneshot::Sender<Result<(), LoadError>>,
    ) {
        let engine = match self.load() {
            Ok(engine) => engine,
            Err(error) => {
                self.status.failed(error.to_string());
                // Nobody listens only when the process ends anyway.
                let _ = loaded.send(Err(error));
                return;
            }
        };
        let _ = loaded.send(Ok(()));
        while let Ok(execution) = queue.recv() {
            self.execute(&engine, &execution);
        }
    }

    fn load(&self) -> Result<Engine, LoadError> {
        let load = || {
            let mut engine = Engine::load(
                &self.model,
                self.device,
                self.context_length,
                self.slots,
                &mut |done, total| {
                    self.status.loading(done, total);
                },
            )?;
            if let Some(sha256) = &self.sha256 {
                engine.set_sha256(sha256);
            }
            let status = Arc::clone(&self.status);
            engine.on_layer(move || status.advance());
            engine.warm_up()?;
            Ok::<_, LoadError>(engine)
        };
        // A file that passes every check of ours may still break an assumption of the program.
        let engine = caught(load).unwrap_or_else(|panicked| Err(panicked.into()))?;
        crash_point("load.done");
        // What is not taken yet, but for the little that the warm-up took.
        let to_come = engine.working_bytes();
        self.status.ready(Loaded {
            context_length: engine.context_length() as u32,
            measured_bytes: private_bytes().map(|bytes| bytes + to_come),
        });
        Ok(engine)
    }

    fn execute(&self, engine: &Engine, execution: &Arc<Execution>) {
        // A queue hands every execution out once.
        let Some(request) = execution.take_request() else {
            return;
        };
        let (job_id, attempt) = (execution.job_id(), execution.attempt());
        tracing::info!(job_id, attempt, "execution started");
        let mut control = Running {
            compute: self,
            execution,
            drawn: 0,
        };
        let outcome = caught(|| run_request(engine, execution, request, &mut control))
            .unwrap_or_else(|panicked| Err(panicked.into()));
        let drawn = control.drawn;
        crash_point("execute.ending");
        let last = match outcome {
            Ok(end) => {
                let WorkerEnd {
                    tokens_in,
                    tokens_out,
                    stop_reason,
                    ttft_ms,
                    decode_time_ms,
                    ..
                } = end;
                tracing::info!(
                    job_id,
                    attempt,
                    tokens_in,
                    tokens_out,
                    ?stop_reason,
                    ttft_ms,
                    decode_time_ms,
                    "execution ended"
                );
                self.metrics.ended(&end, drawn);
                WorkerEvent::End(end)
            }
            Err(failure) => {
                let code = failure.code();
                // What a template or a request says may quote a prompt; it goes to the reader alone.
                if code == WorkerErrorCode::InferenceFailed {
                    tracing::error!(job_id, attempt, error = %failure, "the computation failed");
                } else {
                    let code = code.as_str();
                    tracing::info!(job_id, attempt, code, "execution ended without an answer");
                }
                self.metrics.failed(code.as_str());
                WorkerEvent::Error(WorkerError {
                    code,
                    message: failure.to_string(),
                    retriable: failure.retriable(),
                    overflow: failure.overflow(),
                })
            }
        };
        self.executions.push(execution, &last);
    }
}

fn run_request(
    engine: &Engine,
    execution: &Execution,
    request: ExecuteRequest,
    control: &mut dyn Control,
) -> Result<WorkerEnd, Failure> {
    control.check()?;
    let generation = engine.prepare(request, execution.accepted())?;
    engine.generate(&generation, control)
}

/// An execution that runs.
struct Running<'a> {
    compute: &'a Compute,
    execution: &'a Arc<Execution>,
    drawn: u64,
}

impl Control for Running<'_> {
    fn check(&self) -> Result<(), Halted> {
        self.execution.check()
    }

    fn event(&mut self, event: WorkerEvent) {
        if let WorkerEvent::Started(started) = &event {
            self.compute.metrics.prompt(started.tokens_in);
        }
        self.compute.executions.push(self.execution, &event);
    }

    fn progress(&mut self) {
        self.compute.status.advance();
    }

    fn drawn(&mut self) {
        self.drawn += 1;
        crash_point("execute.token");
        self.compute.metrics.token();
    }
}
