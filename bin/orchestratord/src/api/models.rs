//! `/v2/models`: the models that tasks may name.

use std::collections::BTreeMap;

use axum::extract::State;
use orchestrator_core::api::models::{ModelList, ModelView};
use pool_core::kit::service::Json;

use crate::app::App;
use crate::clock;
use crate::jobs::unsupported;

/// Lists the models of the catalogue and of the pools, each with the pools that have it.
#[utoipa::path(get, path = "/v2/models", tag = "fleet", responses((status = 200, body = ModelList)))]
pub(super) async fn list(State(app): State<App>) -> Json<ModelList> {
    let mut on_pools: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pool in app.fleet.views(clock::now()) {
        for model in pool.status.iter().flat_map(|status| &status.models) {
            on_pools
                .entry(model.model_ref.to_string())
                .or_default()
                .push(pool.id.clone());
        }
    }
    let known = app.catalog.iter().map(|entry| {
        let unsupported = unsupported(&app.fleet, &entry.model_ref(), Some(entry));
        ModelView {
            runnable: unsupported.is_none(),
            unsupported,
            pools: on_pools.remove(&entry.id).unwrap_or_default(),
            model_ref: entry.model_ref(),
            name: Some(entry.name.clone()),
            architecture: entry.architecture.clone(),
            quantization: entry.quantization.clone(),
            size_bytes: entry.size_bytes,
            context_length: entry.context_length,
            license: entry.license.clone(),
            default: entry.default,
        }
    });
    let mut models: Vec<_> = known.collect();
    let others = on_pools.into_iter().filter_map(|(name, pools)| {
        let model = name.parse().ok()?;
        let reason = unsupported(&app.fleet, &model, None);
        Some(ModelView::uncatalogued(model, reason, pools))
    });
    models.extend(others);
    Json(ModelList { models })
}
