//! The dialect of chat templates: Jinja as the `transformers` library compiles it.
//!
//! A template comes with a model file, so it is untrusted: its length, and the length of each tag, are bounded before
//! compilation. The worker renders the result of [`compile`]; `models info` only calls [`check`].

mod scan;

use std::thread;

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;

pub use scan::literals;

/// Maximum bytes of one tag, without its quoted texts. The engine takes quadratic time in the number of operators in a tag.
/// Real tags have a few hundred bytes.
pub const MAX_TAG_BYTES: usize = 1 << 12;
/// Maximum bytes of a template to compile. The longest published ones have 25 KiB.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 16;
/// Name of the template in its environment.
pub const NAME: &str = "chat_template";
/// Address space for the stack of a compilation. The engine's recursion depth equals the nesting depth of a template's
/// operators.
const STACK_BYTES: usize = 1 << 30;

/// The reason a template can't be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateProblem {
    /// A syntax error, or a statement that the dialect lacks.
    #[error("the model's chat template is not supported: {0}")]
    Syntax(String),
    /// The template is longer than any real one.
    #[error("the model's chat template has {found} bytes, but the limit is {MAX_TEMPLATE_BYTES}")]
    TooLong {
        /// Length of the template in bytes.
        found: usize,
    },
    /// A tag is longer than any real one.
    #[error("the model's chat template has a tag of more than {MAX_TAG_BYTES} bytes")]
    LongTag,
    /// The compiler panicked, or its thread could not be started.
    #[error("the model's chat template can't be compiled")]
    Failed,
}

/// Fails if a template is too long to compile within bounds.
pub fn check_length(source: &str) -> Result<(), TemplateProblem> {
    if source.len() > MAX_TEMPLATE_BYTES {
        return Err(TemplateProblem::TooLong {
            found: source.len(),
        });
    }
    match scan::longest_tag(source) {
        0..=MAX_TAG_BYTES => Ok(()),
        _ => Err(TemplateProblem::LongTag),
    }
}

/// Compiles a template under [`NAME`] on the caller's stack. Call [`check_length`] first, and provide a large stack.
pub fn compile(source: &str) -> Result<Environment<'static>, TemplateProblem> {
    let syntax_error = |error: minijinja::Error| TemplateProblem::Syntax(explain(&error));
    let mut environment = Environment::new();
    // Chat templates are written for these settings of the Python library.
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.map_err(syntax_error)?);
    environment
        .add_template_owned(NAME, scan::without_generation(source))
        .map_err(syntax_error)?;
    Ok(environment)
}

/// Compiles a template within bounds and discards the result.
pub fn check(source: &str) -> Result<(), TemplateProblem> {
    check_length(source)?;
    let source = source.to_owned();
    thread::Builder::new()
        .name("chat-template".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || compile(&source).map(drop))
        .map_err(|_| TemplateProblem::Failed)?
        .join()
        .unwrap_or(Err(TemplateProblem::Failed))
}

/// Returns the engine's message without the template's name, which never varies.
fn explain(error: &minijinja::Error) -> String {
    let what = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(source: &str) -> String {
        let environment = compile(source).expect("the template compiles");
        let template = environment.get_template(NAME).expect("the template exists");
        template.render(()).expect("the template renders")
    }

    // [POOLCORE-056]
    #[test]
    fn the_tag_generation_is_a_block_without_effect() {
        assert_eq!(
            rendered("a {%- generation %} b {% set x = 1 %}{%- endgeneration -%} c{{ x }}"),
            "a b c",
            "its names end with it"
        );
        assert_eq!(
            rendered(
                "{# {% generation %} #}{{ '{% generation %}' }}{% raw %}{% generation %}{% endraw %}"
            ),
            "{% generation %}{% generation %}",
            "texts and comments are left alone"
        );
        let trimmed = "  {% generation %}\nx\n  {%+ endgeneration +%}\ny";
        assert_eq!(rendered(trimmed), "x\n  \ny");
    }

    // [POOLCORE-056]
    #[test]
    fn a_template_that_is_not_supported_says_what_and_where() {
        let problem = |source: &str| check(source).expect_err("a problem").to_string();
        let unknown = problem("x\n{% frobnicate %}");
        assert!(
            unknown.contains("frobnicate") && unknown.contains("line 2"),
            "{unknown}"
        );
        assert!(problem("{% generation %}").contains("not supported"));
        assert!(problem(&"x".repeat(MAX_TEMPLATE_BYTES + 1)).contains("65537 bytes"));
        assert!(problem(&format!("{{{{ x{} }}}}", " + x".repeat(2000))).contains("a tag of more"));
        assert_eq!(check("{{ (x) }}"), Ok(()));
    }
}
