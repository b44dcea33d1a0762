//! `llorch-pool models info`.

use std::path::PathBuf;

use pool_core::ModelRef;
use pool_core::catalog::Catalog;
use pool_core::catalog::gguf::{EndToken, GgufError, GgufFile, Vocabulary};
use pool_core::catalog::store::{ResolvedModel, Store};
use pool_core::catalog::support;
use pool_core::chat_template;
use pool_core::kit::json_number::MAX_EXACT_INTEGER;
use pool_core::kit::terminal::paint::Cell;
use pool_core::kit::terminal::{CliError, Exit, Format, human_bytes, print_json, print_table};
use pool_core::lifecycle::{MemoryEstimator, WorkerSizes};
use pool_core::worker::CacheType;
use serde::Serialize;

use super::HashState;
use crate::context::resolve_error;

/// Facts from a file's header. A fact that the file does not give, or gives wrongly, is absent.
#[derive(Serialize)]
struct Info {
    model_ref: ModelRef,
    path: PathBuf,
    size_bytes: u64,
    sha256: Option<String>,
    hash_state: HashState,
    needed_bytes: u64,
    gguf_version: u32,
    name: Option<String>,
    architecture: Option<String>,
    quantization: String,
    parameters: u64,
    tensors: usize,
    context_length: Option<u64>,
    layers: Option<u64>,
    embedding_length: Option<u64>,
    heads: Option<u64>,
    kv_heads: Option<u64>,
    head_dim: Option<u64>,
    kv_cache_bytes_per_token: Option<u64>,
    vocabulary: Option<u64>,
    tokenizer: Option<String>,
    chat_template: bool,
    /// Reason why the worker can't use the chat template; raw prompts still work.
    #[serde(skip_serializing_if = "Option::is_none")]
    chat_template_problem: Option<String>,
    /// Tokens that end an answer.
    end_tokens: Vec<EndToken>,
    /// True if a worker of this version can run the model.
    runnable: bool,
    /// Reason why no worker can run the model; absent if one can.
    unsupported: Option<String>,
}

impl Info {
    fn read(model: ResolvedModel, hash_state: HashState) -> Result<Self, GgufError> {
        let file = GgufFile::open(&model.path)?;
        let text = |value: Result<&str, GgufError>| value.ok().map(str::to_owned);
        // A header may hold any number. A number that JSON readers would change is not plausible for a model either.
        let figure = |value: Result<u64, GgufError>| {
            value.ok().filter(|figure| *figure <= MAX_EXACT_INTEGER)
        };
        let needed_bytes = MemoryEstimator::default()
            .estimate(&model, WorkerSizes::default())
            .needed_bytes;
        let unsupported = support::check_file(&model.path, &file).err();
        Ok(Self {
            runnable: unsupported.is_none(),
            unsupported: unsupported.map(|reason| reason.to_string()),
            hash_state,
            needed_bytes,
            gguf_version: file.version(),
            name: file
                .get::<&str>("general.name")
                .ok()
                .flatten()
                .map(str::to_owned),
            architecture: text(file.architecture()),
            quantization: file.quantization(),
            parameters: file.parameter_count().min(MAX_EXACT_INTEGER),
            tensors: file.tensors().len(),
            context_length: figure(file.context_length()),
            layers: figure(file.block_count()),
            embedding_length: figure(file.embedding_length()),
            heads: figure(file.head_count()),
            kv_heads: figure(file.head_count_kv()),
            head_dim: figure(file.head_dim()),
            kv_cache_bytes_per_token: figure(
                file.kv_cache_bytes(1, 1)
                    .map(|numbers| CacheType::default().bytes(numbers)),
            ),
            vocabulary: figure(file.vocab_size()),
            tokenizer: text(file.tokenizer_kind()),
            chat_template: file.has_chat_template(),
            chat_template_problem: template_problem(&file),
            end_tokens: Vocabulary::from_header(&file)
                .map(|vocabulary| vocabulary.ends().collect())
                .unwrap_or_default(),
            model_ref: model.model_ref,
            path: model.path,
            size_bytes: model.file.size_bytes,
            sha256: model.file.sha256,
        })
    }

