//! Corrections to derived OpenAPI schemas, and schemas of types with a text form.

use serde_json::{Map, Value, json};
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::json_number::Decimal;

/// Returns the schema of a string of at most `longest` characters.
pub fn text(description: &str, example: &str, pattern: &str, longest: usize) -> RefOr<Schema> {
    let schema = ObjectBuilder::new().schema_type(Type::String);
    schema
        .description(Some(description))
        .examples([example])
        .pattern(Some(pattern))
        .max_length(Some(longest))
        .into()
}

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
