//! Conversion of domain errors into responses. Only this module picks their status codes.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use pool_core::ModelRef;
use pool_core::api::pool::PoolErrorCode;
use pool_core::api::worker::WorkerErrorCode;
use pool_core::catalog::store::ResolveError;
use pool_core::kit::client::ClientError;
use pool_core::kit::service::{ServiceError, codes};
use pool_core::lifecycle::{HealthRefused, ObserveError, SpawnError, StopError};
use pool_core::registry::RegistryError;
use pool_core::worker::WorkerInfo;
use serde_json::json;

use crate::downloads::DownloadRefused;

/// Time after which a client may ask again for a model under download.
const DOWNLOAD_RETRY: Duration = Duration::from_secs(5);

/// An error response to the client.
pub struct ApiError(ServiceError);

/// Result of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

fn error(code: PoolErrorCode, message: impl Into<String>) -> ServiceError {
    use PoolErrorCode as C;
    let status = match code {
        C::InvalidRequest | C::ModelNotAllowed => StatusCode::BAD_REQUEST,
        C::ModelUnsupported => StatusCode::UNPROCESSABLE_ENTITY,
        C::ModelNotFound | C::ModelNotDownloaded | C::WorkerNotFound => StatusCode::NOT_FOUND,
        C::BackendUnavailable | C::NoDevice | C::NotThisWorker | C::PortTaken | C::WorkerEnded => {
            StatusCode::CONFLICT
        }
        C::WorkerUnreachable => StatusCode::BAD_GATEWAY,
        C::OutOfMemory | C::NoPort | C::PoolDraining | C::NoDownloader => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        C::SpawnFailed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    ServiceError::new(status, code.as_str(), message)
}

impl ApiError {
    /// Returns the error for a worker id that no worker has.
    pub fn no_worker(id: &str) -> Self {
        StopError::Unknown {
            id: id.chars().take(80).collect(),
        }
        .into()
    }

    /// Returns the error for a job id that no execution can have.
    pub fn no_execution(job_id: &str) -> Self {
        let shown: String = job_id.chars().take(80).collect();
        Self(ServiceError::new(
            StatusCode::NOT_FOUND,
            WorkerErrorCode::NotFound.as_str(),
            format!("there is no execution of `{}`", shown.escape_debug()),
        ))
    }

    /// Returns the error for a worker that has ended and executes nothing any more.
    pub fn worker_ended(worker: &WorkerInfo) -> Self {
        Self(
            error(
                PoolErrorCode::WorkerEnded,
                format!("{} has ended", worker.id),
            )
            .hint("list the running workers with `GET /workers`"),
        )
    }

    /// Returns the error for a worker that has not reported ready. The worker itself would answer the same.
    pub fn worker_loading(worker: &WorkerInfo) -> Self {
        Self(
            ServiceError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                WorkerErrorCode::Loading.as_str(),
                format!("{} is still loading its model", worker.id),
            )
            .hint("check its progress with `GET /workers`")
            .retry_after(Duration::from_secs(1)),
        )
    }

    /// Returns the error for a worker that a request can't be relayed to. Logs the cause.
    pub fn worker_unreachable(id: &str, cause: &ClientError) -> Self {
        tracing::warn!(worker = id, error = %cause, "could not relay a request");
        Self(
            error(
                PoolErrorCode::WorkerUnreachable,
                format!("{id} does not answer"),
            )
            .retriable(true)
            .hint("check its status with `GET /workers`"),
        )
    }

    /// Returns the refusal of a model that is being downloaded.
    pub fn downloading(model: &ModelRef) -> Self {
        let code = PoolErrorCode::ModelNotDownloaded.as_str();
        let message = format!("the model `{model}` is being downloaded");
        Self(
            ServiceError::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
                .hint(
                    "follow the download with `POST /models/download`, and retry when it has ended",
                )
                .retry_after(DOWNLOAD_RETRY),
        )
    }

    /// Returns the error for a request cut short because the daemon stops before the worker has answered.
    pub fn stopping() -> Self {
        Self(
            ServiceError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                codes::STOPPING,
                "the pool manager is stopping; the worker continues",
            )
            .hint("retry when the pool manager is back: the request attaches to an execution that has begun")
            .retry_after(Duration::from_secs(1)),
        )
    }

    /// Returns the error for a worker report without the worker's secret.
    pub fn not_a_worker() -> Self {
        Self(
            ServiceError::new(
                StatusCode::UNAUTHORIZED,
                codes::UNAUTHORIZED,
                "only a worker of this pool may report itself",
            )
            .hint("send the secret from the worker's environment as the bearer token"),
        )
    }

    /// Returns the error for an invalid value in a request, such as a number outside its range.
    pub fn out_of_range(message: String) -> Self {
        Self(error(PoolErrorCode::InvalidRequest, message))
    }

    /// Returns the error for a fault of the daemon itself.
    pub fn internal(cause: &(dyn std::error::Error + 'static)) -> Self {
        Self(ServiceError::internal(cause))
    }
}

