//! `/v2/tasks`: submits and lists jobs, and shows, explains, streams and cancels one.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::header::{ACCEPT, CACHE_CONTROL, LOCATION};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response, sse};
use futures_util::StreamExt as _;
use orchestrator_core::api::events::{EventId, ShutdownNotice, TaskEvent};
use orchestrator_core::api::tasks::{
    CancelResponse, TaskAccepted, TaskExplanation, TaskList, TaskSubmitRequest, TaskView,
    events_url,
};
use orchestrator_core::job::{JobIdPrefix, JobSpec, Priority};
use orchestrator_core::{JobId, JobStatus};
use pool_core::ModelRef;
use pool_core::kit::crash::crash_point;
use pool_core::kit::service::{
    Caller, CorrelationId, Json, Path, Query, ServiceError, ServiceResult,
};
use pool_core::kit::sse::SseEvent as _;
use serde::Deserialize;

use super::{document, error};
use crate::app::App;
use crate::background::complete;
use crate::jobs::{Accepted, Feed};
use crate::state::{Fingerprint, IdempotencyKey, ListFilter};

/// Number of jobs on a page of a list, unless the request names one.
const LIST_DEFAULT: u32 = 50;
/// Most jobs on a page of a list.
const LIST_MAX: u32 = 500;

/// Submits a task. Once the request is answered, the job is stored and survives a crash of any process.
///
/// If the client accepts `text/event-stream`, the answer is the job's event stream; the job's id is in the `queued` event and
/// in `Location`. A client that disconnects does not cancel its job.
#[utoipa::path(
    post, path = "/v2/tasks", tag = "tasks",
    params(("Idempotency-Key" = Option<String>, Header, pattern = "^[!-~]([ -~]{0,253}[!-~])?$", description = "Key of the request: repetitions with the same key create no further job.")),
    request_body = TaskSubmitRequest,
    responses(
        (status = 202, description = "The job is stored.", body = TaskAccepted, headers(("Location" = String, description = "Path of the job."))),
        (status = 200, description = document::STREAM, body = String, content_type = "text/event-stream", headers(("Location" = String, description = "Path of the job."))),
        (status = 400, description = "A field is malformed, unknown or out of range; `details.field` names it, or the message if the field is unknown."),
        (status = 404, description = "There is no such model, or tasks may not use it."),
        (status = 410, description = "The events of the job with this key were dropped after `retention`."),
        (status = 422, description = "`MODEL_UNSUPPORTED`: no worker can run the model. `IDEMPOTENCY_MISMATCH`: the key belongs to another request."),
        (status = 429, description = "The queue is full."),
        (status = 503, description = "The job can't be stored now, or a pool that may have the model has not reported since a restart."),
    )
)]
pub(super) async fn submit(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: ServiceResult<Json<TaskSubmitRequest>>,
) -> ServiceResult<Response> {
    let result = accept(&app, caller, &headers, body).await;
    let outcome = match &result {
        Ok(_) => "accepted",
        Err(error) if error.status() == StatusCode::TOO_MANY_REQUESTS => "queue_full",
        Err(error) if error.status().is_server_error() => "unavailable",
        Err(_) => "refused",
    };
    app.jobs
        .metrics
        .submitted
        .with_label_values(&[outcome])
        .inc();
    let Accepted {
        id,
        status,
        position,
    } = result?;
    crash_point("submit.unanswered");
    let location = HeaderValue::try_from(format!("/v2/tasks/{id}"))
        .map_err(|error| ServiceError::internal(&error))?;
    if accepts_events(&headers) {
        let mut response = stream(&app, id, None).await?;
        response.headers_mut().insert(LOCATION, location);
        return Ok(response);
    }
    let accepted = TaskAccepted {
        job_id: id,
        status,
        queue_position: position,
        events_url: events_url(id),
    };
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], Json(accepted)).into_response())
}

async fn accept(
    app: &App,
    caller: Caller,
    headers: &HeaderMap,
    body: ServiceResult<Json<TaskSubmitRequest>>,
) -> ServiceResult<Accepted> {
    let Json(request) = body.map_err(|error| match error.body().hint {
        Some(_) => error,
        None => error.hint(
            r#"send a task such as {"model": "smollm2-135m", "prompt": "Hello"}, of at most 4 MiB"#,
        ),
    })?;
    // Read this first, because `validate` draws a missing seed.
    let seed_given = request.seed.is_some();
    let spec = request
        .validate()
        .map_err(|refusal| error::validation(&refusal))?;
    let key = idempotency_key(caller, headers, &spec, seed_given)?;
    crash_point("submit.parsed");
    let correlation = CorrelationId::current().unwrap_or_else(CorrelationId::random);
    let app = Arc::clone(app);
    let submitted = complete(async move {
        let (fleet, catalog) = (&app.fleet, &app.catalog);
        app.jobs
            .submit(fleet, catalog, spec, key, correlation.as_str())
            .await
    });
    let submitted = submitted.await;
    Ok(submitted.map_err(|error| ServiceError::internal(&error))??)
}

