//! Downloads of models: the events of `POST /models/download`, which `llorch-pool models download --progress json`
//! prints one a line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ModelRef;

/// Body of `POST /models/download`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ModelDownloadRequest {
    /// The model: a catalogue id, or an `hf:` reference where the pool allows it.
    pub model: ModelRef,
}

/// What a download is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum DownloadPhase {
    /// Bytes come from a source.
    Downloading,
    /// The file is taken out of its wheel.
    Unpacking,
    /// The whole file is read and compared with its hash.
    Checking,
}

/// What happens in a download: any number of `progress` and `waiting`, then exactly one `end` or `error`. As a line of
/// JSON it carries its name as `event`; in an event stream the name is the event's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum DownloadEvent {
    /// It moves.
    Progress {
        /// What it does.
        phase: DownloadPhase,
        /// Bytes done in this phase, those of an earlier download that it goes on from included.
        done_bytes: u64,
        /// Bytes of the phase in all, where anybody knows.
        total_bytes: Option<u64>,
        /// Bytes in each second lately.
        bytes_per_s: u64,
    },
    /// Another process downloads the same model.
    Waiting {
        /// For what, as people read it.
        message: String,
    },
    /// The file is whole, checked and in place.
    End(DownloadEnd),
    /// There is no file.
    Error(DownloadFailure),
}

impl DownloadEvent {
    /// Its name in an event stream.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Progress { .. } => "progress",
            Self::Waiting { .. } => "waiting",
            Self::End(_) => "end",
            Self::Error(_) => "error",
        }
    }

    /// Whether nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::End(_) | Self::Error(_))
    }
}

/// How a download ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadEnd {
    /// How tasks name the model.
    pub model_ref: ModelRef,
    /// The file on its host.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
    /// Whether it was there before.
    pub already_there: bool,
}

/// Why a download gave no file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadFailure {
    /// The kind of reason.
    pub code: DownloadErrorCode,
    /// The reason for people.
    pub message: String,
    /// What to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the same request may do better later.
    pub retriable: bool,
}

/// Kinds of reasons for which a download gives no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DownloadErrorCode {
    /// No source has the model.
    ModelNotFound,
    /// The disk has too little room.
    NoSpace,
    /// What a source gave is not the model: wrong size, hash or header.
    WrongFile,
    /// No worker of this version can run the model.
    ModelUnsupported,
    /// The source wants a token, or another one.
    SourceRefused,
    /// No source could be reached.
    SourceUnreachable,
    /// The download was told to end; what had come is kept.
    Interrupted,
    /// Anything else, as a network that is away.
    DownloadFailed,
}

impl DownloadErrorCode {
    /// Whether the same request may do better later without anybody mending anything.
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

    #[test] // [POOLCTL-019]
    fn a_line_carries_the_name_of_its_event() {
        let lines = [
            DownloadEvent::Progress {
                phase: DownloadPhase::Checking,
                done_bytes: 1,
                total_bytes: None,
                bytes_per_s: 3,
            },
            DownloadEvent::Waiting {
                message: "for m".into(),
            },
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
