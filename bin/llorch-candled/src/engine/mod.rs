//! The engine: a loaded model, and generations that run on it concurrently. The engine knows nothing of HTTP.

pub mod batcher;
pub mod cache;
mod error;
mod flight;
mod lookup;
mod origin;
mod output;
pub mod prefill;
mod receipt;
pub mod sampling;
pub mod sequence;
pub mod stop;

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{
    ContextOverflow, ExecuteRequest, Message, Origin, Resume, Role, WorkerEnd, WorkerEvent,
};
use pool_core::catalog::gguf::GgufFile;
use pool_core::chat_template::TemplateProblem;
use pool_core::worker::CacheType;

use crate::backend::{self, Device};
use crate::chat_template::{ChatTemplate, Conversation, Rendered, TemplateError};
use crate::model::description::Description;
use crate::model::{BLOCK, ModelError};
use crate::tokenizer::{Tokenizer, TokenizerError};
use batcher::Batcher;
use cache::Room;
pub use error::{Failure, Halted, LoadError};
use output::Output;
use receipt::FileHashes;
use sequence::{CacheFull, Core, Sequence};

/// The callbacks of a running generation.
pub trait Control {
    /// Fails with the reason to stop, if there is one. Called before every step.
    fn check(&self) -> Result<(), Halted>;
    /// Sends an event to the readers.
    fn event(&mut self, event: WorkerEvent);
    /// Reports that a step was computed.
    fn progress(&mut self);
    /// Reports that a token was drawn.
    fn drawn(&mut self);
}

impl<C: Control + ?Sized> Control for &mut C {
    fn check(&self) -> Result<(), Halted> {
        (**self).check()
    }

    fn event(&mut self, event: WorkerEvent) {
        (**self).event(event);
    }

    fn progress(&mut self) {
        (**self).progress();
    }

    fn drawn(&mut self) {
        (**self).drawn();
    }
}

/// A request with its tokenised prompt.
pub struct Generation {
    request: ExecuteRequest,
    prompt: Vec<u32>,
    /// Tokens of earlier attempts that the answer continues; `None` for an answer from the beginning.
    resumed: Option<Vec<u32>>,
    /// Receipt without the answer.
    receipt: Box<Receipt>,
    accepted: Instant,
}

impl Generation {
    /// Returns the ids of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }
}

/// The sizes of the cache and of its sequences.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sizes {
    /// Most tokens of a sequence; `None` for the smaller of the model's context and the default.
    pub context_length: Option<usize>,
    /// Tokens of the whole cache. `None`, or fewer than one sequence of the context's length needs, means that length.
    pub cache_tokens: Option<usize>,
    /// Form of keys and values in the cache of our own kernels.
    pub cache_type: CacheType,
    /// Sequences that are expected to run at once. More may run, but may have to wait for blocks.
    pub slots: usize,
}

/// A loaded model with its tokenizer and chat template.
pub struct Engine {
    core: Mutex<Core>,
    description: Description,
    tokenizer: Tokenizer,
    /// The chat template, or the reason why none is usable. A model without a template accepts only raw prompts.
    template: Result<ChatTemplate, TemplateError>,
    slots: usize,
    origin: Origin,
    hashes: FileHashes,
}