/// Returns the request's `Idempotency-Key` with the fingerprint of the validated request.
fn idempotency_key(
    caller: Caller,
    headers: &HeaderMap,
    spec: &JobSpec,
    seed_given: bool,
) -> ServiceResult<Option<IdempotencyKey>> {
    let given = only(headers, "idempotency-key").map_err(|TwiceGiven| {
        error::invalid("the request has more than one `Idempotency-Key`")
            .hint("send exactly one; repetitions of a request carry the same key")
    })?;
    let Some(value) = given else {
        return Ok(None);
    };
    let fits = |key: &&str| {
        (1..=255).contains(&key.len()) && key.bytes().all(|b| (b' '..=b'~').contains(&b))
    };
    let key = value.to_str().ok().filter(fits).ok_or_else(|| {
        error::invalid("`Idempotency-Key` must be 1 to 255 printable ASCII characters")
            .hint("use a UUID, for example")
    })?;
    let fingerprint =
        Fingerprint::of(spec, seed_given).map_err(|error| ServiceError::internal(&error))?;
    let caller = match caller {
        Caller::Anonymous => "anonymous",
        Caller::Operator => "operator",
        Caller::Scoped(name) => name,
    };
    Ok(Some(IdempotencyKey {
        caller: caller.to_owned(),
        key: key.to_owned(),
        fingerprint,
    }))
}

/// Returns a header that may be given once. Of two values, it is unclear which one is meant, and a proxy in front may have
/// acted on the other.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a HeaderValue>, TwiceGiven> {
    let mut given = headers.get_all(name).iter();
    let first = given.next();
    given.next().map_or(Ok(first), |_| Err(TwiceGiven))
}

/// Error for a header that is given more than once.
#[derive(Debug, thiserror::Error)]
#[error("it is given more than once")]
struct TwiceGiven;

fn accepts_events(headers: &HeaderMap) -> bool {
    let accepted = headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .filter_map(|range| range.split(';').next())
        .any(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// Time after which clients reconnect when the daemon has stopped.
const RETRY: Duration = Duration::from_secs(1);

/// Returns the events after `after`, or all of them. For a finished job, an id equal to the last event gets `204` and a
/// later id `400`; deleted events get `410`.
async fn stream(app: &App, id: JobId, after: Option<EventId>) -> ServiceResult<Response> {
    let Some(feed) = app.jobs.follow(id, after).await? else {
        return Ok(nothing_follows());
    };
    let events = feed.map(|item| Ok::<_, Infallible>(sse_event(&item)));
    let silence = Duration::from_secs(app.config.service.keep_alive_s);
    let mut response = sse::Sse::new(events)
        .keep_alive(sse::KeepAlive::new().interval(silence))
        .into_response();
    // Proxies that collect an answer before they pass it on would undo the streaming.
    response
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn sse_event(item: &Feed) -> sse::Event {
    let named = |event: &TaskEvent| sse::Event::default().event(event.name()).data(event.data());
    match item {
        Feed::Logged(entry) => named(&entry.event).id(entry.id.to_string()),
        Feed::Momentary(event) => named(event),
        Feed::Stopping => {
            let message = "orchestratord is stopping; the job continues, and its events follow after the restart";
            let message = message.to_owned();
            named(&TaskEvent::Shutdown(ShutdownNotice { message })).retry(RETRY)
        }
    }
}

/// Returns the answer that ends a browser's `EventSource`, which takes the end of a stream for a broken connection and
/// reconnects forever.
fn nothing_follows() -> Response {
    (StatusCode::NO_CONTENT, [(CACHE_CONTROL, "no-store")]).into_response()
}

fn parse_id(id: &str) -> ServiceResult<JobId> {
    id.parse().map_err(|_| error::no_job(id))
}

/// Parameters of `GET /v2/tasks`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only jobs in one of these states, separated by commas.
    #[param(value_type = Option<Vec<JobStatus>>, style = Form, explode = false, min_items = 1, nullable = false)]
    status: Option<String>,
    /// Only jobs of this model.
    #[param(value_type = Option<ModelRef>, nullable = false)]
    model: Option<String>,
    /// Only jobs of this class.
    #[param(value_type = Option<Priority>, nullable = false)]
    priority: Option<String>,
    /// Only jobs whose id begins with this text, with or without `job-`.
    #[param(
        pattern = "^(job-)?([0-9a-f]{1,8}|[0-9a-f]{8}(-[0-9a-f]{4}){0,2}-[0-9a-f]{1,4}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{1,12})$",
        nullable = false
    )]
    id_prefix: Option<String>,
    /// Include `total`, the number of jobs on all pages.
    #[param(nullable = false)]
    count: Option<bool>,
    /// Include `short_id` in each job.
    #[param(nullable = false)]
    short_ids: Option<bool>,
    /// Number of jobs on a page.
    #[param(default = 50, minimum = 1, maximum = 500, nullable = false)]
    limit: Option<u32>,
    /// `next_cursor` of the previous page.
    #[param(value_type = Option<JobId>, nullable = false)]
    cursor: Option<String>,
}

