//! What the integration tests share: running a request on an engine, and making tiny models.

#![allow(dead_code)] // Every test binary uses its own part of this.

pub mod tiny_model;

use std::time::Instant;

use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::{Control, Engine, Failure, Halted, LoadError, Sizes};
use pool_core::api::worker::{ExecuteRequest, Sampling, WorkerEnd, WorkerEvent};

/// What came out of a request.
pub struct Answer {
    pub text: String,
    pub ids: Vec<u32>,
    pub pieces: Vec<pool_core::api::worker::WorkerToken>,
    pub end: WorkerEnd,
}

/// The CPU with one thread, and the fastest instructions that this processor has.
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
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    model.write(&path).expect("the model is written");
    Engine::load(&path, device, Sizes::default(), &mut |_, _| ())
}

/// Collects events; never halts.
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

/// A request for the likeliest answer to `prompt`.
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