    fn lines(&self) -> Vec<Vec<Cell>> {
        let number =
            |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let rows = [
            ("model", self.model_ref.to_string()),
            ("name", text(&self.name)),
            ("file", self.path.display().to_string()),
            (
                "size",
                format!(
                    "{} ({} bytes)",
                    human_bytes(self.size_bytes),
                    self.size_bytes
                ),
            ),
            (
                "SHA-256",
                match &self.sha256 {
                    Some(hash) => format!("{hash}, {}", self.hash_state.explained()),
                    None => self.hash_state.explained().to_owned(),
                },
            ),
            (
                "format",
                format!("GGUF {}, {} tensors", self.gguf_version, self.tensors),
            ),
            ("architecture", text(&self.architecture)),
            ("quantization", self.quantization.clone()),
            ("parameters", human_count(self.parameters)),
            ("context", number(self.context_length)),
            ("layers", number(self.layers)),
            ("embedding", number(self.embedding_length)),
            (
                "heads",
                format!(
                    "{} ({} for keys and values, {} wide)",
                    number(self.heads),
                    number(self.kv_heads),
                    number(self.head_dim)
                ),
            ),
            (
                "KV cache",
                self.kv_cache_bytes_per_token.map_or_else(
                    || "-".to_owned(),
                    |bytes| format!("{} per token", human_bytes(bytes)),
                ),
            ),
            (
                "memory",
                format!(
                    "{} predicted for a worker with default settings",
                    human_bytes(self.needed_bytes)
                ),
            ),
            (
                "tokenizer",
                format!(
                    "{}, {} tokens",
                    text(&self.tokenizer),
                    number(self.vocabulary)
                ),
            ),
            (
                "end of turn",
                match self.end_tokens.as_slice() {
                    [] => "-".to_owned(),
                    ends => ends.iter().map(end_token).collect::<Vec<_>>().join(", "),
                },
            ),
            (
                "chat template",
                match &self.chat_template_problem {
                    Some(problem) => format!("unusable, raw prompts only: {problem}"),
                    None if self.chat_template => "yes".to_owned(),
                    None => "no, raw prompts only".to_owned(),
                },
            ),
            (
                "runs",
                self.unsupported
                    .as_ref()
                    .map_or_else(|| "yes".to_owned(), |reason| format!("no: {reason}")),
            ),
        ];
        rows.into_iter()
            .map(|(fact, value)| vec![fact.into(), value.into()])
            .collect()
    }
}

/// Returns the reason why the worker can't compile the chat template.
fn template_problem(file: &GgufFile) -> Option<String> {
    match file.chat_template() {
        Ok(None) => None,
        Ok(Some(source)) => chat_template::check(source)
            .err()
            .map(|problem| problem.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// Formats `<|im_end|> (2, eos)`.
fn end_token(end: &EndToken) -> String {
    let EndToken { id, text, key } = end;
    let name = key.and_then(|key| {
        let name = key.strip_prefix("tokenizer.ggml.")?;
        name.split("_token_id").next()
    });
    match name {
        Some(name) => format!("{text} ({id}, {name})"),
        None => format!("{text} ({id})"),
    }
}

/// Shows the header of the file that `model` refers to.
pub fn run(
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    format: Format,
) -> Result<Exit, CliError> {
    // Users read with their own rights: the allowed folders bind only tasks.
    let model = store
        .resolve(model, catalog, &[PathBuf::from("/")])
        .map_err(|error| resolve_error(&error))?;
    let path = model.path.clone();
    let state = HashState::of(&model, catalog, store);
    let info = Info::read(model, state).map_err(|error| {
        let mut shown = CliError::of(Exit::Failed, &error, error.hint().map(str::to_owned));
        shown.message = format!("{}: {}", path.display(), shown.message);
        shown
    })?;
    match format {
        Format::Json => print_json(&info)?,
        Format::Table => print_table(&["FACT", "VALUE"], info.lines())?,
    }
    Ok(Exit::Done)
}

/// Formats a count for people, such as `134.5 M`.
fn human_count(count: u64) -> String {
    #[allow(clippy::cast_precision_loss)] // One decimal is shown.
    let scaled = |unit: u64| count as f64 / unit as f64;
    match count {
        0..1_000_000 => count.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", scaled(1_000_000)),
        _ => format!("{:.1} B", scaled(1_000_000_000)),
    }
}
