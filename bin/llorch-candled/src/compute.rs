//! The compute threads: one loads the model and then runs all executions concurrently, the other tokenises their prompts
//! beforehand, which takes a while for long prompts. Nothing here runs on the async runtime, so `/health` answers even while
//! all processors are busy.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use pool_core::api::worker::{WorkerEnd, WorkerError, WorkerErrorCode, WorkerEvent};
use pool_core::kit::crash::crash_point;
use pool_core::kit::errors::with_causes;
use pool_core::kit::host_memory::private_bytes;
use tokio::sync::oneshot;

use crate::backend::Device;
use crate::engine::batcher::{Batcher, Ended, Step};
use crate::engine::{Control, Engine, Failure, Generation, Halted, LoadError, Sizes};
use crate::executions::{Execution, Executions};
use crate::metrics::Metrics;
use crate::panics::caught;
use crate::status::{Loaded, Status};

/// The model file, device and shared state of the compute threads.
pub struct Compute {
    /// Path of the model file.
    pub model: PathBuf,
    /// SHA-256 of the file, if the pool knows it.
    pub sha256: Option<String>,
    /// Device that computes the model.
    pub device: Device,
    /// Tokens of context and of the cache, and number of concurrent sequences.
    pub sizes: Sizes,
    /// True if tokens are guessed from the preceding text and verified together.
    pub speculates: bool,
    /// State behind `/health`, updated while computing.
    pub status: Arc<Status>,
    /// Executions whose buffers receive the events.
    pub executions: Arc<Executions>,
    /// Counters and histograms of the computation.
    pub metrics: Arc<Metrics>,
}

/// An execution with its tokenised prompt.
type Prepared = (Arc<Execution>, Generation);

impl Compute {
    /// Starts the threads. `loaded` receives the outcome of loading.
    pub fn start(
        self,
        queue: Receiver<Arc<Execution>>,
        loaded: oneshot::Sender<Result<(), LoadError>>,
    ) -> std::io::Result<()> {
        let compute = Arc::new(self);
        let (engine_sender, engine_receiver) = channel::<Arc<Engine>>();
        let (prepared_sender, prepared) = channel();
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let builder = std::thread::Builder::new().name(name.to_owned());
            builder.spawn(work).map(|_| ())
        };
        let own = Arc::clone(&compute);
        let prepare = move || {
            if let Ok(engine) = engine_receiver.recv() {
                own.prepare(&engine, &queue, &prepared_sender);
            }
        };
        spawn("prepare", Box::new(prepare))?;
        let run = move || {
            let engine = match compute.load() {
                Ok(engine) => Arc::new(engine),
                Err(error) => {
                    compute.status.failed(with_causes(&error));
                    // Sending fails only without a receiver, that is, while the process ends.
                    let _ = loaded.send(Err(error));
                    return;
                }
            };
            let _ = engine_sender.send(Arc::clone(&engine));
            let _ = loaded.send(Ok(()));
            compute.run(&engine, &prepared);
        };
        spawn("compute", Box::new(run))
    }

    /// Tokenises the prompts of executions one after the other.
    fn prepare(
        &self,
        engine: &Engine,
        queue: &Receiver<Arc<Execution>>,
        prepared: &Sender<Prepared>,
    ) {
        while let Ok(execution) = queue.recv() {
            // Always present: the queue yields each execution once.
            let Some(request) = execution.take_request() else {
                continue;
            };
            let (job_id, attempt) = (execution.job_id(), execution.attempt());
            tracing::info!(job_id, attempt, "execution started");
            let prepare = || {
                execution.check()?;
                engine.prepare(request, execution.accepted())
            };
            let outcome = caught(prepare).unwrap_or_else(|panicked| Err(panicked.into()));
            match outcome {
                Ok(generation) => {
                    if prepared.send((execution, generation)).is_err() {
                        return;
                    }
                }
                Err(failure) => self.end(&execution, 0, Err(failure)),
            }
        }
    }

    /// Runs all executions concurrently.
    fn run(&self, engine: &Engine, prepared: &Receiver<Prepared>) {
        let mut batcher = Batcher::new(engine).speculate(self.speculates);
        loop {
            if batcher.is_empty() {
                let Ok(next) = prepared.recv() else {
                    return;
                };
                self.begin(&mut batcher, next);
            }
            for next in prepared.try_iter() {
                self.begin(&mut batcher, next);
            }
            self.status.set_room(batcher.room(), batcher.len());
            let start = Instant::now();
            let (step, ended) = batcher.step();
            let waiting = batcher.waiting();
            self.metrics
                .step(&step, start.elapsed(), waiting, engine.room());
            self.status.set_room(batcher.room(), batcher.len());
            for Ended { control, outcome } in ended {
                self.end(&control.execution, control.drawn, outcome);
            }
        }
    }

    fn begin<'a>(
        &'a self,
        batcher: &mut Batcher<'_, ExecutionControl<'a>>,
        (execution, generation): Prepared,
    ) {
        if let Some(shortage) = batcher.shortage(&generation) {
            return self.end(&execution, 0, Err(Failure::Shortage(shortage)));
        }
        let control = ExecutionControl {
            compute: self,
            execution,
            drawn: 0,
        };
        batcher.add(generation, control);
    }

    fn load(&self) -> Result<Engine, LoadError> {
        let load = || {
            let mut engine =
                Engine::load(&self.model, self.device, self.sizes, &mut |done, total| {
                    self.status.loading(done, total);
                })?;
            if let Some(sha256) = &self.sha256 {
                engine.set_sha256(sha256);
            }
            let status = Arc::clone(&self.status);
            engine.on_layer(move || status.advance());
            engine.warm_up()?;
            Ok::<_, LoadError>(engine)
        };
        // A file that passes all our checks may still break an assumption of the program.
        let engine = caught(load).unwrap_or_else(|panicked| Err(panicked.into()))?;
        crash_point("load.done");
        self.metrics
            .step(&Step::default(), Duration::ZERO, 0, engine.room());
        // Memory that is not allocated yet, except for the little that the warm-up allocated.
        let to_come = engine.working_bytes();
        self.status.set_room(engine.room(), 0);
        self.status.ready(Loaded {
            context_length: engine.context_length() as u32,
            measured_bytes: private_bytes(std::process::id()).map(|bytes| bytes + to_come),
        });
        Ok(engine)
    }

    /// Publishes the end of an execution, which frees its slot.
    fn end(&self, execution: &Arc<Execution>, drawn: u64, outcome: Result<WorkerEnd, Failure>) {
        let (job_id, attempt) = (execution.job_id(), execution.attempt());
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
                // The message of a template or a request error may quote a prompt, so only the reader sees it.
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
                    shortage: failure.shortage(),
                })
            }
        };
        self.executions.push(execution, &last);
    }
}

/// The control of a running execution.
struct ExecutionControl<'a> {
    compute: &'a Compute,
    execution: Arc<Execution>,
    drawn: u64,
}

impl Control for ExecutionControl<'_> {
    fn check(&self) -> Result<(), Halted> {
        self.execution.check()
    }

    fn event(&mut self, event: WorkerEvent) {
        if let WorkerEvent::Started(started) = &event {
            self.compute.metrics.prompt(started.tokens_in);
        }
        self.compute.executions.push(&self.execution, &event);
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
