//! The comparison of a job with its replay.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use orchestrator_core::job::JobId;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::StopReason;
use pool_core::kit::terminal::paint::Cell;
use pool_core::kit::terminal::render_table;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::commands::jobs::short_hash;

/// Fields of a receipt that are results: they say that texts differ, not why.
const RESULTS: [&str; 2] = ["output_tokens", "output_sha256"];

/// Causes of different tokens, the strongest first, with the fields of receipts that show them.
const CAUSES: [(&str, &[&str]); 6] = [
    ("the model file differs", &["model_sha256"]),
    (
        "the tokenizer or the chat template differs, so the prompt has different tokens",
        &["tokenizer_sha256", "chat_template_sha256"],
    ),
    (
        "the prompt has different tokens, although tokenizer and chat template are the same: a template may insert the date",
        &["prompt_sha256", "prompt_tokens"],
    ),
    (
        "the settings differ",
        &[
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "seed",
            "max_tokens",
            "stop_sha256",
        ],
    ),
    (
        "the class of arithmetic differs, so results may be rounded differently",
        &["arithmetic", "earlier_arithmetic"],
    ),
    ("the worker version differs", &["engine"]),
];
const UNEXPLAINED: &str = "the receipts have the same inputs, so the tokens should be the same";
const NO_RECEIPT: &str = "a receipt is missing, so only the texts were compared";

/// The text of a completed job.
pub struct Text {
    /// Id of the job.
    pub id: JobId,
    /// Texts of its `token` events, by index.
    pub pieces: Vec<String>,
    /// Generated tokens.
    pub tokens: u32,
    /// Reason for the end of the text.
    pub stop_reason: StopReason,
    /// Receipt of the job; `None` if it has none.
    pub receipt: Option<Box<Receipt>>,
}

/// A value in the original and in the replay.
#[derive(Debug, PartialEq, Serialize)]
pub struct Pair<T> {
    original: T,
    replay: T,
}

/// Basis of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Basis {
    /// Token ids, by the hashes of the receipts, and texts.
    Tokens,
    /// Only texts: a receipt is missing.
    Text,
}

/// The first `token` event that differs.
#[derive(Debug, PartialEq, Serialize)]
struct Difference {
    /// Index of the event, from 0.
    index: usize,
    /// Text of the event; `null` where the text had ended.
    #[serde(flatten)]
    text: Pair<Option<String>>,
}

/// A field of the receipts that differs.
#[derive(Debug, PartialEq, Serialize)]
struct Field {
    field: String,
    #[serde(flatten)]
    value: Pair<Value>,
}

/// The comparison, as `--format json` prints it.
#[derive(Debug, Serialize)]
pub struct Comparison {
    original: JobId,
    replay: JobId,
    /// True if the replay has the tokens of the original.
    pub same: bool,
    compared: Basis,
    tokens: Pair<u32>,
    stop_reason: Pair<StopReason>,
    /// `null` if the texts are equal, though the ids of their tokens may differ.
    first_difference: Option<Difference>,
    /// Inputs that differ, in the order of their names.
    receipt_differences: Vec<Field>,
    /// The likely cause of different tokens, or why nothing is known of it; `null` if there is nothing to explain.
    explanation: Option<&'static str>,
}

impl Comparison {
    /// Compares a job with its replay.
    pub fn of(original: Text, replay: Text) -> Self {
        let receipts = original.receipt.as_deref().zip(replay.receipt.as_deref());
        let same_ids = receipts.is_none_or(|(a, b)| a.output_sha256 == b.output_sha256);
        let same_text = original.pieces.concat() == replay.pieces.concat();
        let same = same_ids && same_text && original.tokens == replay.tokens;
        let receipt_differences = receipts.map_or(Vec::new(), |(a, b)| fields(a, b));
        let explanation = match (receipts, same) {
            (None, _) => Some(NO_RECEIPT),
            (_, true) => None,
            _ => Some(cause(&receipt_differences)),
        };
        let difference = (!same_text).then(|| first_difference(original.pieces, replay.pieces));
        Self {
            original: original.id,
            replay: replay.id,
            same,
            compared: receipts.map_or(Basis::Text, |_| Basis::Tokens),
            tokens: pair(original.tokens, replay.tokens),
            stop_reason: pair(original.stop_reason, replay.stop_reason),
            first_difference: difference,
            receipt_differences,
            explanation,
        }
    }