impl From<SpawnError> for ApiError {
    fn from(spawn: SpawnError) -> Self {
        use {PoolErrorCode as C, ResolveError as R, SpawnError as S};
        let code = match &spawn {
            S::Registry(cause) => return Self::internal(cause),
            S::MemoryUnknown(_) | S::Model(R::Io { .. }) => return Self::internal(&spawn),
            S::Model(R::Unknown { .. } | R::NotCatalogued { .. } | R::Missing { .. }) => {
                C::ModelNotFound
            }
            S::Model(R::NotDownloaded { .. }) => C::ModelNotDownloaded,
            S::Unsupported { .. } => C::ModelUnsupported,
            S::Model(R::Forbidden { .. }) => C::ModelNotAllowed,
            S::Model(R::NotAFile { .. } | R::Ambiguous { .. })
            | S::Slots { .. }
            | S::Context { .. }
            | S::GpuWithCpu
            | S::PortZero => C::InvalidRequest,
            S::NoDevice { .. } | S::DeviceDown { .. } => C::NoDevice,
            S::NoProgram { .. } => C::BackendUnavailable,
            S::MemoryShort(_) => C::OutOfMemory,
            S::NoPort { .. } => C::NoPort,
            S::PortTaken { .. } => C::PortTaken,
            S::Draining { .. } => C::PoolDraining,
            S::Exec { .. } => C::SpawnFailed,
        };
        let cause = std::error::Error::source(&spawn)
            .filter(|_| code == C::SpawnFailed)
            .map(|cause| format!(": {cause}"));
        let mut answer = error(code, format!("{spawn}{}", cause.unwrap_or_default()));
        if let S::MemoryShort(short) = &spawn {
            answer = answer.retriable(short.needed_bytes <= short.total_bytes).details(json!({
                "device": short.device, "needed_bytes": short.needed_bytes, "free_bytes": short.free_bytes,
                "total_bytes": short.total_bytes, "stop": short.stop,
            }));
        }
        Self(match spawn.hint() {
            Some(hint) => answer.hint(hint),
            None => answer,
        })
    }
}

impl From<DownloadRefused> for ApiError {
    fn from(refused: DownloadRefused) -> Self {
        use {DownloadRefused as D, PoolErrorCode as C, ResolveError as R};
        let code = match &refused {
            D::Model(R::Io { .. }) => return Self::internal(&refused),
            D::Model(R::Unknown { .. } | R::NotCatalogued { .. }) => C::ModelNotFound,
            D::Unsupported { .. } => C::ModelUnsupported,
            D::HubNotAllowed { .. } => C::ModelNotAllowed,
            D::Model(_) | D::NowhereFrom { .. } => C::InvalidRequest,
            D::NoProgram => C::NoDownloader,
        };
        let answer = error(code, refused.to_string());
        Self(match refused.hint() {
            Some(hint) => answer.hint(hint),
            None => answer,
        })
    }
}

impl From<StopError> for ApiError {
    fn from(stop: StopError) -> Self {
        let answer = match &stop {
            StopError::Unknown { .. } => error(PoolErrorCode::WorkerNotFound, stop.to_string()),
            StopError::Registry(cause) => return Self::internal(cause),
            StopError::Signal { .. } | StopError::Unstoppable { .. } => {
                return Self::internal(&stop);
            }
        };
        Self(match stop.hint() {
            Some(hint) => answer.hint(hint),
            None => answer,
        })
    }
}

impl From<ObserveError> for ApiError {
    fn from(observe: ObserveError) -> Self {
        match &observe {
            ObserveError::Refused(HealthRefused::Stranger { .. } | HealthRefused::Over { .. }) => {
                Self(error(PoolErrorCode::NotThisWorker, observe.to_string()))
            }
            ObserveError::Registry(cause) => Self::internal(cause),
        }
    }
}

impl From<RegistryError> for ApiError {
    fn from(cause: RegistryError) -> Self {
        Self::internal(&cause)
    }
}
