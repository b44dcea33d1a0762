//! `/v2/scheduler`: the policy in force, checks of scripts, simulations and recordings.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use orchestrator_core::api::scheduler::{
    CheckAnswer, CheckRequest, SchedulerView, SimulateAnswer, SimulateRequest,
};
use orchestrator_core::check;
use orchestrator_core::script::Script;
use orchestrator_core::simulate;
use orchestrator_core::trace::{self, EndReason, Header, Trace};
use pool_core::kit::service::{Json, Query, ServiceError, ServiceResult};
use serde::Deserialize;
use serde_json::json;

use super::{document, error};
use crate::app::App;
use crate::clock;

/// Longest simulation. A client waits for the answer, and the daemon has other work.
const SIMULATION: Duration = Duration::from_secs(10);
/// Accepted lengths of a recording, in milliseconds.
const RECORDING_MS: std::ops::RangeInclusive<u64> = 1..=86_400_000;
/// Interval of the empty lines that show a silent recording to be alive. Readers skip them.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// `Retry-After` while another check or simulation runs.
const BUSY_RETRY: Duration = Duration::from_secs(1);

/// Returns the policy in force, and the state of its script.
#[utoipa::path(get, path = "/v2/scheduler", tag = "scheduler", responses((status = 200, body = SchedulerView)))]
pub(super) async fn show(State(app): State<App>) -> Json<SchedulerView> {
    Json(SchedulerView {
        policy: app.config.scheduler.policy.as_str().to_owned(),
        script: app.scheduler.script.view(),
        recordings: app.scheduler.recordings.count(),
    })
}

/// Compiles a script and lets it decide on a sample. The answer says whether the script is usable.
#[utoipa::path(
    post, path = "/v2/scheduler/check", tag = "scheduler", request_body = CheckRequest,
    responses((status = 200, body = CheckAnswer), (status = 429, description = "Another script or trace is being tried."))
)]
pub(super) async fn check(
    State(app): State<App>,
    body: ServiceResult<Json<CheckRequest>>,
) -> ServiceResult<Json<CheckAnswer>> {
    let request = asked(body, r#"send {"script": "fn schedule(ctx) { [] }"}"#)?;
    attempt(&app, move || Ok(check::check(request.script.as_bytes()))).await
}

/// Replays a trace under other policies, and decides each of its passes again.
#[utoipa::path(
    post, path = "/v2/scheduler/simulate", tag = "scheduler", request_body = SimulateRequest,
    responses(
        (status = 200, body = SimulateAnswer),
        (status = 400, description = "The trace or the script can't be read (`details.field` says which), or the simulation takes longer than 10 s."),
        (status = 429, description = "Another script or trace is being tried."),
    )
)]
pub(super) async fn simulate(
    State(app): State<App>,
    body: ServiceResult<Json<SimulateRequest>>,
) -> ServiceResult<Json<SimulateAnswer>> {
    let request = asked(
        body,
        "send {\"trace\": TRACE, \"script\"?: SOURCE, \"policies\"?: [NAME]}, of at most 4 MiB; `llorch orchestrator scheduler simulate` takes traces of any size",
    )?;
    attempt(&app, move || {
        let trace = Trace::read(&request.trace).map_err(|error| {
            error::invalid(error.to_string())
                .hint(error.hint())
                .details(json!({"field": "trace"}))
        })?;
        let script = request
            .script
            .map(|source| Script::compile(source.as_bytes()));
        let script = script.transpose().map_err(|error| {
            error::invalid(format!("the script is unusable: {error}"))
                .hint(error.hint())
                .details(json!({"field": "script", "line": error.line, "column": error.column}))
        })?;
        let scripts: Vec<_> = script
            .map(|script| ("script".to_owned(), script))
            .into_iter()
            .collect();
        simulate::compare(&trace, &scripts, &request.policies, Some(SIMULATION)).map_err(|error| {
            error::invalid(error.to_string()).hint(
                "run `llorch orchestrator scheduler simulate`, which replays the trace on your own machine without a time limit",
            )
        })
    })
    .await
}

