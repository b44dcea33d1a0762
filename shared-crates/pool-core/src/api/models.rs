//! Model downloads: the events of `POST /models/download`. `llorch-pool models download --progress json` prints the same
//! events, one per line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ModelRef;
use crate::sse_events;

/// Body of `POST /models/download`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ModelDownloadRequest {
    /// Model to download: a catalogue id, or an `hf:` reference if the pool allows those.
    pub model: ModelRef,
}

/// The phase of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum DownloadPhase {
    /// Receiving bytes from a source.
    Downloading,
    /// Extracting the file from its wheel.
    Unpacking,
    /// Reading the whole file to compare its hash.
    Checking,
}

/// An event of a download: any number of `progress` and `waiting`, then exactly one `end` or `error`. In a line of JSON, the
/// `event` field holds the event's name; in an event stream, the stream's `event:` field holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum DownloadEvent {
    /// The download received, extracted or verified further bytes.
    Progress(DownloadProgress),
    /// Another process is downloading the same model.
    Waiting(DownloadWait),
    /// The file is complete, verified and in place.
    End(DownloadEnd),
    /// The download failed, and no file is in place.
    Error(DownloadFailure),
}

sse_events!(
    DownloadEvent { Progress: "progress", Waiting: "waiting", }
    last { End: "end", Error: "error", }
);

/// The progress of a download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadProgress {
    /// Current phase.
    pub phase: DownloadPhase,
    /// Bytes done in this phase, including those of an earlier download that this download resumes.
    pub done_bytes: u64,
    /// Bytes of the whole phase; `null` if unknown.
    pub total_bytes: Option<u64>,
    /// Recent throughput in bytes per second.
    pub bytes_per_s: u64,
}

/// A wait for another download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadWait {
    /// Human-readable reason for the wait.
    pub message: String,
}

/// The result of a successful download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadEnd {
    /// Reference that tasks use for the model.
    pub model_ref: ModelRef,
    /// Path of the file on the pool's host.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub path: PathBuf,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// True if the file was already in place.
    pub already_there: bool,
}

/// The reason a download produced no file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadFailure {
    /// Kind of failure.
    pub code: DownloadErrorCode,
    /// Human-readable reason.
    pub message: String,
    /// Suggested remedy; absent if none is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// True if a retry of the same request may succeed.
    pub retriable: bool,
}

/// Kinds of download failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DownloadErrorCode {
    /// No source has the model.
    ModelNotFound,
    /// The disk has too little free space.
    NoSpace,
    /// The source's file is not the model: wrong size, hash or header.
    WrongFile,
    /// No worker of this version can run the model.
    ModelUnsupported,
    /// The source requires a token, or rejects the token that was sent.
    SourceRefused,
    /// No source could be reached.
    SourceUnreachable,
    /// The download was interrupted; the bytes received are kept.
    Interrupted,
    /// Any other failure, such as a broken network connection.
    DownloadFailed,
}

impl DownloadErrorCode {
    /// Returns whether a retry of the same request may succeed without any change by the operator.
    pub fn is_retriable(self) -> bool {
        match self {
            Self::Interrupted | Self::SourceUnreachable | Self::DownloadFailed => true,
            Self::ModelNotFound
            | Self::NoSpace
            | Self::WrongFile
            | Self::ModelUnsupported
            | Self::SourceRefused => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::sse::SseEvent as _;

    #[test] // [POOLCTL-019]
    fn a_line_carries_the_name_of_its_event() {
        let lines = [
            DownloadEvent::Progress(DownloadProgress {
                phase: DownloadPhase::Checking,
                done_bytes: 1,
                total_bytes: None,
                bytes_per_s: 3,
            }),
            DownloadEvent::Waiting(DownloadWait {
                message: "for m".into(),
            }),
            DownloadEvent::End(DownloadEnd {
                model_ref: "m".parse().unwrap(),
                path: "/models/m/m.gguf".into(),
                size_bytes: 7,
                sha256: "ab".into(),
                already_there: false,
            }),
            DownloadEvent::Error(DownloadFailure {
                code: DownloadErrorCode::NoSpace,
                message: "full".into(),
                hint: None,
                retriable: false,
            }),
        ];
        let text: Vec<String> = lines
            .iter()
            .map(|line| serde_json::to_string(line).unwrap())
            .collect();
        for (line, text) in lines.iter().zip(&text) {
            assert_eq!(serde_json::from_str::<DownloadEvent>(text).unwrap(), *line);
            assert!(text.contains(&format!("\"event\":\"{}\"", line.name())));
        }
        insta::assert_snapshot!(text.join("\n"), @r#"
        {"event":"progress","phase":"checking","done_bytes":1,"total_bytes":null,"bytes_per_s":3}
        {"event":"waiting","message":"for m"}
        {"event":"end","model_ref":"m","path":"/models/m/m.gguf","size_bytes":7,"sha256":"ab","already_there":false}
        {"event":"error","code":"NO_SPACE","message":"full","retriable":false}
        "#);
    }
}
