//! Table of settings with their values and sources.

use serde_json::Value;

use super::{CliError, print_table};
use crate::kit::settings::Setting;

/// Prints each setting with its value and its source.
pub fn print_settings(settings: &[Setting]) -> Result<(), CliError> {
    let rows = settings.iter().map(|setting| {
        let value = match &setting.value {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        let origin = setting.origin.clone();
        let origin = origin.unwrap_or_else(|| setting.source.to_owned());
        vec![setting.key.clone().into(), value.into(), origin.into()]
    });
    print_table(&["KEY", "VALUE", "SOURCE"], rows)
}
