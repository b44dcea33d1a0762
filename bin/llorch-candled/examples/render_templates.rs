//! Renders conversations with chat templates as the worker does. `scripts/compare-templates` compares the results with those
//! of the `transformers` library.
//!
//! Each line of the input is a [`Case`] in JSON, each line of the output an [`Outcome`].

use std::io::{self, BufRead, Write};

use llorch_candled::chat_template::{ChatTemplate, Conversation};
use llorch_candled::tokenizer::ControlTokens;
use minijinja::Value;
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Case {
    template: String,
    bos: String,
    eos: String,
    /// Names of control tokens, by which the tokenizer distinguishes them from the text of messages.
    control: Vec<String>,
    messages: Vec<Value>,
    tools: Value,
}

#[derive(Serialize, Default)]
struct Outcome {
    text: Option<String>,
    error: Option<String>,
    /// Number of control tokens that the template itself wrote.
    control_tokens: usize,
}

fn render(case: Case) -> Result<Outcome, String> {
    let template = ChatTemplate::new(&case.template, Some(&case.bos), Some(&case.eos))
        .map_err(|error| error.to_string())?;
    let names = (0u32..).zip(case.control.iter().map(String::as_str));
    let control = ControlTokens::new(names).map_err(|error| error.to_string())?;
    let conversation = Conversation {
        messages: case.messages,
        tools: case.tools,
    };
    let rendered = template
        .render(&conversation, Some(&control))
        .map_err(|error| error.to_string())?;
    let control_tokens = control.find(&rendered.text, &rendered.breaks).len();
    Ok(Outcome {
        text: Some(rendered.text),
        error: None,
        control_tokens,
    })
}

fn main() -> io::Result<()> {
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let case = serde_json::from_str(&line?).map_err(io::Error::other)?;
        let outcome = render(case).unwrap_or_else(|error| Outcome {
            error: Some(error),
            ..Outcome::default()
        });
        serde_json::to_writer(&mut output, &outcome)?;
        writeln!(output)?;
    }
    Ok(())
}
