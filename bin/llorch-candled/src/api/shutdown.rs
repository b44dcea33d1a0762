//! `POST /shutdown`.

use axum::extract::State;
use axum::http::StatusCode;

use super::App;

/// Stops the worker as SIGTERM does: 202, then it refuses new jobs, lets running ones finish within the grace period, and
/// exits.
pub async fn shutdown(State(app): State<App>) -> StatusCode {
    app.shutdown.trigger();
    StatusCode::ACCEPTED
}
