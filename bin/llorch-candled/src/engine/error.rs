//! Errors of the engine: of loading a model, and of running a generation.

use std::error::Error;

use pool_core::api::worker::{CacheShortage, ContextOverflow, WorkerErrorCode};
use pool_core::catalog::gguf::GgufError;

use super::sampling::SamplingError;
use super::sequence::CacheFull;
use crate::backend;
use crate::chat_template::TemplateError;
use crate::model::ModelError;
use crate::model::description::DescriptionError;
use crate::panics::Panicked;
use crate::tokenizer::TokenizerError;

/// Reason why a model file can't be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The header is damaged or can't be read.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// A number or feature in the header is not supported.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// The vocabulary can't be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The weights can't be loaded.
    #[error(transparent)]
    Backend(#[from] backend::LoadError),
    /// The trial computation failed.
    #[error("the trial run of the model failed")]
    Compute(#[from] ModelError),
    /// The cache has no room for the trial computation.
    #[error(transparent)]
    CacheFull(#[from] CacheFull),
    /// The file broke an assumption of the program.
    #[error("could not load the model")]
    Panicked(#[from] Panicked),
}

impl LoadError {
    /// Returns what to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Header(error) => error.hint(),
            Self::Backend(backend::LoadError::Cache { .. }) => {
                Some("lower --cache-tokens or --context-length, or free memory")
            }
            _ => None,
        }
    }

    /// Returns whether the command line is at fault, rather than the file: it asks for more than the model has.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Description(DescriptionError::ContextTooLong { .. })
        )
    }

    /// Returns whether the system could not read the file, which says nothing about the content.
    pub fn is_io(&self) -> bool {
        let mut causes = std::iter::successors(self.source(), |cause| (*cause).source());
        causes.any(<dyn Error>::is::<std::io::Error>)
    }
}

/// Reason why a running generation must stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halted {
    /// The job was cancelled.
    Cancelled,
    /// An attempt with a higher fence took over.
    Replaced,
    /// The worker is stopping.
    ShuttingDown,
}

/// Reason why a generation did not complete.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request can't be run.
    #[error("{0}")]
    Request(String),
    /// The prompt is so long that it has too many tokens for the model, however they are counted.
    #[error(
        "the prompt of {bytes} bytes has at least {least_tokens} tokens, which leaves no room in the model's context of {model_context}"
    )]
    TooLong {
        /// Bytes of the prompt.
        bytes: usize,
        /// Lower bound of its tokens.
        least_tokens: usize,
        /// Tokens of context that the model was trained for.
        model_context: usize,
    },
    /// The prompt or the answer doesn't fit the context.
    #[error("{}", overflow_message(.0))]
    ContextOverflow(ContextOverflow),
    /// The chat template can't render the conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The generation was asked to stop.
    #[error("{}", match .0 {
        Halted::Cancelled => "the execution was cancelled",
        Halted::Replaced => "a newer attempt took over",
        Halted::ShuttingDown => "the worker is stopping",
    })]
    Halted(Halted),
    /// A pass through the model failed.
    #[error("the computation failed: {0}")]
    Compute(#[from] ModelError),
    /// The cache has no room for a sequence.
    #[error(transparent)]
    CacheFull(#[from] CacheFull),
    /// The cache has no room for the generation now, and the request says not to wait.
    #[error(
        "the cache has room for {} more tokens, but the prompt and the longest answer need {}",
        .0.free_tokens,
        .0.needed_tokens
    )]
    Shortage(CacheShortage),
    /// No token could be drawn from the logits.
    #[error("the computation failed: {0}")]
    Sampling(#[from] SamplingError),
    /// The computation broke an assumption of the program.
    #[error("the computation failed: {0}")]
    Panicked(#[from] Panicked),
}

impl From<Halted> for Failure {
    fn from(halted: Halted) -> Self {
        Self::Halted(halted)
    }
}

impl Failure {
    /// Returns the error code on the wire.
    pub fn code(&self) -> WorkerErrorCode {
        match self {
            Self::Request(_) => WorkerErrorCode::InvalidRequest,
            Self::TooLong { .. } | Self::ContextOverflow(_) => WorkerErrorCode::ContextOverflow,
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

    /// Returns whether another attempt, on this worker or another, may succeed.
    pub fn retriable(&self) -> bool {
        let failed = self.code() == WorkerErrorCode::InferenceFailed;
        failed || matches!(self, Self::Halted(Halted::ShuttingDown) | Self::Shortage(_))
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
            "the prompt of {prompt_tokens} tokens leaves no room for an answer in the model's context of {model_context}"
        )
    } else {
        format!(
            "the request needs a context of {needed_tokens} tokens, but the worker has {context_length}"
        )
    }
}
