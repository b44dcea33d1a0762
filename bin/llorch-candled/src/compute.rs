//! The threads that compute: one loads the model and then runs all executions side by side, and one makes tokens of their
//! prompts before, which takes a while for a long one. Nothing here ever runs on the async runtime, so `/health` answers
//! however busy the processors are.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use pool_core::api::worker::{WorkerEnd, WorkerError, WorkerErrorCode, WorkerEvent};
use pool_core::crash::crash_point;
use tokio::sync::oneshot;

use crate::backend::Device;
use crate::backend::cpu::host::private_bytes;
use crate::engine::batcher::{Batcher, Ended, Step};
use crate::engine::{Control, Engine, Failure, Generation, Halted, LoadError, Sizes};
use crate::executions::{Execution, Executions};
use crate::metrics::Metrics;
use crate::panics::caught;
use crate::status::{Loaded, Status};

/// Model file, device and shared state of the compute threads.
pub struct Compute {
    /// The model file.
    pub model: PathBuf,
    /// Its hash, where the pool knows it.
    pub sha256: Option<String>,
    /// Where to compute.
    pub device: Device,
    /// Tokens of context and of the cache, and sequences at once.
    pub sizes: Sizes,
    /// True if tokens are guessed from the text before and checked together.
    pub speculates: bool,
    /// The worker's account of itself.
    pub status: Arc<Status>,
    /// Where events go.
    pub executions: Arc<Executions>,
    /// Figures.
    pub metrics: Arc<Metrics>,
}

/// An execution with its prompt as tokens.
type Prepared = (Arc<Execution>, Generation);

impl Compute {
    /// Starts the threads. `loaded` hears how loading went.
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
                    compute.status.failed(error.to_string());
                    // Nobody listens only when the process ends anyway.
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

    /// Makes tokens of the prompts of executions, one after the other.
    fn prepare(
        &self,
        engine: &Engine,
        queue: &Receiver<Arc<Execution>>,
        prepared: &Sender<Prepared>,
    ) {
        while let Ok(execution) = queue.recv() {
            // A queue hands every execution out once.
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

    /// Runs executions, all those that there are side by side.
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
            self.status.set_room(batcher.room());
            let start = Instant::now();
            let (step, ended) = batcher.step();
            let waiting = batcher.waiting();
            self.metrics
                .step(&step, start.elapsed(), waiting, engine.room());
            self.status.set_room(batcher.room());
            for Ended { control, outcome } in ended {
                self.end(&control.execution, control.drawn, outcome);
            }
        }
    }

    fn begin<'a>(
        &'a self,
        batcher: &mut Batcher<'_, Running<'a>>,
        (execution, generation): Prepared,
    ) {
        if let Some(shortage) = batcher.shortage(&generation) {
            return self.end(&execution, 0, Err(Failure::Shortage(shortage)));
        }
        let control = Running {
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
        // A file that passes every check of ours may still break an assumption of the program.
        let engine = caught(load).unwrap_or_else(|panicked| Err(panicked.into()))?;
        crash_point("load.done");
        self.metrics
            .step(&Step::default(), Duration::ZERO, 0, engine.room());
        // What is not taken yet, but for the little that the warm-up took.
        let to_come = engine.working_bytes();
        self.status.set_room(engine.room());
        self.status.ready(Loaded {
            context_length: engine.context_length() as u32,
            measured_bytes: private_bytes().map(|bytes| bytes + to_come),
        });
        Ok(engine)
    }

    /// Tells an execution's end, after which its slot is free.
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
                    shortage: failure.shortage(),
                })
            }
        };
        self.executions.push(execution, &last);
    }
}

/// An execution that runs.
struct Running<'a> {
    compute: &'a Compute,
    execution: Arc<Execution>,
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
