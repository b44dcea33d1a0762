//! `POST /shutdown`.

use axum::extract::State;
use axum::http::StatusCode;

use super::App;

/// 202: the worker takes no more jobs, finishes what runs within its limit, and ends. As SIGTERM does.
pub async fn shutdown(State(app): State<App>) -> StatusCode {
    app.shutdown.trigger();
    StatusCode::ACCEPTED
}