impl Engine {
    /// Loads a model file. Calls `progress` at every step with the bytes of weights read and their total.
    pub fn load(
        path: &Path,
        device: Device,
        sizes: Sizes,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, LoadError> {
        // Read before the content: if the file changes in between, this origin matches that of no other worker.
        let mut origin = origin::of(path, device)?;
        let header = GgufFile::open(path)?;
        // A header with impossible numbers is refused before the weights are read.
        let mut description = Description::from_header(&header, sizes.context_length)?;
        if description.is_long() {
            origin.build.push_str(", long context");
        }
        description.cache = sizes.cache_type;
        if description.cache != CacheType::F16 {
            let form = format!(", {} cache", description.cache);
            origin.build.push_str(&form);
        }
        let total: u64 = header.tensors().iter().map(|t| t.size_bytes).sum();
        progress(0, total);
        let cache_tokens = sizes.cache_tokens.unwrap_or(0).max(description.context);
        let blocks = cache_tokens.div_ceil(BLOCK);
        // A large vocabulary takes one thread as long as the weights of a small model, so both are read at once. A refused
        // vocabulary stops the reading of large weights.
        let refused = AtomicBool::new(false);
        let mut progress = |bytes| {
            progress(bytes, total);
            match refused.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let read_text = || {
            let text = TextParts::read(&header);
            refused.store(text.is_err(), Ordering::Relaxed);
            text
        };
        let (text, model) = thread::scope(|scope| {
            let builder = thread::Builder::new().name("tokenizer".to_owned());
            let text = builder
                .spawn_scoped(scope, read_text)
                .map_err(backend::LoadError::Io)?;
            let model = device.load(path, &header, description.clone(), blocks, &mut progress);
            let text = text.join().unwrap_or_else(|panic| resume_unwind(panic));
            Ok::<_, LoadError>((text?, model?))
        })?;
        Ok(Self {
            core: Mutex::new(Core::new(model)),
            description,
            tokenizer: text.tokenizer,
            template: text.template,
            slots: sizes.slots.max(1),
            origin,
            hashes: text.hashes,
        })
    }

    /// Identifies the model by the hash of its file instead of the file's metadata.
    pub fn set_sha256(&mut self, sha256: &str) {
        self.origin.model = format!("sha256:{sha256}");
    }

    /// Returns the origin of answers: the model and the arithmetic, which together with a request decide the tokens.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Calls `report` after every computed layer from now on.
    pub fn on_layer(&mut self, report: impl Fn() + Send + Sync + 'static) {
        let core = self.core.get_mut();
        core.unwrap_or_else(PoisonError::into_inner)
            .model
            .on_layer(Box::new(report));
    }

    /// Computes at most three tokens in two passes, so that everything that is prepared at its first use is in memory before the
    /// memory is measured, and a model that computes nonsense is refused before it gets a job.
    pub fn warm_up(&self) -> Result<(), LoadError> {
        let tokens = &[0; 3][..self.description.context.min(3)];
        let mut sequence = self.sequence(tokens.len())?;
        sequence.advance(&tokens[1..])?;
        let logits = sequence.logits(&tokens[..1])?;
        match logits.iter().all(|logit| logit.is_finite()) {
            true => Ok(()),
            false => Err(LoadError::Compute(ModelError::NotFinite)),
        }
    }

    /// Returns the most bytes that computing takes besides the weights: the cache, and a step at the end of the context.
    pub fn working_bytes(&self) -> u64 {
        let core = self.core();
        let context = self.description.context;
        let rows = prefill::CHUNK.min(context) + self.slots - 1;
        core.model.cache_bytes() + core.model.pass_bytes(rows, self.slots, context)
    }

    /// Returns the context length of a sequence in tokens.
    pub fn context_length(&self) -> usize {
        self.description.context
    }

    /// Returns the tokenizer built from the model file.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns the properties of the model.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Begins a sequence of at most `capacity` tokens.
    ///
    /// # Errors
    ///
    /// Fails if the cache has too few free blocks.
    pub fn sequence(&self, capacity: usize) -> Result<Sequence<'_>, CacheFull> {
        Sequence::new(&self.core, capacity)
    }

    /// Renders and tokenises a request's prompt.
    pub fn prepare(
        &self,
        mut request: ExecuteRequest,
        accepted: Instant,
    ) -> Result<Generation, Failure> {
        let Rendered { text, breaks } = self.prompt_text(&request)?;
        self.check_length(&text)?;
        let prompt = self
            .tokenizer
            .encode_prompt(&text, &breaks)
            .map_err(|error| Failure::Request(error.to_string()))?;
        if prompt.is_empty() {
            return Err(Failure::Request("the prompt has no tokens".to_owned()));
        }
        self.check_room(prompt.len(), 1)?;
        let vocab = self.tokenizer.vocab_size();
        let resumed = request.resume.iter().flat_map(|resume| &resume.token_ids);
        if let Some(id) = resumed.copied().find(|id| *id as usize >= vocab) {
            return Err(Failure::Request(format!(
                "token id {id} to resume from is outside the vocabulary of {vocab}"
            )));
        }
        let resume = request.resume.take();
        let resume = resume.filter(|resume| self.may_continue(resume, &request));
        let receipt = self.receipt(&request, &prompt, resume.as_ref());
        let resumed = resume.map(|resume| resume.token_ids);
        if let Some(ids) = &resumed {
            // Rather than void text that readers have seen, fail: another worker may have the room.
            let answer = (ids.len() + 1).min(request.max_tokens as usize);
            let most = self.description.max_context - prompt.len();
            self.check_room(prompt.len(), answer.clamp(1, most))?;
        }
        Ok(Generation {
            request,
            prompt,
            resumed,
            receipt: Box::new(receipt),
            accepted,
        })
    }

    /// Refuses a prompt that can't fit the model's context. Prompts become tokens one after the other, and megabytes of text
    /// would delay those behind for seconds.
    fn check_length(&self, text: &str) -> Result<(), Failure> {
        let least_tokens = self.tokenizer.least_tokens(text);
        let model_context = self.description.max_context;
        if least_tokens < model_context {
            return Ok(());
        }
        Err(Failure::TooLong {
            bytes: text.len(),
            least_tokens,
            model_context,
        })
    }

    /// Refuses a prompt that leaves no room in the context for an answer of at least `answer` tokens.
    fn check_room(&self, prompt: usize, answer: usize) -> Result<(), Failure> {
        let needed = prompt + answer;
        if needed <= self.description.context {
            return Ok(());
        }
        let tokens = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Err(Failure::ContextOverflow(ContextOverflow {
            prompt_tokens: tokens(prompt),
            needed_tokens: tokens(needed),
            context_length: tokens(self.description.context),
            model_context: tokens(self.description.max_context),
        }))
    }

    /// Returns the most tokens of an answer: `max_tokens`, or what the context has left.
    fn limit(&self, request: &ExecuteRequest, prompt: usize) -> usize {
        (request.max_tokens as usize).min(self.description.context - prompt)
    }

    /// Returns whether an answer may continue from these tokens so that its readers see one text. Another build may draw
    /// different tokens, so it may continue only if readers have seen nothing beyond the given ones. Nor may it continue if the
    /// last piece was text held back until the end of the answer, because its answer may not end there.
    fn may_continue(&self, resume: &Resume, request: &ExecuteRequest) -> bool {
        let Resume {
            token_ids,
            next_index,
            origin,
            seen_more,
        } = resume;
        if token_ids.len() > request.max_tokens as usize {
            return false;
        }
        match origin {
            Some(origin) if origin.model != self.origin.model => false,
            Some(origin) if origin.build == self.origin.build => true,
            _ => {
                let mut output = Output::new(&self.tokenizer, &request.stop);
                token_ids.iter().for_each(|id| drop(output.push(*id)));
                !seen_more && next_index.is_none_or(|next| next == output.pieces())
            }
        }
    }

    /// Runs a generation alone to its end.
    pub fn generate(
        &self,
        generation: Generation,
        control: &mut dyn Control,
    ) -> Result<WorkerEnd, Failure> {
        let mut batcher = Batcher::new(self);
        batcher.add(generation, control);
        loop {
            let (_, mut ended) = batcher.step();
            if let Some(ended) = ended.pop() {
                return ended.outcome;
            }
        }
    }

    /// Returns how full the cache is.
    pub fn room(&self) -> Room {
        self.core().cache.room()
    }

    /// Returns the number of blocks that a generation with the longest answer takes, without blocks that sequences hold
    /// already.
    fn blocks_for(&self, generation: &Generation) -> usize {
        let Generation {
            request, prompt, ..
        } = generation;
        let most = flight::most_blocks(prompt.len(), self.limit(request, prompt.len()));
        // The last token is always computed, because its logits are not in the cache.
        let known = &prompt[..prompt.len() - 1];
        most - self.core().cache.shared(flight::scope(request), known)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        sequence::lock(&self.core)
    }

    fn prompt_text(&self, request: &ExecuteRequest) -> Result<Rendered, Failure> {
        if request.raw {
            // A raw prompt is entirely the caller's own text, so names in it become special tokens.
            let text = request
                .prompt
                .clone()
                .ok_or_else(|| Failure::Request("`raw` requires `prompt`".to_owned()))?;
            let breaks = Vec::new();
            return Ok(Rendered { text, breaks });
        }
        let template = self.template.as_ref().map_err(Clone::clone)?;
        let control = (!request.allow_special).then(|| self.tokenizer.control());
        let conversation = Conversation::new(&conversation(request));
        Ok(template.render(&conversation, control)?)
    }
}

/// The parts of an engine that turn text into tokens.
struct TextParts {
    tokenizer: Tokenizer,
    template: Result<ChatTemplate, TemplateError>,
    hashes: FileHashes,
}

impl TextParts {
    fn read(header: &GgufFile) -> Result<Self, TokenizerError> {
        let tokenizer = Tokenizer::from_header(header)?;
        let template = read_template(header, &tokenizer);
        if let Err(error) = &template {
            tracing::warn!(%error, "no usable chat template, accepting raw prompts only");
        }
        Ok(Self {
            tokenizer,
            template,
            hashes: FileHashes::of(header),
        })
    }
}

/// Compiles a file's chat template.
fn read_template(header: &GgufFile, tokenizer: &Tokenizer) -> Result<ChatTemplate, TemplateError> {
    let source = header
        .chat_template()
        .map_err(|error| TemplateProblem::Syntax(error.to_string()))?
        .ok_or(TemplateError::Missing)?;
    ChatTemplate::new(source, tokenizer.bos_text(), tokenizer.eos_text())
}

/// Returns the messages of a request: `system` first, then `messages`, or `prompt` as the user's message.
fn conversation(request: &ExecuteRequest) -> Vec<Message> {
    let message = |role, content: &String| Message {
        role,
        content: content.clone(),
    };
    let mut messages: Vec<Message> = request
        .system
        .iter()
        .map(|text| message(Role::System, text))
        .collect();
    messages.extend(request.messages.iter().flatten().cloned());
    messages.extend(request.prompt.iter().map(|text| message(Role::User, text)));
    messages
}
