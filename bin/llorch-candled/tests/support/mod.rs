//! Helpers of the integration tests, which run requests on an engine and make tiny models.

#![allow(dead_code)] // Every test binary uses its own part.

pub mod process;
pub mod tiny_model;

use std::time::{Duration, Instant};

use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::{Control, Engine, Failure, Halted, LoadError, Sizes};
use pool_core::api::worker::{ExecuteRequest, Sampling, WorkerEnd, WorkerEvent};

/// Longer than anything here takes, so reached only if something hangs.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Polls until there is an answer.
pub async fn until<T, F>(what: &str, mut answer: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let asked = async {
        loop {
            if let Some(answer) = answer().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked)
        .await
        .unwrap_or_else(|_| panic!("it never happened: {what}"))
}

/// The outcome of a request.
pub struct Answer {
    pub text: String,
    pub ids: Vec<u32>,
    pub pieces: Vec<pool_core::api::worker::WorkerToken>,
    pub end: WorkerEnd,
}

/// Returns the CPU with one thread and the fastest instructions that this processor has.
pub fn cpu() -> Device {
    Device::Cpu {
        threads: 1,
        tier: Tier::best(),
    }
}

/// Loads a tiny model.
pub fn tiny(model: &tiny_model::TinyModel) -> Result<Engine, LoadError> {
    tiny_on(cpu(), model)
}

/// Loads a tiny model on a device.
pub fn tiny_on(device: Device, model: &tiny_model::TinyModel) -> Result<Engine, LoadError> {
    tiny_sized(device, Sizes::default(), model)
}

/// Loads a tiny model on a device with these sizes.
pub fn tiny_sized(
    device: Device,
    sizes: Sizes,
    model: &tiny_model::TinyModel,
) -> Result<Engine, LoadError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    model.write(&path).expect("the model is written");
    Engine::load(&path, device, sizes, &mut |_, _| ())
}

/// A control that collects events and never halts.
#[derive(Default)]
pub struct Collect {
    pub events: Vec<WorkerEvent>,
}

impl Control for Collect {
    fn check(&self) -> Result<(), Halted> {
        Ok(())
    }
    fn event(&mut self, event: WorkerEvent) {
        self.events.push(event);
    }
    fn progress(&mut self) {}
    fn drawn(&mut self) {}
}

/// Returns a request for the likeliest answer to `prompt`.
pub fn greedy(prompt: &str) -> ExecuteRequest {
    ExecuteRequest {
        job_id: "job-1".into(),
        attempt: 1,
        fence: 1,
        prompt: Some(prompt.into()),
        messages: None,
        raw: false,
        allow_special: false,
        system: None,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        seed: 1,
        max_tokens: 16,
        stop: Vec::new(),
        resume: None,
        cache_scope: None,
        refuse_if_full: false,
    }
}

/// Runs a request to its end.
pub fn run(engine: &Engine, request: ExecuteRequest) -> Result<Answer, Failure> {
    let generation = engine.prepare(request, Instant::now())?;
    let mut control = Collect::default();
    let end = engine.generate(generation, &mut control)?;
    let pieces: Vec<_> = control
        .events
        .into_iter()
        .filter_map(|event| match event {
            WorkerEvent::Token(token) => Some(token),
            _ => None,
        })
        .collect();
    Ok(Answer {
        text: pieces.iter().map(|p| p.t.as_str()).collect(),
        ids: pieces.iter().flat_map(|p| p.ids.iter().copied()).collect(),
        pieces,
        end,
    })
}

/// Returns the engine of a tiny model.
pub fn engine() -> Engine {
    tiny(&tiny_model::TinyModel::default()).expect("the tiny model loads")
}

/// Returns a request with this seed and sampling.
pub fn sampled(seed: u64, sampling: Sampling) -> ExecuteRequest {
    ExecuteRequest {
        seed,
        sampling,
        max_tokens: 60,
        ..greedy("hello")
    }
}

/// Returns sampling at temperature 0.8.
pub fn warm() -> Sampling {
    Sampling {
        temperature: 0.8,
        ..Sampling::default()
    }
}

/// Runs a request that is expected to succeed.
pub fn answer(engine: &Engine, request: ExecuteRequest) -> Answer {
    run(engine, request).expect("the request runs")
}

/// Checks that the pieces are numbered without gaps, and that none is empty.
pub fn assert_contiguous(answer: &Answer) {
    let indices: Vec<u32> = answer.pieces.iter().map(|p| p.i).collect();
    assert_eq!(indices, (0..answer.pieces.len() as u32).collect::<Vec<_>>());
    assert!(answer.pieces.iter().all(|p| !p.t.is_empty()));
}
