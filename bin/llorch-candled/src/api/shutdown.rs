//! `POST /shutdown`.

use axum::extract::State;
use axum::http::StatusCode;

use super::App;

/// Answers 202 and stops the worker as SIGTERM does: new jobs are refused, running ones may finish within the grace period, and
/// the process exits.
pub async fn shutdown(State(app): State<App>) -> StatusCode {
    app.shutdown.trigger();
    StatusCode::ACCEPTED
}
