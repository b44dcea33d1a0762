//! The models as the orchestrator shows them.

use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

/// A model as `GET /v2/models` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelView {
    /// How tasks name it.
    pub model_ref: ModelRef,
    /// Name for people.
    pub name: Option<String>,
    /// Architecture as GGUF files spell it.
    pub architecture: Option<String>,
    /// Quantization for people.
    pub quantization: Option<String>,
    /// Exact size of the file.
    pub size_bytes: Option<u64>,
    /// Tokens of context that the model was trained for.
    pub context_length: Option<u32>,
    /// Licence for people.
    pub license: Option<String>,
    /// Whether commands that name no model mean this one.
    pub default: bool,
    /// True if a worker can run the model: as reported by the pools that have it, else by the catalogue's architecture.
    #[serde(default = "runnable")]
    pub runnable: bool,
    /// Reason why no worker can run the model; absent if one can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsupported: Option<String>,
    /// The pools that have it on their disks.
    pub pools: Vec<String>,
}

/// Returns the default of a field that earlier versions do not send.
fn runnable() -> bool {
    true
}

impl ModelView {
    /// A model of which no catalogue says anything.
    pub fn uncatalogued(
        model_ref: ModelRef,
        unsupported: Option<String>,
        pools: Vec<String>,
    ) -> Self {
        Self {
            model_ref,
            name: None,
            architecture: None,
            quantization: None,
            size_bytes: None,
            context_length: None,
            license: None,
            default: false,
            runnable: unsupported.is_none(),
            unsupported,
            pools,
        }
    }
}

/// Answer of `GET /v2/models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelList {
    /// The catalogue in its order, then what else pools have.
    pub models: Vec<ModelView>,
}