/// Returns the body. An error without a hint gets `hint`, which says what to send instead.
fn asked<T>(body: ServiceResult<Json<T>>, hint: &str) -> ServiceResult<T> {
    let Json(request) = body.map_err(|error| match error.body().hint {
        Some(_) => error,
        None => error.hint(hint),
    })?;
    Ok(request)
}

/// Runs a trial of a script or trace on a blocking thread, one at a time: a trial may take long, and the daemon has other work.
async fn attempt<T: Send + 'static>(
    app: &App,
    work: impl FnOnce() -> ServiceResult<T> + Send + 'static,
) -> ServiceResult<Json<T>> {
    let permit = Arc::clone(&app.trials)
        .try_acquire_owned()
        .map_err(|_| error::too_many("another script or trace is being tried", BUSY_RETRY))?;
    let answer = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    answer
        .await
        .map_err(|error| ServiceError::internal(&error))?
        .map(Json)
}

/// Parameters of `GET /v2/scheduler/trace`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RecordQuery {
    /// Length of the recording in milliseconds. If absent, the recording lasts for as long as it is read.
    #[param(minimum = 1, maximum = 86_400_000, nullable = false)]
    for_ms: Option<u64>,
}

/// Records what the scheduler sees and decides from now on, as JSON Lines, pass by pass, for as long as the client reads.
#[utoipa::path(
    get, path = "/v2/scheduler/trace", tag = "scheduler", params(RecordQuery),
    responses(
        (status = 200, description = document::TRACE, body = String, content_type = "application/x-ndjson"),
        (status = 400, description = "A parameter is unknown or out of range."),
        (status = 429, description = "The limit on concurrent recordings is reached."),
    )
)]
pub(super) async fn record(
    State(app): State<App>,
    Query(query): Query<RecordQuery>,
) -> ServiceResult<Response> {
    let span = match query.for_ms {
        None => None,
        Some(ms) if RECORDING_MS.contains(&ms) => Some(Duration::from_millis(ms)),
        Some(ms) => {
            return Err(
                error::invalid(format!("`for_ms` is out of range: {ms}")).hint("use 1 to 86400000")
            );
        }
    };
    let header = Header {
        version: trace::VERSION,
        recorded_by: concat!("orchestratord ", env!("CARGO_PKG_VERSION")).to_owned(),
        recorded_at: clock::wall(clock::now()),
        policy: app.config.scheduler.policy.as_str().to_owned(),
        order: app.config.queue.order,
        promote_after_s: app.config.queue.promote_after_s,
        costs: app.scheduler.script.costs().as_ref().clone(),
    };
    let Some(mut tape) = app.scheduler.recordings.begin(header) else {
        return Err(error::too_many(
            "the limit on concurrent recordings is reached",
            BUSY_RETRY,
        ));
    };
    // The first pass shows the fleet as it is, so trigger one even if nothing else happens.
    app.jobs.changed.notify_one();
    let shutdown = app.jobs.shutdown.clone();
    drop(app);
    let over = async move {
        match span {
            Some(span) => tokio::time::sleep(span).await,
            None => std::future::pending().await,
        }
    };
    let lines = async_stream::stream! {
        tokio::pin!(over);
        let reason = loop {
            tokio::select! {
                piece = tape.next() => match piece {
                    Some(piece) => yield Ok::<_, std::convert::Infallible>(piece),
                    None => break EndReason::Lagged,
                },
                () = tokio::time::sleep(KEEP_ALIVE) => yield Ok(Bytes::from_static(b"\n")),
                () = &mut over => break EndReason::Done,
                () = shutdown.requested() => break EndReason::Shutdown,
            }
        };
        if let Some(end) = tape.end(reason) {
            yield Ok(end);
        }
    };
    let kind = [(CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Body::from_stream(lines)).into_response())
}
