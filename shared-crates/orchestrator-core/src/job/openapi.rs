//! OpenAPI schemas of types with handwritten serde impls, and of values with rules that a derive can't express.

use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::{JobId, MOST_LABEL_CHARS, MOST_LABELS, MOST_STOP_CHARS};

/// Pattern of a short text as [`crate::api::tasks`] accepts it: no control characters, and none that hide or reorder others.
const SHORT: &str =
    r"^[^\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]+$";

fn text() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

fn short_text() -> ObjectBuilder {
    text()
        .min_length(Some(1))
        .max_length(Some(MOST_LABEL_CHARS))
        .pattern(Some(SHORT))
}

impl PartialSchema for JobId {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some("Job id: `job-` and a UUID."))
            .pattern(Some(
                "^job-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
            ))
            .examples(["job-019a5f3e-7c1a-7b52-9d43-0f6a1c2b3d4e"])
            .into()
    }
}

impl ToSchema for JobId {}

/// A label, a session name or a pool name.
#[derive(Debug)]
pub struct ShortText;

impl PartialSchema for ShortText {
    fn schema() -> RefOr<Schema> {
        short_text()
            .description(Some("A short text of printable characters."))
            .into()
    }
}

impl ToSchema for ShortText {}

/// A text that ends the generation.
#[derive(Debug)]
pub struct StopText;

impl PartialSchema for StopText {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some("Ends the generation, and is not part of the answer."))
            .min_length(Some(1))
            .max_length(Some(MOST_STOP_CHARS))
            .into()
    }
}

impl ToSchema for StopText {}

/// Labels of a job.
#[derive(Debug)]
pub struct Labels;

impl PartialSchema for Labels {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .description(Some(
                "Key-value pairs chosen by the client, for finding its jobs.",
            ))
            .property_names(Some(short_text()))
            .additional_properties(Some(short_text()))
            .max_properties(Some(MOST_LABELS))
            .into()
    }
}

impl ToSchema for Labels {}