/// Lists jobs, newest first, without their texts.
#[utoipa::path(
    get, path = "/v2/tasks", tag = "tasks", params(ListQuery),
    responses((status = 200, body = TaskList), (status = 400, description = "A parameter is unknown or out of range."))
)]
pub(super) async fn list(
    State(app): State<App>,
    Query(query): Query<ListQuery>,
) -> ServiceResult<Json<TaskList>> {
    let limit = query.limit.unwrap_or(LIST_DEFAULT);
    if !(1..=LIST_MAX).contains(&limit) {
        return Err(
            error::invalid(format!("`limit` is out of range: {limit}")).hint("use 1 to 500")
        );
    }
    let before = query.cursor.as_deref().map(str::parse::<JobId>).transpose();
    let before = before.map_err(|_| {
        error::invalid("`cursor` can't be read").hint("use the `next_cursor` of the previous page")
    })?;
    let statuses = query.status.as_deref().map_or(Ok(Vec::new()), statuses)?;
    let prefix = query.id_prefix.as_deref().map(id_prefix).transpose()?;
    let priority = query
        .priority
        .as_deref()
        .map(str::parse::<Priority>)
        .transpose();
    let model = query
        .model
        .as_deref()
        .map(str::parse::<ModelRef>)
        .transpose();
    let model = model.map_err(|error| error::invalid(error.to_string()).hint(error.hint()))?;
    let filter = ListFilter {
        statuses,
        priority: priority.map_err(|error| error::invalid(error.to_string()))?,
        model: model.map(|model| model.to_string()),
        prefix,
        before,
        // One job more than the page holds shows whether another page follows.
        limit: limit + 1,
        short_ids: query.short_ids == Some(true),
    };
    let total = match query.count {
        Some(true) => Some(app.jobs.store.count(&filter).await?),
        _ => None,
    };
    let mut jobs = app.jobs.store.list(&filter).await?;
    let more = jobs.len() > limit as usize;
    jobs.truncate(limit as usize);
    let next_cursor = jobs.last().filter(|_| more).map(|job| job.id.to_string());
    Ok(Json(TaskList {
        jobs,
        next_cursor,
        total,
    }))
}

/// Parses the `id_prefix` of a list. Like an id, a prefix has one spelling.
fn id_prefix(text: &str) -> ServiceResult<JobIdPrefix> {
    let read = text.parse::<JobIdPrefix>().ok();
    let spelled = |prefix: &JobIdPrefix| {
        prefix.as_str() == text || prefix.as_str().strip_prefix("job-") == Some(text)
    };
    read.filter(spelled).ok_or_else(|| {
        error::invalid("`id_prefix` is not the beginning of a job id")
            .hint("use the first characters of an id, such as `job-019abcde-f0`")
    })
}

/// Parses the states in a list's `status`.
fn statuses(text: &str) -> ServiceResult<Vec<JobStatus>> {
    text.split(',')
        .map(|name| name.parse::<JobStatus>())
        .collect::<Result<_, _>>()
        .map_err(|error| error::invalid(error.to_string()))
}

/// Returns a job with its text so far.
#[utoipa::path(
    get, path = "/v2/tasks/{id}", tag = "tasks", params(("id" = JobId, Path, description = "Id of the job.")),
    responses((status = 200, body = TaskView), (status = 404, description = "There is no such job."))
)]
pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ServiceResult<Json<TaskView>> {
    let id = parse_id(&id)?;
    let view = app.jobs.view(id).await?;
    view.map(Json).ok_or_else(|| error::no_job(&id.to_string()))
}

