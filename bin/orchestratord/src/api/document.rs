//! `GET /openapi.json`: the API described by the routes themselves.

use axum::Extension;
use orchestrator_core::api::error::ApiErrorCode;
use orchestrator_core::api::events::TaskEvent;
use pool_core::kit::openapi::clarify;
use pool_core::kit::service::routes::{self, Document};
use pool_core::kit::wire::ErrorEnvelope;
use serde_json::{Map, Value, json};
use utoipa::OpenApi as _;
use utoipa::openapi::OpenApi;

/// Description of the responses that are event streams, for which OpenAPI 3.1 has no vocabulary.
pub const STREAM: &str = "The job's events as server-sent events: `queued`, `started`, (`token` | `metrics`)*, then `end` \
    or `error`, with `attempt` for each further attempt and `waiting` while it waits. `event:` is the tag and `data:` \
    the content of `TaskEvent`. Logged events carry `id: ATTEMPT.SEQ`, which a disconnected reader sends as \
    `Last-Event-ID`; `waiting`, `metrics`, `lagged` and `shutdown` are not logged and carry no id. Comments keep a silent \
    stream alive. The stream ends after `end` or `error`; a request that resumes there gets 204, which ends a browser's \
    `EventSource`.";

/// Description of the response that is a recording.
pub const TRACE: &str = "A trace: one JSON object per line. First `trace` (version, policy, costs), then for each pass `saw` \
    (changes in the scheduler's input) and `decided` (who decided, actions, new reasons to wait), finally `end`. \
    Empty lines keep a silent recording alive. It contains no prompts, texts or secrets.";

/// Events that are not logged, and so carry no id.
const MOMENTARY: [&str; 4] = ["waiting", "metrics", "lagged", "shutdown"];
/// Pattern of an event's id. A longer text is refused.
const EVENT_ID: &str = "^[0-9]{1,9}[.][0-9]{1,19}$";

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "orchestratord",
        description = "A durable queue of inference tasks on a fleet of pools. Every error has the same envelope. A daemon \
            with a token requires it everywhere except on `/health` and `/metrics`.",
        contact(),
    ),
    paths(routes::version),
    components(schemas(ErrorEnvelope, ApiErrorCode, TaskEvent)),
    security(("api_token" = []), ()),
    tags(
        (name = "tasks", description = "Submit, follow and cancel jobs."),
        (name = "fleet", description = "The pools and their workers, and the models that tasks may name."),
        (name = "scheduler", description = "The policy in force, and trials of other policies."),
        (name = "pools' own", description = "Registration and reports of pools."),
        (name = "daemon", description = "Routes that every daemon has."),
    )
)]
struct Frame;

/// Returns the part of the document that does not describe routes.
pub fn frame() -> OpenApi {
    Frame::openapi()
}

/// Completes the document of the routes and returns it as the extension from which `/openapi.json` is answered.
pub fn layer(description: &OpenApi) -> Extension<Document> {
    Extension(Document::of(
        serde_json::to_value(description).map(complete),
    ))
}

/// Adds what holds for every route, so that no route has to declare it: tokens, the correlation id, and the refusals that
/// precede every handler.
fn complete(mut document: Value) -> Value {
    clarify(&mut document);
    document["components"]["securitySchemes"] = json!({
        "api_token": {
            "type": "http", "scheme": "bearer",
            "description": "The token of clients and operators, LLORCH_API_TOKEN. It grants access to everything.",
        },
        "pool_token": {
            "type": "http", "scheme": "bearer",
            "description": "The token of the pools, LLORCH_POOL_TOKEN. It grants access to the routes that pools call.",
        },
    });
    document["components"]["headers"] = json!({
        "CorrelationId": {
            "description": "Identifies the request in the logs of every daemon it passed through.",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9-]{1,64}$"},
        },
        "RetryAfter": {
            "description": "Seconds after which the same request may succeed.",
            "schema": {"type": "integer", "minimum": 0},
        },
    });
    document["components"]["parameters"] = json!({
        "CorrelationId": {
            "name": "X-Correlation-Id", "in": "header", "schema": {"type": "string"},
            "description": "An id for the request, `[A-Za-z0-9-]{1,64}`: echoed, passed on to pools and workers, and \
                logged. If it is absent or malformed, the daemon generates one.",
        },
    });
    let schemas = &mut document["components"]["schemas"];
    if let Some(request) = schemas.get_mut("TaskSubmitRequest") {
        *request = three_ways(request);
    }
    schemas["StreamEvent"] = stream_event(&schemas["TaskEvent"]);
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    let operations = paths.flat_map(|(_, item)| item.as_object_mut().into_iter().flatten());
    for (_, operation) in operations {
        complete_operation(operation);
    }
    document
}

/// Responses that the service or hyper sends before a handler runs.
const COMMON: [(&str, &str); 5] = [
    ("400", "The request is malformed."),
    ("401", "The token is missing or wrong."),
    (
        "403",
        "The `Host` is not a name of this daemon, or the request comes from a page of another origin.",
    ),
    ("500", "Internal error of the daemon."),
    (
        "503",
        "The daemon is stopping, overloaded, or without its database.",
    ),
];
/// Further such responses, for requests with a body.
const WITH_BODY: [(&str, &str); 3] = [
    ("408", "The body did not arrive in time."),
    ("413", "The body is larger than the daemon accepts."),
    ("415", "The body is not declared as JSON."),
];

