//! Results on standard output, notes on standard error. Unlike `println!`, these functions don't panic when the reader
//! has gone.

use std::io::{self, Write};
use std::time::Duration;

use clap::ValueEnum;
use comfy_table::{Attribute, Color, Table, presets};
use serde::Serialize;

use super::{CliError, sanitize};
use crate::kit::units::human_duration;

/// Output format of commands that print data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// JSON for programs, stable and documented
    Json,
}

/// Writes `text` to standard output without a newline, and flushes it, as needed for a streamed answer.
pub fn write(text: impl AsRef<str>) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref().as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| CliError::output(&error))
}

/// Writes `text` and a newline to standard output.
pub fn say(text: impl AsRef<str>) -> Result<(), CliError> {
    writeln!(io::stdout().lock(), "{}", text.as_ref()).map_err(|error| CliError::output(&error))
}

/// Writes a note to standard error. Ignores a failure, as when the reader has gone.
pub fn note(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
}

/// Prints a value as indented JSON.
pub fn print_json(value: &(impl Serialize + ?Sized)) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    say(text)
}

/// Prints rows in columns under headers, without borders, so that both people and `awk` can read them.
pub fn print_table(
    headers: &[&str],
    rows: impl IntoIterator<Item = Vec<paint::Cell>>,
) -> Result<(), CliError> {
    say(render_table(headers, rows, paint::on_stdout()))
}

/// Returns the text that [`print_table`] prints, with or without colour.
pub fn render_table(
    headers: &[&str],
    rows: impl IntoIterator<Item = Vec<paint::Cell>>,
    colour: bool,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if colour {
        table.enforce_styling();
        table.style_text_only();
    } else {
        table.force_no_tty();
    }
    table.set_header(
        headers
            .iter()
            .map(|header| comfy_table::Cell::new(header).add_attribute(Attribute::Bold)),
    );
    for row in rows {
        table.add_row(row.into_iter().map(|cell| {
            let shown = comfy_table::Cell::new(sanitize::clean(&cell.text));
            match cell.style {
                paint::Style::Plain => shown,
                paint::Style::Good => shown.fg(Color::Green),
                paint::Style::Warn => shown.fg(Color::Yellow),
                paint::Style::Bad => shown.fg(Color::Red),
                paint::Style::Dim => shown.add_attribute(Attribute::Dim),
            }
        }));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Colours by meaning, only on a terminal and never with `NO_COLOR`.
pub mod paint {
    use std::io::{self, IsTerminal};

    use colored::Colorize;

    /// The meaning of a text, which determines its colour.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub enum Style {
        /// No special meaning.
        #[default]
        Plain,
        /// Success or a healthy state.
        Good,
        /// Needs attention.
        Warn,
        /// A failure or a lost pool.
        Bad,
        /// Less important.
        Dim,
    }

    /// A table cell: text and its style.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct Cell {
        pub(super) text: String,
        pub(super) style: Style,
    }

    impl Cell {
        /// Returns a cell with this text and style.
        pub fn new(text: impl Into<String>, style: Style) -> Self {
            Self {
                text: text.into(),
                style,
            }
        }

        /// Returns a cell with the state of a job, worker or pool, in the state's style.
        pub fn status(name: impl Into<String>) -> Self {
            let name = name.into();
            let style = match name.as_str() {
                "ready" | "running" | "completed" | "online" | "busy" => Style::Good,
                "failed" | "offline" | "expired" => Style::Bad,
                "queued" | "dispatched" | "starting" | "draining" | "drained" | "suspect"
                | "awaited" => Style::Warn,
                "cancelled" | "stopped" => Style::Dim,
                _ => Style::Plain,
            };
            Self { text: name, style }
        }
    }

    impl<T: Into<String>> From<T> for Cell {
        fn from(text: T) -> Self {
            Self {
                text: text.into(),
                style: Style::Plain,
            }
        }
    }

    /// Returns text for standard output in the style [`Style::Good`].
    pub fn ok(text: &str) -> String {
        apply(Style::Good, text, on_stdout())
    }

    /// Returns text for standard output in the style [`Style::Warn`].
    pub fn warn(text: &str) -> String {
        apply(Style::Warn, text, on_stdout())
    }

    /// Returns text for standard output in the style [`Style::Bad`].
    pub fn bad(text: &str) -> String {
        apply(Style::Bad, text, on_stdout())
    }

    /// Returns text for standard output in the style [`Style::Dim`].
    pub fn dim(text: &str) -> String {
        apply(Style::Dim, text, on_stdout())
    }

    /// Returns text for standard error in this style.
    pub fn on_stderr(style: Style, text: &str) -> String {
        apply(style, text, wanted(io::stderr().is_terminal()))
    }

    /// Returns whether standard output gets colour.
    pub fn on_stdout() -> bool {
        wanted(io::stdout().is_terminal())
    }

    /// Applies the rule of no-color.org: any non-empty value of `NO_COLOR` switches colour off.
    fn wanted(terminal: bool) -> bool {
        terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }

    fn apply(style: Style, text: &str, colour: bool) -> String {
        if !colour {
            return text.to_owned();
        }
        match style {
            Style::Plain => text.to_owned(),
            Style::Good => text.green().to_string(),
            Style::Warn => text.yellow().to_string(),
            Style::Bad => text.red().bold().to_string(),
            Style::Dim => text.dimmed().to_string(),
        }
    }
}

