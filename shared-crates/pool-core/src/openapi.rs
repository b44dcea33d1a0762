//! OpenAPI schemas of types with a text form, and corrections to derived schemas.

use serde_json::{Map, Value, json};
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::ModelRef;
use crate::json_number::Decimal;
use crate::model_ref::MAX_BYTES;
use crate::worker::{Device, ExitReason};

/// Characters that a model reference must not contain: control characters, and those that hide or reorder others.
const HIDDEN: &str = r"\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff";

/// Returns the schema of a string of at most `longest` characters.
fn text(description: &str, example: &str, pattern: &str, longest: usize) -> RefOr<Schema> {
    let schema = ObjectBuilder::new().schema_type(Type::String);
    schema
        .description(Some(description))
        .examples([example])
        .pattern(Some(pattern))
        .max_length(Some(longest))
        .into()
}

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

impl PartialSchema for Decimal {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .description(Some("Only in requests: the form used by earlier versions."))
            .minimum(Some(0));
        AnyOfBuilder::new()
            .item(text(
                "Decimal digits.",
                "1764433800123456789",
                "^[0-9]{1,19}$",
                19,
            ))
            .item(number.format(Some(SchemaFormat::Custom("u-int64".into()))))
            .description(Some(
                "An integer of up to 64 bits. Responses give it as a string, because many JSON parsers round numbers of \
                 more than 53 bits.",
            ))
            .into()
    }
}

impl ToSchema for Decimal {}

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

/// Makes explicit, throughout a document, what derived schemas leave implicit: the range of each integer, for which
/// `format` alone is not binding, and that the format of a nullable time does not apply to null.
pub fn clarify(document: &mut Value) {
    match document {
        Value::Object(fields) => {
            fields.values_mut().for_each(clarify);
            bound_integer(fields);
            unfold_nullable_time(fields);
        }
        Value::Array(items) => items.iter_mut().for_each(clarify),
        _ => {}
    }
}

fn bound_integer(schema: &mut Map<String, Value>) {
    let format = schema.get("format").and_then(Value::as_str);
    let (name, most) = match format {
        Some("u-int8") => ("uint8", u64::from(u8::MAX)),
        Some("u-int16") => ("uint16", u64::from(u16::MAX)),
        Some("u-int32") => ("uint32", u64::from(u32::MAX)),
        Some("u-int64") => ("uint64", u64::MAX),
        Some("int32") => ("int32", i32::MAX.unsigned_abs().into()),
        _ => return,
    };
    if name == "int32" {
        let least = schema.entry("minimum");
        least.or_insert_with(|| i32::MIN.into());
    }
    schema.insert("format".to_owned(), name.into());
    schema.entry("maximum").or_insert_with(|| most.into());
}

fn unfold_nullable_time(schema: &mut Map<String, Value>) {
    let time = schema
        .get("format")
        .is_some_and(|format| format == "date-time");
    if !time || schema.get("type").is_none_or(|kind| !kind.is_array()) {
        return;
    }
    schema.remove("format");
    schema.remove("type");
    let either = json!([{"type": "string", "format": "date-time"}, {"type": "null"}]);
    schema.insert("anyOf".to_owned(), either);
}
