//! The engine: a loaded model, and generations that run on it side by side. It knows nothing of HTTP.

pub mod batcher;
pub mod cache;
mod flight;
mod lookup;
pub mod model;
mod origin;
mod output;
pub mod prefill;
mod receipt;
pub mod sampling;
pub mod sequence;
pub mod stop;

use std::error::Error;
use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{
    CacheShortage, ContextOverflow, ExecuteRequest, Message, Origin, Resume, Role, WorkerEnd,
    WorkerErrorCode, WorkerEvent,
};
use pool_core::catalog::gguf::{GgufError, GgufFile};
use pool_core::chat_template::TemplateProblem;
use pool_core::worker::CacheType;

use crate::backend::{self, Device};
use crate::chat_template::{ChatTemplate, Conversation, Rendered, TemplateError};
use crate::panics::Panicked;
use crate::tokenizer::{Tokenizer, TokenizerError};
use batcher::Batcher;
use cache::Room;
use model::description::{Description, DescriptionError};
use model::{BLOCK, ModelError};
use output::Output;
use receipt::FileHashes;
use sampling::SamplingError;
use sequence::{CacheFull, Core, Sequence};

/// Why a model file can't be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its header.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// Its numbers or features.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// Its vocabulary.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Its weights.
    #[error(transparent)]
    Backend(#[from] backend::LoadError),
    /// It can't be computed with.
    #[error("the model can't be computed: {0}")]
    Compute(#[from] ModelError),
    /// Its cache.
    #[error(transparent)]
    CacheFull(#[from] CacheFull),
    /// It broke an assumption of the program.
    #[error("the model can't be computed: {0}")]
    Panicked(#[from] Panicked),
}

impl LoadError {
    /// What to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Header(error) => error.hint(),
            _ => None,
        }
    }

    /// Whether it is the command line that asks for what the model doesn't have, rather than the file that is bad.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Description(DescriptionError::ContextTooLong { .. })
        )
    }

    /// Whether the system could not read the file, which says nothing about what is in it.
    pub fn is_io(&self) -> bool {
        let mut causes = std::iter::successors(self.source(), |cause| (*cause).source());
        causes.any(<dyn Error>::is::<std::io::Error>)
    }
}

/// Why a generation that runs is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halted {
    /// Somebody cancelled it.
    Cancelled,
    /// A higher fence took over.
    Replaced,
    /// The worker is stopping.
    ShuttingDown,
}

