//! The JSON in which a store keeps a job's request.
//!
//! The JSON of [`JobSpec`] itself is part of the API's answers. The two are apart, so that a change of the answers leaves the stored
//! rows readable. The types of the other fields are shared with the API; a test with a row of an earlier build holds their JSON.

use std::collections::BTreeMap;

use orchestrator_core::job::{Input, JobSpec, Placement, Priority};
use orchestrator_core::sampling::Sampling;
use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

/// A request to be read from its stored form.
#[derive(Deserialize)]
pub struct StoredSpec(#[serde(with = "SpecForm")] pub JobSpec);

/// A request to be written in its stored form.
#[derive(Serialize)]
pub struct StoredSpecRef<'a>(#[serde(with = "SpecForm")] pub &'a JobSpec);

/// The stored form of a request. A field that not every build stored has a default, and is left out there.
#[derive(Serialize, Deserialize)]
#[serde(remote = "JobSpec")]
struct SpecForm {
    model: ModelRef,
    input: Input,
    raw: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    allow_special: bool,
    system: Option<String>,
    #[serde(with = "SamplingForm")]
    sampling: Sampling,
    max_tokens: u32,
    stop: Vec<String>,
    seed: u64,
    priority: Priority,
    session_id: Option<String>,
    timeout_ms: Option<u64>,
    max_attempts: u32,
    placement: Placement,
    labels: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Sampling")]
struct SamplingForm {
    temperature: f64,
    top_p: f64,
    top_k: u32,
    min_p: f64,
    repetition_penalty: f64,
}

#[cfg(test)]
mod tests {
    use orchestrator_core::TaskSubmitRequest;
    use serde_json::json;

    use super::*;

    fn spec(request: serde_json::Value) -> JobSpec {
        let request: TaskSubmitRequest = serde_json::from_value(request).unwrap();
        request.validate().unwrap()
    }

    // [ORCHD-073] Rows of the build before the two forms were apart.
    #[test]
    fn stored_requests_keep_their_form() {
        let full = spec(json!({
            "model": "file:/models/m.gguf",
            "messages": [{"role": "user", "content": "h\u{e9}"}, {"role": "assistant", "content": "ho"}],
            "allow_special": true, "system": "s", "max_tokens": 8, "temperature": 0.1, "top_p": 0.9, "top_k": 4,
            "min_p": 1e-7, "repetition_penalty": 1.1, "stop": ["x"], "seed": u64::MAX, "priority": "batch",
            "session_id": "a", "timeout_ms": 1000, "max_attempts": 2,
            "placement": {"pool": "mac", "device": "cuda:1"}, "labels": {"team": "a"}
        }));
        let plain = spec(json!({"model": "m", "prompt": "hi", "raw": true, "seed": 7}));
        for (spec, stored) in [
            (
                full,
                r#"{"model":"file:/models/m.gguf","input":{"messages":[{"role":"user","content":"hé"},{"role":"assistant","content":"ho"}]},"raw":false,"allow_special":true,"system":"s","sampling":{"temperature":0.1,"top_p":0.9,"top_k":4,"min_p":1e-7,"repetition_penalty":1.1},"max_tokens":8,"stop":["x"],"seed":18446744073709551615,"priority":"batch","session_id":"a","timeout_ms":1000,"max_attempts":2,"placement":{"pool":"mac","device":"cuda:1"},"labels":{"team":"a"}}"#,
            ),
            (
                plain,
                r#"{"model":"m","input":{"prompt":"hi"},"raw":true,"system":null,"sampling":{"temperature":0.7,"top_p":1.0,"top_k":0,"min_p":0.0,"repetition_penalty":1.0},"max_tokens":256,"stop":[],"seed":7,"priority":"interactive","session_id":null,"timeout_ms":null,"max_attempts":3,"placement":{},"labels":{}}"#,
            ),
        ] {
            assert_eq!(
                serde_json::to_string(&StoredSpecRef(&spec)).unwrap(),
                stored
            );
            let read: StoredSpec = serde_json::from_str(stored).unwrap();
            assert_eq!(read.0, spec);
        }
    }
}
