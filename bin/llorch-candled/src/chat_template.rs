//! Conversations as the model was trained to read them: the file's own chat template, rendered within bounds.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use pool_core::api::worker::{Message, Role};

/// Steps a template may take. Real templates take a few dozen a message.
const FUEL: u64 = 2_000_000;
/// Bytes a template may put out beyond the messages themselves.
const MAX_OVERHEAD_BYTES: usize = 1 << 20;
/// Longest template that is compiled.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
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
    /// It refuses these messages, or is wrong.
    #[error("the model's chat template can't render these messages: {0}")]
    Render(String),
    /// It runs without end.
    #[error("the model's chat template takes too many steps")]
    Endless,
    /// It writes without end.
    #[error("the model's chat template puts out more than {limit} bytes")]
    Output {
        /// The limit it ran into.
        limit: usize,
    },
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are the names of the model's tokens, which templates write out.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::TooLong {
                found: source.len(),
            });
        }
        let mut environment = Environment::new();
        // What the Python library that templates are written for sets.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Syntax(error.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| TemplateError::Syntax(error.to_string()))?;
        Ok(Self {
            environment,
            bos: bos.unwrap_or_default().to_owned(),
            eos: eos.unwrap_or_default().to_owned(),
        })
    }

    /// The prompt for `messages`, up to where the model's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        let limit =
            MAX_OVERHEAD_BYTES + 2 * messages.iter().map(|m| m.content.len()).sum::<usize>();
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
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| TemplateError::Render(error.to_string()))?;
        let rendered = template
            .render_captured_to(context, &mut output)
            .map(|_| ());
        if output.exceeded {
            return Err(TemplateError::Output { limit });
        }
        rendered.map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => TemplateError::Endless,
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
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
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
    fn a_template_that_refuses_or_never_ends_is_an_error() {
        let render = |source: &str| {
            ChatTemplate::new(source, None, None)
                .unwrap()
                .render(&[user("hello")])
                .unwrap_err()
        };
        let refused = render("{{ raise_exception('roles must alternate') }}");
        assert!(
            refused.to_string().contains("roles must alternate"),
            "{refused}"
        );
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(nested), TemplateError::Endless));
        let long = "{% for a in range(9999) %}{{ 'x' * 1000 }}{% endfor %}";
        assert!(matches!(render(long), TemplateError::Output { .. }));
        assert!(matches!(
            ChatTemplate::new("{% for %}", None, None),
            Err(TemplateError::Syntax(_))
        ));
    }
}
