//! Scheduler scripts in Rhai: `fn schedule(ctx)` returns a list of actions.
//!
//! The sandbox works by omission: no I/O, no modules, no `eval`, no clock, no random numbers, no `sleep`, and no captured
//! variables (as shared values they could form cycles and escape the size limits). Scripts run under limits on source bytes,
//! operations, depth of calls and expressions, sizes of strings, arrays and maps, and wall time, on a thread of their own (see
//! [`Runner`]).
//!
//! `bin/orchestratord/policies/README.md` documents the language for authors of scripts.

mod bounded;
mod engine;
mod runner;
mod views;

#[cfg(test)]
mod tests;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use pool_core::kit::hex::hex;
use rhai::{AST, Engine, EvalAltResult, Position};
use sha2::{Digest as _, Sha256};

pub use crate::api::scheduler::{ScriptError, ScriptErrorKind};
pub use runner::{Ran, Runner, too_long};
pub use views::{Act, ScriptInput};

/// Longest source of a script, in bytes.
pub const MAX_SOURCE: usize = 64 * 1024;
/// Most operations of a run: a good part of a second on a fast machine.
pub const MAX_OPERATIONS: u64 = 2_000_000;
/// Default time limit of a run.
pub const WALL: Duration = Duration::from_millis(50);
/// Most elements of an array, including those of nested arrays. Enough to list every worker of a fleet of a thousand pools.
pub const MAX_ARRAY: usize = 4096;
/// Most bytes of a string, or of all strings inside an array or map.
pub const MAX_STRING: usize = 16 * 1024;
/// Most entries of a map, including those of nested maps.
pub const MAX_MAP: usize = 1024;
/// Deepest nesting of calls.
pub const MAX_CALLS: usize = 32;
/// Deepest nesting of an expression outside of functions.
pub const MAX_EXPRESSION: usize = 64;
/// Deepest nesting of an expression within a function.
pub const MAX_FUNCTION_EXPRESSION: usize = 48;
/// Longest error message, in characters.
const MAX_MESSAGE: usize = 300;
/// Stack size in bytes, large enough to compare, print and drop values nested as deeply as [`MAX_ARRAY`] allows.
const STACK: usize = 64 << 20;

impl ScriptError {
    pub(crate) fn new(kind: ScriptErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: tidy(&message.into()),
            line: None,
            column: None,
        }
    }

    pub(crate) fn at(mut self, position: Position) -> Self {
        self.line = position.line();
        self.column = position.position();
        self
    }
}

/// Returns one line of bounded length without control characters, because scripts write their own messages.
fn tidy(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_MESSAGE)
        .collect()
}

/// A script that has compiled.
#[derive(Clone)]
pub struct Script {
    ast: Arc<AST>,
    sha256: String,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script")
            .field("sha256", &self.sha256)
            .finish_non_exhaustive()
    }
}

/// Returns the SHA-256 of a source in hexadecimal, which names this version of a script.
pub fn source_hash(source: &[u8]) -> String {
    hex(&Sha256::digest(source))
}

impl Script {
    /// Compiles a script. Takes milliseconds. The parser runs on a thread with enough stack for the deepest source.
    pub fn compile(source: &[u8]) -> Result<Self, ScriptError> {
        let refuse = |message: String| ScriptError::new(ScriptErrorKind::Compile, message);
        if source.len() > MAX_SOURCE {
            let bytes = source.len();
            return Err(refuse(format!(
                "the script has {bytes} bytes; at most {MAX_SOURCE} are allowed"
            )));
        }
        let text = std::str::from_utf8(source)
            .map_err(|error| refuse(format!("the script is not UTF-8: {error}")))?;
        let parse = || {
            let engine = engine::new();
            catch_unwind(AssertUnwindSafe(|| compile_with(&engine, text)))
                .unwrap_or_else(|_| Err(refuse("the parser failed on the script".to_owned())))
        };
        let ast = std::thread::scope(|scope| {
            let parser = std::thread::Builder::new()
                .name("script-parser".to_owned())
                .stack_size(STACK)
                .spawn_scoped(scope, parse)
                .map_err(|error| refuse(format!("can't start a thread for the parser: {error}")))?;
            parser
                .join()
                .unwrap_or_else(|_| Err(refuse("the parser failed on the script".to_owned())))
        })?;
        Ok(Self {
            ast: Arc::new(ast),
            sha256: source_hash(source),
        })
    }

    /// Returns the SHA-256 of the source in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

fn compile_with(engine: &Engine, text: &str) -> Result<AST, ScriptError> {
    let ast = engine.compile(text).map_err(|error| {
        ScriptError::new(ScriptErrorKind::Compile, error.err_type().to_string())
            .at(error.position())
    })?;
    let defined = |name: &str, parameters: usize| {
        ast.iter_functions()
            .any(|function| function.name == name && function.params.len() == parameters)
    };
    if defined("schedule", 1) {
        return Ok(ast);
    }
    let message = if ast.iter_functions().any(|f| f.name == "schedule") {
        "`schedule` must take exactly one parameter: `fn schedule(ctx)`"
    } else {
        "the script defines no `fn schedule(ctx)`"
    };
    Err(ScriptError::new(ScriptErrorKind::Compile, message))
}

/// Converts a Rhai error. The position is the innermost one: that of the error itself, not of the function call around it.
fn from_rhai(error: EvalAltResult) -> ScriptError {
    use EvalAltResult as E;
    let mut inner = error;
    while let E::ErrorInFunctionCall(_, _, next, _) = inner {
        inner = *next;
    }
    let position = inner.take_position();
    let kind = match &inner {
        E::ErrorTerminated(..) => {
            return ScriptError::new(ScriptErrorKind::Timeout, "the script took too long")
                .at(position);
        }
        E::ErrorTooManyOperations(..)
        | E::ErrorTooManyVariables(..)
        | E::ErrorStackOverflow(..)
        | E::ErrorDataTooLarge(..) => ScriptErrorKind::Limit,
        E::ErrorParsing(..) => ScriptErrorKind::Compile,
        _ => ScriptErrorKind::Runtime,
    };
    ScriptError::new(kind, inner.to_string()).at(position)
}