fn complete_operation(operation: &mut Value) {
    let has_body = operation.get("requestBody").is_some();
    let parameters = operation["parameters"].take();
    let mut parameters = parameters.as_array().cloned().unwrap_or_default();
    for parameter in &mut parameters {
        // An optional parameter may be left out, but not sent as `null`.
        if let Some(kinds) = parameter["schema"]["type"].as_array() {
            parameter["schema"]["type"] = kinds[0].clone();
        }
    }
    parameters.push(json!({"$ref": "#/components/parameters/CorrelationId"}));
    operation["parameters"] = parameters.into();
    let Some(responses) = operation["responses"].as_object_mut() else {
        return;
    };
    for (status, description) in COMMON.iter().chain(WITH_BODY.iter().filter(|_| has_body)) {
        responses
            .entry(*status)
            .or_insert_with(|| json!({"description": description}));
    }
    for (status, response) in responses {
        complete_response(status, response);
    }
}

fn complete_response(status: &str, response: &mut Value) {
    let mut headers = response["headers"].as_object().cloned().unwrap_or_default();
    let mut add = |name: &str, header: &str| {
        let reference = json!({"$ref": format!("#/components/headers/{header}")});
        headers.insert(name.to_owned(), reference);
    };
    add("X-Correlation-Id", "CorrelationId");
    if matches!(status, "429" | "503") {
        add("Retry-After", "RetryAfter");
    }
    response["headers"] = headers.into();
    // Indexing would add a `content` of null to a response that has none.
    let content = response.get_mut("content");
    if let Some(stream) = content.and_then(|content| content.get_mut("text/event-stream")) {
        *stream = json!({"schema": {"$ref": "#/components/schemas/StreamEvent"}});
    }
    // Every refusal has this envelope, so no route has to declare it.
    if status.starts_with(['4', '5']) {
        let envelope = json!({"$ref": "#/components/schemas/ErrorEnvelope"});
        response["content"] = json!({"application/json": {"schema": envelope}});
    }
}

/// Describes one event as sent in the stream: the tag of [`TaskEvent`] is its name, the content its data.
fn stream_event(event: &Value) -> Value {
    let variants = event["oneOf"].as_array().into_iter().flatten();
    let variants = variants.map(|variant| {
        let name = &variant["properties"]["event"]["enum"][0];
        let momentary = MOMENTARY.iter().any(|momentary| name == momentary);
        // A client of such streams gives an event without an id the id of the preceding event.
        let id = if momentary {
            "The id of the preceding event: this event has none of its own."
        } else {
            "`ATTEMPT.SEQ`"
        };
        let mut properties = json!({
            "event": {"const": name},
            "id": {"type": "string", "pattern": EVENT_ID, "description": id},
            "data": {
                "type": "string", "contentMediaType": "application/json",
                "contentSchema": variant["properties"]["data"],
            },
        });
        let mut required = vec!["event", "data"];
        if momentary {
            properties["retry"] = json!({"type": "integer", "minimum": 0, "description": "Milliseconds to wait before reconnecting."});
        } else {
            required.push("id");
        }
        json!({
            "type": "object", "description": variant["description"], "properties": properties, "required": required,
            "additionalProperties": false,
        })
    });
    json!({
        "description": "One event of the stream: `event:`, `data:` and `id:` of server-sent events.",
        "oneOf": variants.collect::<Vec<_>>(),
    })
}

/// Splits a task's schema into three: a prompt, a raw prompt and a conversation. With a schema for each, every request that
/// fits the document is accepted.
fn three_ways(request: &Value) -> Value {
    let way = |title: &str, required: &str, without: &[&str], raw: Value| {
        let mut way = request.clone();
        way["title"] = title.into();
        way["required"] = json!(["model", required]);
        if let Some(properties) = way["properties"].as_object_mut() {
            for name in without {
                forbid(properties, name);
            }
            require(properties, required);
            properties.insert("raw".to_owned(), raw);
        }
        way
    };
    let raw = |allowed: bool, description: &str| json!({"const": allowed, "default": false, "description": description});
    let template = raw(false, "The model's chat template is used.");
    let mut raw_prompt = way(
        "A raw prompt",
        "prompt",
        &["messages", "system"],
        raw(
            true,
            "The model gets `prompt` without a chat template; names of special tokens become those tokens.",
        ),
    );
    raw_prompt["required"] = json!(["model", "prompt", "raw"]);
    json!({"oneOf": [
        way("A prompt", "prompt", &["messages"], template.clone()),
        raw_prompt,
        way("A conversation", "messages", &["prompt"], template),
    ]})
}

fn forbid(properties: &mut Map<String, Value>, name: &str) {
    let null = json!({"type": "null", "description": "Not allowed in this form of a task."});
    properties.insert(name.to_owned(), null);
}

/// Removes `null` from an optional property's types.
fn require(properties: &mut Map<String, Value>, name: &str) {
    if let Some(kinds) = properties[name]["type"].as_array_mut() {
        kinds.retain(|kind| kind != "null");
    }
}
