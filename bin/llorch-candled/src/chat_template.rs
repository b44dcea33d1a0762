//! Conversations as the model was trained to read them: the file's own chat template, rendered within bounds.

mod budget;
mod methods;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use budget::{Budget, NoResult};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use pool_core::api::worker::{Message, Role};

/// Most bytes of one tag, its texts left out: the engine takes time with the square of the operators in a tag. Real tags
/// have a few hundred.
const MAX_TAG_BYTES: usize = 1 << 12;
/// Fuel of a rendering: about one a step, and one for every 64 bytes that are made. Real templates take a few dozen
/// steps a message. It bounds time and memory alike: this much makes 6 MiB at most.
const FUEL: u64 = 100_000;
/// Fuel for each message on top.
const FUEL_PER_MESSAGE: u64 = 2_000;
/// Bytes of a message that add one fuel: a template may copy each of them 32 times over.
const BYTES_PER_FUEL: u64 = 2;
/// How deep macros may call each other.
const MAX_DEPTH: usize = 200;
/// Address space for the stack. The engine recurses as deep as a template nests its operators, and as deep as the values
/// that it makes: a step can nest a list into itself.
const STACK_BYTES: usize = 1 << 30;
/// Memory of a compilation or rendering beyond what the fuel pays for.
const SPARE_BYTES: u64 = 16 << 20;
/// Longest time for either. Fuel runs out in a fraction of a second.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Bytes a template may put out beyond the messages themselves.
const MAX_OVERHEAD_BYTES: usize = 1 << 20;
/// Longest template that is compiled. The longest published ones have 25 KiB.
const MAX_TEMPLATE_BYTES: usize = 1 << 16;
const NAME: &str = "chat_template";

/// Why a conversation can't be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is no template.
    #[error("the model's chat template can't be read: {0}")]
    Syntax(String),
    /// It is longer than any real one.
    #[error("the model's chat template has {found} bytes, the limit is {MAX_TEMPLATE_BYTES}")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// The file has none.
    #[error("the model has no chat template, so it takes only a `prompt` with `raw: true`")]
    Missing,
    /// One of its tags is longer than any real one.
    #[error("the model's chat template has a tag of more than {MAX_TAG_BYTES} bytes")]
    LongTag,
    /// It refuses these messages, or is wrong.
    #[error("the model's chat template can't render these messages: {0}")]
    Render(String),
    /// It runs without end, or takes memory without end.
    #[error(
        "the model's chat template takes too many steps or too much memory: more than {fuel} units of work"
    )]
    Endless {
        /// The units it had.
        fuel: u64,
    },
    /// It ran past every bound before, and is not tried again.
    #[error("the model's chat template takes memory or time without end, and is not tried again")]
    RanAway,
    /// There was no thread for it, or the engine panicked.
    #[error("the model's chat template can't be run")]
    Failed,
    /// It writes without end.
    #[error("the model's chat template puts out more than {limit} bytes")]
    Output {
        /// The limit it ran into.
        limit: usize,
    },
}

/// A compiled chat template.
pub struct ChatTemplate {
    compiled: Arc<Compiled>,
    ran_away: AtomicBool,
}

/// What a rendering needs; shared with its thread.
struct Compiled {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template and tries it on a conversation of one message, so that one that never ends is refused
    /// before the model gets a job. A template may refuse that conversation. `bos` and `eos` are the names of the
    /// model's tokens, which templates write out.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::TooLong {
                found: source.len(),
            });
        }
        if longest_tag(source) > MAX_TAG_BYTES {
            return Err(TemplateError::LongTag);
        }
        let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
        let (source, bos, eos) = (source.to_owned(), text(bos), text(eos));
        let compiled = bounded(FUEL, move || Compiled::new(source, bos, eos))?;
        let template = Self {
            compiled: Arc::new(compiled),
            ran_away: AtomicBool::new(false),
        };
        let trial = Message {
            role: Role::User,
            content: "Hello!".to_owned(),
        };
        match template.render(&[trial]) {
            // The template's own refusal, or a conversation that is not to its taste.
            Ok(_) | Err(TemplateError::Render(_)) => Ok(template),
            Err(error) => Err(error),
        }
    }

    /// The prompt for `messages`, up to where the model's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        if self.ran_away.load(Ordering::Relaxed) {
            return Err(TemplateError::RanAway);
        }
        let content: usize = messages.iter().map(|m| m.content.len()).sum();
        let fuel =
            FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + content as u64 / BYTES_PER_FUEL;
        let limit = MAX_OVERHEAD_BYTES + 2 * content;
        let (compiled, messages) = (Arc::clone(&self.compiled), messages.to_vec());
        let outcome = bounded(fuel, move || compiled.render(&messages, fuel, limit));
        if matches!(outcome, Err(TemplateError::RanAway)) {
            self.ran_away.store(true, Ordering::Relaxed);
        }
        outcome
    }
}

/// Bytes of the longest tag between `{{` and `}}` or `{%` and `%}`, texts in quotes left out.
fn longest_tag(source: &str) -> usize {
    let (mut longest, mut length) = (0, None::<usize>);
    let mut quote = None;
    let mut bytes = source.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match (length, quote, byte) {
            (None, _, b'{') if matches!(bytes.peek(), Some(b'{' | b'%')) => length = Some(0),
            (None, ..) => {}
            // A quoted character follows.
            (_, Some(_), b'\\') => drop(bytes.next()),
            (_, Some(open), _) if byte == open => quote = None,
            (_, Some(_), _) => {}
            (_, None, b'\'' | b'"') => quote = Some(byte),
            (_, None, b'}' | b'%') if bytes.peek() == Some(&b'}') => length = None,
            (Some(before), None, _) => {
                length = Some(before + 1);
                longest = longest.max(before + 1);
            }
        }
    }
    longest
}

