//! OpenAPI schemas of model references, devices and reasons of exit.

use serde_json::json;
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::ModelRef;
use crate::kit::openapi::text;
use crate::model_ref::MAX_BYTES;
use crate::worker::{Device, ExitReason};

/// Characters that a model reference must not contain: control characters, and those that hide or reorder others.
const HIDDEN: &str = r"\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff";

/// Returns the grammar of [`crate::model_ref`] as three regular expressions, without look-around, which not every validator
/// supports.
fn model_ref_patterns() -> [String; 3] {
    let alias = r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*\.?";
    // A component of a path or name: neither `.` nor `..`, and no leading `-`.
    let step = |more: &str| {
        let first = format!("[A-Za-z0-9_{more}]");
        let rest = format!("[A-Za-z0-9._{more}-]");
        format!(r"({first}{rest}*|\.[A-Za-z0-9_{more}-]{rest}*|\.\.{rest}+)")
    };
    let (name, file_step) = (step(""), step(" +"));
    let hub = format!("hf:{name}/{name}(@{name}(/{name})*)?(::file={file_step}(/{file_step})*)?");
    let inside = format!("[^/{HIDDEN}]");
    let file =
        format!(r"file:(/(\.|[^/.{HIDDEN}-]{inside}*|\.[^/.{HIDDEN}]{inside}*|\.\.{inside}+)?)+");
    [alias, &hub, &file].map(|pattern| format!("^{pattern}$"))
}

impl PartialSchema for ModelRef {
    fn schema() -> RefOr<Schema> {
        let [alias, hub, file] = model_ref_patterns();
        AnyOfBuilder::new()
            .item(text("A model id from the catalogue.", "smollm2-135m", &alias, 64))
            .item(text(
                "A file on the hub: `hf:ORG/REPO[@REVISION][::file=PATH]`.",
                "hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF::file=smollm2-135m-instruct-q4_k_m.gguf",
                &hub,
                MAX_BYTES,
            ))
            .item(text(
                "A file on the pool's host: `file:/absolute/path.gguf`.",
                "file:/models/mine.gguf",
                &file,
                MAX_BYTES,
            ))
            .description(Some("A model."))
            .into()
    }
}

impl ToSchema for ModelRef {}

impl PartialSchema for Device {
    fn schema() -> RefOr<Schema> {
        text(
            "Where a worker computes: `cpu`, `cuda:N` or `metal:N`.",
            "cuda:0",
            "^(cpu|(cuda|metal):[0-9]{1,9})$",
            64,
        )
    }
}

impl ToSchema for Device {}

/// A single schema for all kinds, because later versions may add kinds, and values to the existing kinds.
impl PartialSchema for ExitReason {
    fn schema() -> RefOr<Schema> {
        let kind = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some(
                "`exited`, `signal`, `oom_killed`, `stalled`, `start_timeout`, `model_invalid`, `spawn_failed`, `stopped`, \
                 or a kind that only a later version knows.",
            ));
        let value = ObjectBuilder::new()
            .schema_type(SchemaType::AnyValue)
            .description(Some(
                "For `exited`, the exit code, or null if that of an adopted process is unknown; for `signal`, its number.",
            ));
        ObjectBuilder::new()
            .description(Some("Why a worker ended."))
            .property("kind", kind)
            .required("kind")
            .property("value", value)
            .examples([
                json!({"kind": "exited", "value": 1}),
                json!({"kind": "signal", "value": 9}),
                json!({"kind": "oom_killed"}),
            ])
            .into()
    }
}

impl ToSchema for ExitReason {}
