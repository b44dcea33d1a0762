//! Conversations in the form that the model was trained on: the file's own chat template, rendered within bounds.

mod budget;
mod filters;
mod json;
mod marks;
mod methods;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use budget::{Budget, NoResult};
use jiff::Zoned;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use pool_core::api::worker::{Message, Role};
use pool_core::chat_template::{NAME, TemplateProblem, check_length, compile, literals};

use crate::tokenizer::ControlTokens;

/// Fuel of a rendering: about one unit per step, and one per 64 bytes produced. Real templates take a few dozen steps per
/// message. Fuel bounds both time and memory: this much produces at most 6 MiB.
const FUEL: u64 = 100_000;
/// Additional fuel for each message.
const FUEL_PER_MESSAGE: u64 = 2_000;
/// Bytes of message text that add one unit of fuel: a template may copy each byte 32 times.
const BYTES_PER_FUEL: u64 = 2;
/// Deepest nesting of macro calls.
const MAX_DEPTH: usize = 200;
/// Bytes of address space for the stack. The engine recurses as deep as a template nests its operators, and as deep as the
/// values that it builds: a step can nest a list into itself.
const STACK_BYTES: usize = 1 << 30;
/// Bytes of memory that a compilation or rendering may take beyond what the fuel pays for.
const SPARE_BYTES: u64 = 16 << 20;
/// Longest time of a compilation or rendering. Fuel runs out in a fraction of a second.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Bytes that a template may output beyond twice the bytes of the messages.
const MAX_OVERHEAD_BYTES: usize = 1 << 20;

/// Reason why a conversation can't be rendered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TemplateError {
    /// The template can't be compiled.
    #[error("{0}; the model accepts only a `prompt` with `raw: true`")]
    Unsupported(#[from] TemplateProblem),
    /// The model file has no template.
    #[error("the model has no chat template, so it accepts only a `prompt` with `raw: true`")]
    Missing,
    /// The template refuses these messages, or is faulty.
    #[error("the model's chat template can't render these messages: {0}")]
    Render(String),
    /// The template runs or allocates without end.
    #[error(
        "the model's chat template takes too many steps or too much memory: more than {fuel} units of work"
    )]
    Endless {
        /// Units of fuel that the template had.
        fuel: u64,
    },
    /// The template evaded the limit on fuel and exceeded the one on memory or time. It is not tried again.
    #[error(
        "the model's chat template exceeded its limit on memory or time, and is not tried again"
    )]
    RanAway,
    /// No thread could be started for the template, or the engine panicked.
    #[error("the model's chat template could not be run")]
    Failed,
    /// The template writes without end.
    #[error("the model's chat template outputs more than {limit} bytes")]
    Output {
        /// Exceeded limit in bytes.
        limit: usize,
    },
    /// The text of a message can't be distinguished from the template's own control tokens.
    #[error(
        "the text of a message can't be told apart from the chat template's own control tokens: it contains the name of one, or \
         too many of the characters U+007F and U+FDD0 to U+FDEF; remove them, or send `allow_special: true`"
    )]
    Ambiguous,
}

/// The input of a chat template.
#[derive(Debug, Clone)]
pub struct Conversation {
    /// Mappings with `role`, `content` and whatever else a template reads. The caller vouches for the roles; all other texts
    /// are untrusted.
    pub messages: Vec<Value>,
    /// List of tool descriptions; none if the request has no tools.
    pub tools: Value,
}

impl Conversation {
    /// Returns a conversation of these messages, without tools.
    pub fn new(messages: &[Message]) -> Self {
        let value =
            |m: &Message| context! { role => role_name(m.role), content => m.content.as_str() };
        Self {
            messages: messages.iter().map(value).collect(),
            tools: Value::from(()),
        }
    }

    /// Returns the number of bytes of all texts.
    fn bytes(&self) -> usize {
        let messages = self.messages.iter().map(marks::bytes);
        messages.sum::<usize>() + marks::bytes(&self.tools)
    }
}

/// The prompt made from a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Text up to the place where the answer begins.
    pub text: String,
    /// Byte positions, ascending, that no control token may span: at least one side of each is the text of a message.
    pub breaks: Vec<usize>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    compiled: Arc<Compiled>,
    /// String literals in the template, sorted.
    literals: Vec<String>,
    ran_away: AtomicBool,
}

