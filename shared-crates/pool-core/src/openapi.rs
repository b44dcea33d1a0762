//! Schemas of types that are written as text.

use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::ModelRef;
use crate::worker::Device;

/// A text with a meaning of its own.
fn text(description: &str, example: &str) -> RefOr<Schema> {
    let schema = ObjectBuilder::new().schema_type(Type::String);
    schema
        .description(Some(description))
        .examples([example])
        .into()
}

impl PartialSchema for ModelRef {
    fn schema() -> RefOr<Schema> {
        text(
            "A model: an id of the catalogue, `hf:ORG/REPO[@REVISION][::file=PATH]`, or `file:/absolute/path.gguf`.",
            "smollm2-135m",
        )
    }
}

impl ToSchema for ModelRef {}

impl PartialSchema for Device {
    fn schema() -> RefOr<Schema> {
        text(
            "Where a worker computes: `cpu`, `cuda:N` or `metal:N`.",
            "cuda:0",
        )
    }
}

impl ToSchema for Device {}