/// Explains why a job waits, what would end the wait, and why its attempts were placed as they were.
#[utoipa::path(
    get, path = "/v2/tasks/{id}/explain", tag = "tasks", params(("id" = JobId, Path, description = "Id of the job.")),
    responses((status = 200, body = TaskExplanation), (status = 404, description = "There is no such job."))
)]
pub(super) async fn explain(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ServiceResult<Json<TaskExplanation>> {
    let id = parse_id(&id)?;
    let explanation = app.jobs.explain(&app.fleet, id).await?;
    explanation
        .map(Json)
        .ok_or_else(|| error::no_job(&id.to_string()))
}

/// Streams a job's events, from the start or after `Last-Event-ID`, until the job is over. Any number of readers may follow.
///
/// A reader that is too slow is closed with `lagged`, and can reconnect.
#[utoipa::path(
    get, path = "/v2/tasks/{id}/events", tag = "tasks",
    params(
        ("id" = JobId, Path, description = "Id of the job."),
        ("Last-Event-ID" = Option<String>, Header, pattern = "^[0-9]{1,9}[.][0-9]{1,19}$", description = "The `id:` of the last event that the reader has. If it is ahead of the log, the stream waits while the job is live."),
    ),
    responses(
        (status = 200, description = document::STREAM, body = String, content_type = "text/event-stream"),
        (status = 204, description = "`Last-Event-ID` is that of the job's last event: no event follows, and there is no reason to reconnect."),
        (status = 400, description = "`Last-Event-ID` is malformed, or after the last event of a job that has ended."),
        (status = 404, description = "There is no such job."),
        (status = 410, description = "The job's texts were dropped after `retention`."),
    )
)]
pub(super) async fn events(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> ServiceResult<Response> {
    let id = parse_id(&id)?;
    let given = only(&headers, "last-event-id").map_err(error::malformed_event_id)?;
    let after = match given {
        None => None,
        Some(value) => Some(
            value
                .to_str()
                .unwrap_or_default()
                .parse::<EventId>()
                .map_err(error::malformed_event_id)?,
        ),
    };
    stream(&app, id, after).await
}

/// Cancels a job. The first terminal state wins; the answer names the state that was committed.
#[utoipa::path(
    post, path = "/v2/tasks/{id}/cancel", tag = "tasks", params(("id" = JobId, Path, description = "Id of the job.")),
    responses((status = 200, body = CancelResponse), (status = 404, description = "There is no such job."))
)]
pub(super) async fn cancel(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ServiceResult<Json<CancelResponse>> {
    let id = parse_id(&id)?;
    let cancelled = complete(async move { app.jobs.cancel(id).await }).await;
    let status = cancelled.map_err(|error| ServiceError::internal(&error))??;
    let status = status.ok_or_else(|| error::no_job(&id.to_string()))?;
    Ok(Json(CancelResponse { job_id: id, status }))
}

/// Cancels a job as `POST /v2/tasks/{id}/cancel` does: the job ends, and its record stays.
#[utoipa::path(
    delete, path = "/v2/tasks/{id}", tag = "tasks", params(("id" = JobId, Path, description = "Id of the job.")),
    responses((status = 200, body = CancelResponse), (status = 404, description = "There is no such job."))
)]
pub(super) async fn delete(
    app: State<App>,
    id: Path<String>,
) -> ServiceResult<Json<CancelResponse>> {
    cancel(app, id).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(caller: Caller, seed: Option<u64>) -> IdempotencyKey {
        let request = TaskSubmitRequest {
            model: "m".into(),
            prompt: Some("p".into()),
            seed,
            ..TaskSubmitRequest::default()
        };
        let headers = HeaderMap::from_iter([(
            "idempotency-key".parse().unwrap(),
            HeaderValue::from_static("k"),
        )]);
        let key = idempotency_key(
            caller,
            &headers,
            &request.validate().unwrap(),
            seed.is_some(),
        );
        key.unwrap().unwrap()
    }

    // [ORCHD-014] P2
    #[test]
    fn a_key_belongs_to_its_credential_and_to_what_was_asked() {
        let mine = key_of(Caller::Operator, None);
        assert_eq!(
            mine,
            key_of(Caller::Operator, None),
            "a drawn seed makes no difference"
        );
        assert_ne!(mine.caller, key_of(Caller::Anonymous, None).caller);
        assert_ne!(mine.caller, key_of(Caller::Scoped("pool"), None).caller);
        assert_ne!(
            mine.fingerprint,
            key_of(Caller::Operator, Some(1)).fingerprint
        );
    }

    // [ORCHD-020]
    #[test]
    fn a_stream_is_asked_for_by_its_name_alone() {
        for (accept, asked) in [
            ("text/event-stream", true),
            ("application/json, Text/Event-Stream;q=0.9", true),
            ("text/event-streams", false),
            ("*/*", false),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(accepts_events(&headers), asked, "{accept}");
        }
    }
}
