//! `GET /openapi.json`: the API described by the routes themselves.

use axum::Extension;
use pool_core::api::pool::PoolErrorCode;
use pool_core::kit::openapi::clarify;
use pool_core::kit::service::routes::{self, Document};
use pool_core::kit::wire::ErrorEnvelope;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OpenApi, Ref, ResponseBuilder};
use utoipa::{Modify, OpenApi as _};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "pool-managerd",
        description = "The workers of one pool host. Every error has the same envelope; a pool \
                       with a token requires it everywhere except on `/health` and `/metrics`.",
        contact(),
    ),
    paths(routes::version),
    components(schemas(ErrorEnvelope, PoolErrorCode)),
    modifiers(&Token),
    security(("pool_token" = []), ()),
    tags(
        (name = "workers", description = "Start, watch and stop workers."),
        (name = "relay", description = "A worker's own API, for callers that can't reach the worker."),
        (name = "pool", description = "Description of the pool, and whether it accepts work."),
        (name = "daemon", description = "Endpoints common to all daemons."),
    )
)]
struct Frame;

struct Token;

impl Modify for Token {
    fn modify(&self, openapi: &mut OpenApi) {
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("The pool's token, LLORCH_POOL_TOKEN."))
            .build();
        openapi
            .components
            .get_or_insert_default()
            .add_security_scheme("pool_token", SecurityScheme::Http(bearer));
    }
}

/// Returns all parts of the document except the routes.
pub fn frame() -> OpenApi {
    Frame::openapi()
}

/// Completes the document of the routes and passes it to the handler of `/openapi.json`.
pub fn layer(mut description: OpenApi) -> Extension<Document> {
    let envelope = ResponseBuilder::new()
        .description("Any other error, with the reason.")
        .content(
            "application/json",
            Content::new(Some(Ref::from_schema_name("ErrorEnvelope"))),
        )
        .build();
    for item in description.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            responses.insert("default".to_owned(), envelope.clone().into());
        }
    }
    let document = serde_json::to_value(&description).map(|mut document| {
        clarify(&mut document);
        document
    });
    Extension(Document::of(document))
}
