//! Receipts of answers: the parts that are known before the first token.

use pool_core::api::receipt::{Receipt, hash_of_ids, hash_of_stops, hash_of_text};
use pool_core::api::worker::{ExecuteRequest, Resume};
use pool_core::catalog::gguf::GgufFile;

use super::Engine;

/// Name and version of this program, as `--version` prints them.
const ENGINE: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
/// Arithmetic class of tokens of unknown origin.
const UNKNOWN: &str = "unknown";

/// Hashes of the parts of a model file that decide a prompt's token ids, computed once at load.
pub(super) struct FileHashes {
    tokenizer: String,
    /// `None` for a file without a chat template.
    chat_template: Option<String>,
}

impl FileHashes {
    /// Computes the hashes of a file.
    pub(super) fn of(header: &GgufFile) -> Self {
        let template = header.chat_template().ok().flatten();
        Self {
            tokenizer: header.tokenizer_sha256(),
            chat_template: template.map(hash_of_text),
        }
    }
}

impl Engine {
    /// Returns the receipt of a request, without the answer. `resume` is the earlier answer that the request continues.
    pub(super) fn receipt(
        &self,
        request: &ExecuteRequest,
        prompt: &[u32],
        resume: Option<&Resume>,
    ) -> Receipt {
        let template = self.hashes.chat_template.clone();
        let mut receipt = Receipt {
            model_sha256: self.origin.model.strip_prefix("sha256:").map(str::to_owned),
            engine: ENGINE.to_owned(),
            arithmetic: self.origin.build.clone(),
            earlier_arithmetic: Vec::new(),
            tokenizer_sha256: self.hashes.tokenizer.clone(),
            chat_template_sha256: template.filter(|_| !request.raw),
            prompt_tokens: prompt.len() as u32,
            prompt_sha256: hash_of_ids(prompt),
            temperature: request.sampling.temperature,
            top_p: request.sampling.top_p,
            top_k: request.sampling.top_k,
            min_p: request.sampling.min_p,
            repetition_penalty: request.sampling.repetition_penalty,
            seed: request.seed,
            max_tokens: self.limit(request, prompt.len()) as u32,
            stop_sha256: hash_of_stops(&request.stop),
            output_tokens: 0,
            output_sha256: String::new(),
        };
        let earlier = resume.filter(|resume| !resume.token_ids.is_empty());
        let class = |resume: &Resume| {
            let origin = resume.origin.as_ref();
            origin.map_or(UNKNOWN.to_owned(), |origin| origin.build.clone())
        };
        receipt.note_earlier(earlier.map(class).as_deref());
        receipt
    }
}