/// Why a generation did not come to a good end.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request can't be run.
    #[error("{0}")]
    Request(String),
    /// Prompt and context do not fit.
    #[error("{}", overflow_message(.0))]
    ContextOverflow(ContextOverflow),
    /// The chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// It was told to end.
    #[error("{}", match .0 {
        Halted::Cancelled => "the execution was cancelled",
        Halted::Replaced => "a newer attempt took over",
        Halted::ShuttingDown => "the worker is stopping",
    })]
    Halted(Halted),
    /// The computation.
    #[error("the computation failed: {0}")]
    Compute(#[from] ModelError),
    /// There is no room for its keys and values.
    #[error(transparent)]
    CacheFull(#[from] CacheFull),
    /// There is no room for its keys and values now, and the request says not to wait.
    #[error(
        "the cache has room for {} more tokens, the prompt and the longest answer need {}",
        .0.free_tokens,
        .0.needed_tokens
    )]
    Shortage(CacheShortage),
    /// The choice of a token.
    #[error("the computation failed: {0}")]
    Sampling(#[from] SamplingError),
    /// It broke an assumption of the program.
    #[error("the computation failed: {0}")]
    Panicked(#[from] Panicked),
}

impl From<Halted> for Failure {
    fn from(halted: Halted) -> Self {
        Self::Halted(halted)
    }
}

impl Failure {
    /// The code on the wire.
    pub fn code(&self) -> WorkerErrorCode {
        match self {
            Self::Request(_) => WorkerErrorCode::InvalidRequest,
            Self::ContextOverflow(_) => WorkerErrorCode::ContextOverflow,
            Self::Template(_) => WorkerErrorCode::TemplateFailed,
            Self::Halted(Halted::Cancelled) => WorkerErrorCode::Cancelled,
            Self::Halted(Halted::Replaced) => WorkerErrorCode::Replaced,
            Self::Halted(Halted::ShuttingDown) => WorkerErrorCode::ShuttingDown,
            Self::Shortage(_) => WorkerErrorCode::CacheFull,
            Self::Compute(_) | Self::CacheFull(_) | Self::Sampling(_) | Self::Panicked(_) => {
                WorkerErrorCode::InferenceFailed
            }
        }
    }

    /// Whether another attempt, on this worker or another, may succeed.
    pub fn retriable(&self) -> bool {
        let by_request = self.code() != WorkerErrorCode::InferenceFailed;
        let passes = matches!(self, Self::Halted(Halted::ShuttingDown) | Self::Shortage(_));
        !by_request || passes
    }

    /// Returns the sizes of a context that is too small; `None` for other errors.
    pub fn overflow(&self) -> Option<ContextOverflow> {
        match self {
            Self::ContextOverflow(overflow) => Some(*overflow),
            _ => None,
        }
    }

    /// Returns the sizes of a cache that has no room; `None` for other errors.
    pub fn shortage(&self) -> Option<CacheShortage> {
        match self {
            Self::Shortage(shortage) => Some(*shortage),
            _ => None,
        }
    }
}

fn overflow_message(overflow: &ContextOverflow) -> String {
    let ContextOverflow {
        prompt_tokens,
        needed_tokens,
        context_length,
        model_context,
    } = overflow;
    if needed_tokens > model_context {
        format!(
            "the prompt has {prompt_tokens} tokens, the model's context {model_context}: no room for an answer"
        )
    } else {
        format!(
            "the request needs a context of {needed_tokens} tokens, the worker has {context_length}"
        )
    }
}

/// What a generation asks and tells while it runs.
pub trait Control {
    /// Whether to go on. Asked before every step.
    fn check(&self) -> Result<(), Halted>;
    /// Something to tell the readers.
    fn event(&mut self, event: WorkerEvent);
    /// A step was computed.
    fn progress(&mut self);
    /// A token was drawn.
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

/// A request with its prompt as tokens.
pub struct Generation {
    request: ExecuteRequest,
    prompt: Vec<u32>,
    /// Tokens of earlier attempts that it goes on from; `None` begins anew.
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

/// How large the cache is, and what it is for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sizes {
    /// Most tokens of a sequence; `None` for the smaller of the model's context and the default.
    pub context_length: Option<usize>,
    /// Tokens of the whole cache; `None`, like less, for one sequence of the context's length.
    pub cache_tokens: Option<usize>,
    /// Form of keys and values in the cache, where our kernels compute.
    pub cache_type: CacheType,
    /// Sequences that are meant to run at once. More do, and may have to wait for blocks.
    pub slots: usize,
}

/// A loaded model with its tokenizer and chat template.
pub struct Engine {
    core: Mutex<Core>,
    description: Description,
    tokenizer: Tokenizer,
    /// The chat template, or why none is usable. A model without a template accepts raw prompts only.
    template: Result<ChatTemplate, TemplateError>,
    slots: usize,
    origin: Origin,
    hashes: FileHashes,
}

impl Engine {
    /// Loads a model file. `progress` hears the bytes of weights read, and how many there are, at every step of it.
    pub fn load(
        path: &Path,
        device: Device,
        sizes: Sizes,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, LoadError> {
        // Looked at first: what is read afterwards may be newer than it says, and is then nobody's match.
        let mut origin = origin::of(path, device)?;
        let header = GgufFile::open(path)?;
        // What a header's numbers say is refused before the weights are read.
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
        // A large vocabulary takes as long as the weights of a small model, and one thread. One that is refused ends the reading
        // of large weights.
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

    /// Names the model by its hash, where somebody knows it.
    pub fn set_sha256(&mut self, sha256: &str) {
        self.origin.model = format!("sha256:{sha256}");
    }

    /// What decides, beside a request, which tokens come out.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Calls `told` whenever a layer was computed, from now on.
    pub fn on_layer(&mut self, told: impl Fn() + Send + Sync + 'static) {
        let core = self.core.get_mut();
        core.unwrap_or_else(PoisonError::into_inner)
            .model
            .on_layer(Box::new(told));
    }

    /// Computes two tokens, so that what is prepared at first use is in memory before anybody measures it, and a model that
    /// computes nothing sensible is refused before it gets a job.
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

    /// Returns the bytes that computing takes at most, besides the weights: the cache, and what a step takes at the end of the
    /// context.
    pub fn working_bytes(&self) -> u64 {
        let core = self.core();
        let context = self.description.context;
        let rows = prefill::CHUNK.min(context) + self.slots - 1;
        core.model.cache_bytes() + core.model.pass_bytes(rows, self.slots, context)
    }

    /// Tokens of context of a sequence.
    pub fn context_length(&self) -> usize {
        self.description.context
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns what the model is like.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Begins a sequence of at most `capacity` tokens.
    ///
    /// # Errors
    ///
    /// Fails if the cache has no room for it.
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
        let resume = resume.filter(|resume| self.may_go_on(resume, &request));
        let receipt = self.receipt(&request, &prompt, resume.as_ref());
        let resumed = resume.map(|resume| resume.token_ids);
        if let Some(ids) = &resumed {
            // Text already sent to readers is not voided for lack of room that another worker has.
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

    /// Most tokens of an answer: `max_tokens`, or what the context has left.
    fn limit(&self, request: &ExecuteRequest, prompt: usize) -> usize {
        (request.max_tokens as usize).min(self.description.context - prompt)
    }

    /// Whether an answer may go on from these tokens so that its readers see one text. Another build may where its own
    /// tokens are the first that follow the ones given: where readers may have seen more it would draw others, and where
    /// the last piece was text held back until the answer's end, it may not end there.
    fn may_go_on(&self, resume: &Resume, request: &ExecuteRequest) -> bool {
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

    /// Returns the number of blocks that a generation with the longest answer takes, without those that sequences have.
    fn blocks_for(&self, generation: &Generation) -> usize {
        let Generation {
            request, prompt, ..
        } = generation;
        let most = flight::most_blocks(prompt.len(), self.limit(request, prompt.len()));
        // The last token is computed in any case.
        let known = &prompt[..prompt.len() - 1];
        most - self.core().cache.shared(flight::scope(request), known)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        sequence::lock(&self.core)
    }

    fn prompt_text(&self, request: &ExecuteRequest) -> Result<Rendered, Failure> {
        if request.raw {
            // A raw prompt is entirely the caller's own text: names in it become special tokens.
            let text = request
                .prompt
                .clone()
                .ok_or_else(|| Failure::Request("`raw` goes with `prompt`".to_owned()))?;
            let breaks = Vec::new();
            return Ok(Rendered { text, breaks });
        }
        let template = self.template.as_ref().map_err(Clone::clone)?;
        let control = (!request.allow_special).then(|| self.tokenizer.control());
        let conversation = Conversation::new(&conversation(request));
        Ok(template.render(&conversation, control)?)
    }
}

/// Parts of an engine that turn text into tokens.
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
            tracing::warn!(%error, "the model takes raw prompts only");
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

/// The messages of a request: `system` first, then `messages`, or `prompt` as what the user says.
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
