//! Removal of escape sequences and control characters from untrusted text, to make it safe for a terminal.

use std::borrow::Cow;
use std::io::{self, IsTerminal};

/// Returns `text` without escape sequences and control characters, except newline and tab.
pub fn clean(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(TerminalFilter::always().push(text).into_owned())
    }
}

/// Cleans text with [`clean`] if standard output is a terminal. A file or pipe gets every byte.
pub fn for_terminal(text: &str) -> Cow<'_, str> {
    if io::stdout().is_terminal() {
        clean(text)
    } else {
        Cow::Borrowed(text)
    }
}

/// A filter for text that arrives in pieces. An escape sequence may begin in one piece and end in another.
#[derive(Debug, Clone)]
pub struct TerminalFilter {
    active: bool,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Ordinary text.
    Text,
    /// After ESC and any intermediate bytes.
    Escape,
    /// Inside a control sequence, up to its final byte.
    Control,
    /// Inside a string for the terminal (title, clipboard, ...), up to BEL or ESC `\`.
    String,
}

impl TerminalFilter {
    /// Returns a filter for standard output, which removes nothing unless that is a terminal.
    pub fn for_stdout() -> Self {
        Self {
            active: io::stdout().is_terminal(),
            state: State::Text,
        }
    }

    /// Returns a filter that always removes.
    pub fn always() -> Self {
        Self {
            active: true,
            state: State::Text,
        }
    }

    /// Returns the printable part of the next piece.
    pub fn push<'a>(&mut self, piece: &'a str) -> Cow<'a, str> {
        if !self.active || (self.state == State::Text && piece.chars().all(is_plain)) {
            return Cow::Borrowed(piece);
        }
        Cow::Owned(piece.chars().filter(|&c| self.passes(c)).collect())
    }

    fn passes(&mut self, c: char) -> bool {
        let (next, passes) = match (self.state, c) {
            (_, '\x1b') => (State::Escape, false),
            // C1 control characters: the one-character forms of `ESC [` and of the sequences that take a string.
            (State::Text, '\u{9b}') => (State::Control, false),
            (State::Text, '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}') => (State::String, false),
            (State::Text, c) => (State::Text, is_plain(c)),

            (State::Escape, '[') => (State::Control, false),
            (State::Escape, ']' | 'P' | 'X' | '^' | '_') => (State::String, false),
            (State::Escape, ' '..='/') => (State::Escape, false),
            (State::Escape, '0'..='~') => (State::Text, false),

            (State::Control, ' '..='?') => (State::Control, false),
            (State::Control, '@'..='~') => (State::Text, false),

            (State::String, '\x07' | '\u{9c}') => (State::Text, false),
            // An unterminated string must not swallow the rest of an answer.
            (State::String, '\n') => (State::Text, true),
            (State::String, _) => (State::String, false),

            // Not a valid continuation of a sequence, so the character is text again.
            (State::Escape | State::Control, c) => (State::Text, is_plain(c)),
        };
        self.state = next;
        passes
    }
}

fn is_plain(c: char) -> bool {
    matches!(c, '\n' | '\t') || !c.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test] // [POOLCORE-100]
    fn escape_sequences_and_controls_go_and_text_stays() {
        let cases = [
            ("plain é 漢\n\ttext", "plain é 漢\n\ttext"),
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;a title\x07after", "after"),
            ("\x1b]52;c;Y2xpcA==\x1b\\after", "after"),
            ("\u{9b}2Jcleared\u{9d}title\u{9c}.", "cleared."),
            ("\x1b(Bset \x1b7saved", "set saved"),
            ("bell\x07 back\x08 return\r del\x7f", "bell back return del"),
            ("\x1b]never ended\nnext line", "\nnext line"),
            ("\x1b[31\nm", "\nm"),
            ("\x1b\x1b[1mtwice", "twice"),
        ];
        for (text, expected) in cases {
            assert_eq!(clean(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test] // [POOLCORE-100]
        fn where_the_pieces_are_cut_changes_nothing(text in "(\x1b|\\[|\\]|\\\\|\x07|\u{9b}|[0-9;m]|[a-zé漢]|\n){0,40}", cut in 0usize..40) {
            let at = text.char_indices().map(|(at, _)| at).nth(cut).unwrap_or(text.len());
            let mut filter = TerminalFilter::always();
            let mut pieces = filter.push(&text[..at]).into_owned();
            pieces.push_str(&filter.push(&text[at..]));
            prop_assert_eq!(&pieces, &TerminalFilter::always().push(&text));
            prop_assert!(pieces.chars().all(is_plain));
        }
    }
}
