//! `POST /execute`.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use pool_core::api::sampling::{MIN_P, REPETITION_PENALTY, TEMPERATURE, TOP_P};
use pool_core::api::worker::ExecuteRequest;
use pool_core::kit::service::{Json, ServiceResult};

use super::App;
use super::error::{invalid, loading, refused};
use super::executions::{last_event_id, stream};

/// Most stop texts in a request.
const MAX_STOPS: usize = 4;

/// Starts an execution, or attaches to the job's execution with the same fence, and streams the events.
pub async fn execute(
    State(app): State<App>,
    headers: HeaderMap,
    Json(request): Json<ExecuteRequest>,
) -> ServiceResult<impl IntoResponse> {
    validate(&request).map_err(invalid)?;
    let position = last_event_id(&headers)?;
    if !app.status.is_ready() {
        return Err(loading());
    }
    let execution = app.executions.submit(request).map_err(refused)?;
    stream(execution, position)
}

/// Checks the rules that no type expresses.
fn validate(request: &ExecuteRequest) -> Result<(), String> {
    let sampling = &request.sampling;
    if request.job_id.is_empty() || request.job_id.len() > 128 {
        return Err("`job_id` must be 1 to 128 bytes long".to_owned());
    }
    match (&request.prompt, &request.messages) {
        (Some(_), Some(_)) | (None, None) => {
            return Err("exactly one of `prompt` and `messages` is required".to_owned());
        }
        (None, Some(_)) if request.raw => {
            return Err("`raw` requires `prompt` instead of `messages`".to_owned());
        }
        (None, Some(messages)) if messages.is_empty() => {
            return Err("`messages` is empty".to_owned());
        }
        _ => {}
    }
    if request.raw && request.system.is_some() {
        return Err("`raw` can't be combined with `system`".to_owned());
    }
    if request.max_tokens == 0 {
        return Err("`max_tokens` must be at least 1".to_owned());
    }
    if request.stop.len() > MAX_STOPS || request.stop.iter().any(String::is_empty) {
        return Err(format!(
            "`stop` takes at most {MAX_STOPS} texts, each of them non-empty"
        ));
    }
    let values = [
        (TEMPERATURE, sampling.temperature),
        (TOP_P, sampling.top_p),
        (MIN_P, sampling.min_p),
        (REPETITION_PENALTY, sampling.repetition_penalty),
    ];
    let mut values = values.into_iter();
    match values.find(|(setting, value)| !setting.contains(f64::from(*value))) {
        Some((setting, _)) => Err(format!("`{}` must be {}", setting.name, setting.range)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: serde_json::Value) -> Result<(), String> {
        let mut body = serde_json::json!({
            "job_id": "job-1", "attempt": 1, "fence": 1, "prompt": "x", "seed": 1, "max_tokens": 1
        });
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        validate(&serde_json::from_value(body).unwrap())
    }

    // [CAND-055]
    #[test]
    fn rules_name_the_field_that_breaks_them() {
        use serde_json::json;
        assert_eq!(request(json!({})), Ok(()));
        assert_eq!(
            request(
                json!({"sampling": {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 2.0}})
            ),
            Ok(())
        );
        for (change, field) in [
            (json!({"messages": []}), "messages"),
            (json!({"prompt": null}), "prompt"),
            (json!({"prompt": null, "messages": []}), "messages"),
            (
                json!({"prompt": null, "raw": true, "messages": [{"role": "user", "content": "x"}]}),
                "raw",
            ),
            (json!({"raw": true, "system": "x"}), "system"),
            (json!({"job_id": ""}), "job_id"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"stop": [""]}), "stop"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"sampling": {"temperature": 2.1}}), "temperature"),
            (json!({"sampling": {"temperature": -0.1}}), "temperature"),
            (json!({"sampling": {"top_p": 0.0}}), "top_p"),
            (json!({"sampling": {"min_p": 1.0}}), "min_p"),
            (
                json!({"sampling": {"repetition_penalty": 0.0}}),
                "repetition_penalty",
            ),
        ] {
            let error = request(change.clone()).unwrap_err();
            assert!(error.contains(&format!("`{field}`")), "{change}: {error}");
        }
    }
}
