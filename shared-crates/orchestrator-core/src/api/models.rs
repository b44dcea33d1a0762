//! Models as the orchestrator's API shows them.

use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

/// A model in `GET /v2/models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelView {
    /// Reference by which tasks name the model.
    pub model_ref: ModelRef,
    /// Name for people; `None` if no catalogue gives one.
    pub name: Option<String>,
    /// Architecture, spelled as in GGUF files.
    pub architecture: Option<String>,
    /// Quantization, for people.
    pub quantization: Option<String>,
    /// Exact size of the file in bytes.
    pub size_bytes: Option<u64>,
    /// Context length that the model was trained for, in tokens.
    pub context_length: Option<u32>,
    /// Licence, for people.
    pub license: Option<String>,
    /// True if commands that name no model use this one.
    pub default: bool,
    /// True if a worker can run the model, as reported by the pools that have it, otherwise judged by the catalogue's
    /// architecture.
    #[serde(default = "runnable")]
    pub runnable: bool,
    /// Reason why no worker can run the model; absent if one can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsupported: Option<String>,
    /// Names of the pools that have the model on disk.
    pub pools: Vec<String>,
}

/// Returns the default for answers of earlier versions, which lack the field.
fn runnable() -> bool {
    true
}

impl ModelView {
    /// Returns a model that is in no catalogue.
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
    /// Catalogue models in catalogue order, followed by other models found on pools.
    pub models: Vec<ModelView>,
}