    /// Returns the comparison as lines for people.
    pub fn render(&self, colour: bool) -> String {
        let mut shown = self.verdict();
        if !self.receipt_differences.is_empty() {
            let rows = self.receipt_differences.iter().map(|field| {
                let Pair { original, replay } = &field.value;
                vec![
                    Cell::from(field.field.clone()),
                    Cell::from(short(original)),
                    Cell::from(short(replay)),
                ]
            });
            let table = render_table(&["RECEIPT", "ORIGINAL", "REPLAY"], rows, colour);
            // Writing to a `String` never fails.
            let _ = write!(shown, "\n\n{table}");
        }
        if let Some(explanation) = self.explanation {
            let _ = write!(shown, "\n\n{explanation}");
        }
        shown
    }

    fn verdict(&self) -> String {
        let Pair { original, replay } = &self.tokens;
        let tokens = if *original == 1 { "token" } else { "tokens" };
        if self.same && self.compared == Basis::Text {
            return format!("same text of {original} {tokens}");
        }
        if self.same {
            return format!("same {original} {tokens}");
        }
        let counts = format!("{original} {tokens} originally, {replay} in the replay");
        match &self.first_difference {
            None => format!("same text of different tokens: {counts}"),
            Some(Difference { index, text }) => format!(
                "different from token {index} on: {} originally, {} in the replay ({counts})",
                quoted(text.original.as_ref(), self.stop_reason.original),
                quoted(text.replay.as_ref(), self.stop_reason.replay),
            ),
        }
    }
}

fn pair<T>(original: T, replay: T) -> Pair<T> {
    Pair { original, replay }
}

/// Returns the first difference of two lists that are not equal.
fn first_difference(original: Vec<String>, replay: Vec<String>) -> Difference {
    let equal = original.iter().zip(&replay).take_while(|(a, b)| a == b);
    let index = equal.count();
    let at = |pieces: Vec<String>| pieces.into_iter().nth(index);
    let text = pair(at(original), at(replay));
    Difference { index, text }
}

/// Returns the inputs in which two receipts differ.
fn fields(original: &Receipt, replay: &Receipt) -> Vec<Field> {
    let (original, replay) = (values(original), values(replay));
    let names: BTreeSet<_> = original.keys().chain(replay.keys()).collect();
    let of =
        |values: &Map<String, Value>, name: &str| values.get(name).cloned().unwrap_or_default();
    names
        .into_iter()
        .filter(|name| !RESULTS.contains(&name.as_str()))
        .map(|name| Field {
            field: name.clone(),
            value: pair(of(&original, name), of(&replay, name)),
        })
        .filter(|field| field.value.original != field.value.replay)
        .collect()
}

/// Returns the fields of a receipt by name. Goes through JSON text, so that a 32-bit float becomes the same number as in other
/// output.
fn values(receipt: &Receipt) -> Map<String, Value> {
    let json = serde_json::to_string(receipt).unwrap_or_default();
    serde_json::from_str(&json).unwrap_or_default()
}

fn cause(differences: &[Field]) -> &'static str {
    let differs = |name: &&str| differences.iter().any(|field| field.field == *name);
    let found = CAUSES.iter().find(|(_, names)| names.iter().any(differs));
    found.map_or(UNEXPLAINED, |(cause, _)| cause)
}

/// Returns the text of a token in quotes, or how the text ended before it.
fn quoted(text: Option<&String>, stop_reason: StopReason) -> String {
    match text {
        // `Debug` escapes everything that a terminal would act on.
        Some(text) => format!("{text:?}"),
        None => {
            let reason = serde_json::to_value(stop_reason).unwrap_or_default();
            format!("the end ({})", reason.as_str().unwrap_or_default())
        }
    }
}

/// Formats a value of a receipt for a table cell.
fn short(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            short_hash(text).to_owned()
        }
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(short).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