/// A compiled template with the names it writes out, shared with the rendering thread.
struct Compiled {
    source: String,
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template and tries it on a conversation of one message, so that a template that never ends is refused before
    /// the model gets a job. A template may refuse the trial conversation. `bos` and `eos` are the names of the model's tokens,
    /// which templates write out.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TemplateError> {
        check_length(source)?;
        let literals = literals(source);
        let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
        let (source, bos, eos) = (source.to_owned(), text(bos), text(eos));
        let compiled = bounded(FUEL, move || Compiled::new(source, bos, eos))?;
        let template = Self {
            compiled: Arc::new(compiled),
            literals,
            ran_away: AtomicBool::new(false),
        };
        let trial = Message {
            role: Role::User,
            content: "Hello!".to_owned(),
        };
        match template.render(&Conversation::new(&[trial]), None) {
            // An error raised by the template itself may concern only the trial conversation.
            Ok(_) | Err(TemplateError::Render(_)) => Ok(template),
            Err(error) => Err(error),
        }
    }

    /// Renders the prompt for a conversation, up to the place where the model's answer begins. Finds the parts that come from
    /// the messages, so that none of them becomes a token in `control`. Without `control`, no parts are kept apart.
    ///
    /// A template may transform the text of a message in any way, so the prompt is always the rendering of the plain messages.
    /// Further renderings, of messages with marks in them, show where its text comes from: a marked rendering counts if
    /// removing its marks yields the same text. The first has marks around every character. A template that inspects the
    /// messages may see the marks, so later renderings have fewer.
    pub fn render(
        &self,
        conversation: &Conversation,
        control: Option<&ControlTokens>,
    ) -> Result<Rendered, TemplateError> {
        let now = Zoned::now();
        let text = self.render_once(conversation, &now)?;
        let Some(control) = control.filter(|control| control.is_named_in(&text)) else {
            let breaks = Vec::new();
            return Ok(Rendered { text, breaks });
        };
        let mark = marks::unused(&self.compiled.source, conversation);
        let markings = mark.map(|mark| marks::markings(mark, control, &self.literals));
        for marking in markings.into_iter().flatten() {
            match self.render_once(&marking.conversation(conversation), &now) {
                Ok(marked) => {
                    if let Some(breaks) = marking.breaks(&text, &marked) {
                        return Ok(Rendered { text, breaks });
                    }
                }
                Err(TemplateError::RanAway) => return Err(TemplateError::RanAway),
                // The template saw the marks.
                Err(_) => {}
            }
        }
        Err(TemplateError::Ambiguous)
    }

    fn render_once(
        &self,
        conversation: &Conversation,
        now: &Zoned,
    ) -> Result<String, TemplateError> {
        if self.ran_away.load(Ordering::Relaxed) {
            return Err(TemplateError::RanAway);
        }
        let content = conversation.bytes();
        let messages = conversation.messages.len() as u64;
        let fuel = FUEL + FUEL_PER_MESSAGE * messages + content as u64 / BYTES_PER_FUEL;
        let limit = MAX_OVERHEAD_BYTES + 2 * content;
        let (compiled, conversation) = (Arc::clone(&self.compiled), conversation.clone());
        let now = now.clone();
        let outcome = bounded(fuel, move || {
            compiled.render(&conversation, now, fuel, limit)
        });
        if matches!(outcome, Err(TemplateError::RanAway)) {
            self.ran_away.store(true, Ordering::Relaxed);
        }
        outcome
    }
}

/// Runs a compilation or rendering on a separate thread with a large stack and bounded memory and time.
fn bounded<T: Send + 'static>(
    fuel: u64,
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, TemplateError> {
    let budget = Budget {
        // A value may exist twice while it is built.
        bytes: SPARE_BYTES + 2 * fuel * methods::BYTES_PER_FUEL as u64,
        stack_bytes: STACK_BYTES,
        time: TIME_LIMIT,
    };
    budget::within(&budget, work).unwrap_or_else(|no_result| {
        Err(match no_result {
            NoResult::RanAway => TemplateError::RanAway,
            // The log has only the place of a panic (CAND-064).
            NoResult::Failed => TemplateError::Failed,
        })
    })
}

impl Compiled {
    fn new(source: String, bos: String, eos: String) -> Result<Self, TemplateError> {
        let mut environment = compile(&source)?;
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_unknown_method_callback(methods::call);
        environment.add_function("raise_exception", raise_exception);
        filters::add(&mut environment);
        Ok(Self {
            source,
            environment,
            bos,
            eos,
        })
    }

    fn render(
        &self,
        conversation: &Conversation,
        now: Zoned,
        fuel: u64,
        limit: usize,
    ) -> Result<String, TemplateError> {
        let context = context! {
            messages => &conversation.messages,
            tools => &conversation.tools,
            documents => (),
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            add_generation_prompt => true,
        };
        let mut output = Bounded {
            bytes: Vec::new(),
            limit,
            exceeded: false,
        };
        // Fuel and clock are set on the environment, and differ between conversations.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        environment.add_function("strftime_now", move |format: &str| strftime(format, &now));
        let template = environment
            .get_template(NAME)
            .map_err(|error| TemplateError::Render(error.to_string()))?;
        let rendered = template
            .render_captured_to(context, &mut output)
            .map(|_| ());
        if output.exceeded {
            return Err(TemplateError::Output { limit });
        }
        rendered.map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => TemplateError::Endless { fuel },
            _ => TemplateError::Render(error.to_string()),
        })?;
        String::from_utf8(output.bytes).map_err(|error| TemplateError::Render(error.to_string()))
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    }
}

/// Implements `raise_exception`, by which templates refuse conversations that they can't express.
fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// Formats the local date and time, for templates that write the current date.
fn strftime(format: &str, now: &Zoned) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// A buffer that refuses to grow past a limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
    exceeded: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            self.exceeded = true;
            return Err(io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