/// Runs a compilation or rendering on a thread with a stack of its own and bounded memory.
fn bounded<T: Send + 'static>(
    fuel: u64,
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, TemplateError> {
    let budget = Budget {
        // A value may be there twice while it is made.
        bytes: SPARE_BYTES + 2 * fuel * methods::BYTES_PER_FUEL as u64,
        stack_bytes: STACK_BYTES,
        time: TIME_LIMIT,
    };
    budget::within(&budget, work).unwrap_or_else(|no_result| {
        Err(match no_result {
            NoResult::RanAway => TemplateError::RanAway,
            // A panic is in the log by its place alone (CAND-064).
            NoResult::Failed => TemplateError::Failed,
        })
    })
}

impl Compiled {
    fn new(source: String, bos: String, eos: String) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // What the Python library that templates are written for sets.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Syntax(error.to_string()))?);
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_unknown_method_callback(methods::call);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| TemplateError::Syntax(error.to_string()))?;
        Ok(Self {
            environment,
            bos,
            eos,
        })
    }

    fn render(
        &self,
        messages: &[Message],
        fuel: u64,
        limit: usize,
    ) -> Result<String, TemplateError> {
        let values: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => role_name(m.role), content => m.content.as_str() })
            .collect();
        let context = context! {
            messages => values,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            add_generation_prompt => true,
        };
        let mut output = Bounded {
            bytes: Vec::new(),
            limit,
            exceeded: false,
        };
        // Fuel belongs to the environment, and differs from conversation to conversation.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
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

/// How templates refuse what they can't express.
fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// The date, for templates that tell the model what day it is.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
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
mod tests {
    use super::*;

    fn user(content: &str) -> Message {
        Message {
            role: Role::User,
            content: content.to_owned(),
        }
    }

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    // [CAND-020]
    #[test]
    fn a_conversation_is_rendered_up_to_the_answer() {
        let template = ChatTemplate::new(CHATML, None, None).unwrap();
        let messages = [
            Message {
                role: Role::System,
                content: "Be brief.".into(),
            },
            user("Hi <b>"),
        ];
        assert_eq!(
            template.render(&messages).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
        );
    }

    // [CAND-020]
    #[test]
    fn templates_written_for_python_work() {
        let source = "{{ bos_token }}{% set ns = namespace(n=0) %}{%- for m in messages -%}\n  {%- if m.content.strip().startswith('x') %}{% continue %}{% endif -%}{% set ns.n = ns.n + 1 %}[{{ m.role|upper }}] {{ m['content'].split('/')[-1] | trim }}{% endfor %}{{ ns.n }}{{ strftime_now('%Y')|length }}{{ eos_token }}";
        let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
        assert_eq!(
            template.render(&[user("a/b "), user(" x")]).unwrap(),
            "<s>[USER] b14</s>"
        );
    }

    // [CAND-021]
    #[test]
    fn a_template_that_refuses_is_an_error() {
        let template =
            ChatTemplate::new("{{ raise_exception('roles must alternate') }}", None, None);
        let refused = template.unwrap().render(&[user("hello")]).unwrap_err();
        assert!(
            refused.to_string().contains("roles must alternate"),
            "{refused}"
        );
        assert!(matches!(
            ChatTemplate::new("{% for %}", None, None),
            Err(TemplateError::Syntax(_))
        ));
    }

    // [CAND-021]
    #[test]
    fn a_template_that_does_not_end_for_some_messages_is_an_error_for_them() {
        let source = "{% if messages|length > 1 %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{% endif %}fine";
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!(template.render(&[user("a")]).unwrap(), "fine");
        let error = template.render(&[user("a"), user("b")]).unwrap_err();
        assert!(matches!(error, TemplateError::Endless { .. }), "{error}");
    }

    // [CAND-021]
    #[test]
    fn the_length_of_a_tag_leaves_out_its_texts() {
        assert_eq!(
            longest_tag("text {{ ab }} more {% cde %} {{ 'much } }} more' }}"),
            6
        );
        assert_eq!(longest_tag(r#"{{ "a\"b" + x }} {{"#), 7);
        let long = format!("{{{{ x{} }}}}", " + x".repeat(2000));
        assert!(matches!(
            ChatTemplate::new(&long, None, None),
            Err(TemplateError::LongTag)
        ));
    }

    // [CAND-021]
    #[test]
    fn long_conversations_have_work_in_proportion() {
        // What the heaviest real templates do with each message: look for markers, split, strip, and put together.
        let source = "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}{% if '<tool>' in c or c.startswith('x') %}{{ c|trim }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + c.replace('\r', '') + '<|im_end|>\n' }}{% endfor %}";
        let template = ChatTemplate::new(source, None, None).unwrap();
        let short: Vec<Message> = (0..5000).map(|_| user("Hi")).collect();
        assert!(template.render(&short).unwrap().len() > 5000 * 20);
        let long = [user(&"word ".repeat(1 << 20))];
        assert!(template.render(&long).unwrap().len() > 5 << 20);
    }
}