/// Returns the width of standard output in columns: that of the terminal, but at least 40; 80 without a terminal.
pub fn width() -> usize {
    let terminal = Table::new().width();
    terminal.map_or(80, usize::from).max(40)
}

/// Returns the text, or its beginning and `…` if it is longer than `most` characters.
pub fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars()
        .take(most.saturating_sub(1))
        .chain(['…'])
        .collect()
}

/// Returns the text, or `…` and its end if it is longer than `most` characters.
pub fn shorten_start(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let skipped = count - most.saturating_sub(1);
    std::iter::once('…')
        .chain(text.chars().skip(skipped))
        .collect()
}

/// Formats the time from `then` to `now`: `0s` if the clock went back.
pub fn age(then: jiff::Timestamp, now: jiff::Timestamp) -> String {
    let seconds = now.duration_since(then).as_secs();
    human_duration(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::paint::{Cell, Style};
    use super::*;

    fn rows() -> Vec<Vec<Cell>> {
        vec![
            vec!["job-1".into(), Cell::status("running"), "tinyllama".into()],
            vec![
                "job-22".into(),
                Cell::status("failed"),
                Cell::new("a\x1b[2Jb", Style::Dim),
            ],
        ]
    }

    #[test] // [POOLCORE-110]
    fn a_table_has_plain_columns() {
        insta::assert_snapshot!(render_table(&["JOB", "STATUS", "MODEL"], rows(), false), @r"
        JOB     STATUS   MODEL
        job-1   running  tinyllama
        job-22  failed   ab
        ");
        assert_eq!(render_table(&["JOB"], Vec::new(), false), "JOB");
    }

    #[test] // [POOLCORE-110]
    fn colour_does_not_move_columns() {
        let plain = render_table(&["JOB", "STATUS", "MODEL"], rows(), false);
        let coloured = render_table(&["JOB", "STATUS", "MODEL"], rows(), true);
        assert!(coloured.contains("\x1b["));
        let stripped = sanitize::clean(&coloured)
            .lines()
            .map(str::trim_end)
            .collect::<Vec<_>>()
            .join("\n");
        assert_eq!(stripped, plain);
    }

    #[test]
    fn ages_and_shortened_texts() {
        let then = jiff::Timestamp::UNIX_EPOCH;
        assert_eq!(age(then, then + Duration::from_secs(75)), "1m15s");
        assert_eq!(age(then + Duration::from_secs(75), then), "0s");
        assert_eq!(
            (shorten("abcdef", 4), shorten_start("abcdef", 4)),
            ("abc…".into(), "…def".into())
        );
        assert_eq!(
            (shorten("abcd", 4), shorten_start("abcd", 4)),
            ("abcd".into(), "abcd".into())
        );
    }
}
