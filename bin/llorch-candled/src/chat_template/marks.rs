//! Marks in the text of messages, which show where the text of a rendering comes from.

use aho_corasick::{AhoCorasick, MatchKind};
use minijinja::value::{Value, ValueKind};

use super::Conversation;
use crate::tokenizer::ControlTokens;

/// Deepest nesting of values that is searched. JSON readers stop at 128.
const MAX_DEPTH: usize = 128;

/// Places of the marks in a text.
#[derive(Debug, Clone, Copy)]
enum Places {
    /// Around every character except white space, which templates trim. A text that the template searches for (one of its
    /// string literals) may count as one character, and the mark on either side may be left out.
    All {
        whole_literals: bool,
        before: bool,
        after: bool,
    },
    /// Within the names of control tokens only.
    InNames,
}

/// Ways to mark a conversation, most informative first.
const PLACES: [Places; 5] = [
    Places::All {
        whole_literals: false,
        before: true,
        after: true,
    },
    Places::All {
        whole_literals: true,
        before: true,
        after: true,
    },
    Places::All {
        whole_literals: true,
        before: false,
        after: true,
    },
    Places::All {
        whole_literals: true,
        before: true,
        after: false,
    },
    Places::InNames,
];

/// A way to mark a conversation.
pub(super) struct Marking<'a> {
    mark: char,
    places: Places,
    control: &'a ControlTokens,
    /// String literals of the template, sorted.
    literals: &'a [String],
    /// Matcher of the literals that count as one character; `None` if none do.
    whole: Option<AhoCorasick>,
}

/// Returns the ways to mark a conversation, most thorough first.
pub(super) fn markings<'a>(
    mark: char,
    control: &'a ControlTokens,
    literals: &'a [String],
) -> impl Iterator<Item = Marking<'a>> {
    PLACES.into_iter().map(move |places| {
        let whole = match places {
            Places::All { whole_literals, .. } if whole_literals => {
                let harmless = |text: &&String| text.len() > 1 && !control.is_named_in(text);
                AhoCorasick::builder()
                    .match_kind(MatchKind::LeftmostLongest)
                    .build(literals.iter().filter(harmless))
                    .ok()
            }
            _ => None,
        };
        Marking {
            mark,
            places,
            control,
            literals,
            whole,
        }
    })
}

/// Returns a character that is neither in the template nor in the conversation, that templates pass on unchanged, and that
/// isn't white space. Returns `None` if every candidate is in use.
pub(super) fn unused(source: &str, conversation: &Conversation) -> Option<char> {
    // The first takes only one byte in UTF-8. The others are noncharacters, which no text should contain.
    let mut candidates = ['\u{7f}'].into_iter().chain('\u{fdd0}'..='\u{fdef}');
    candidates.find(|candidate| {
        let has = |value: &Value| any_text(value, 0, &mut |text| text.contains(*candidate));
        !source.contains(*candidate)
            && !conversation.messages.iter().any(has)
            && !has(&conversation.tools)
    })
}

impl Marking<'_> {
    /// Marks the texts of a conversation, except the roles.
    pub(super) fn conversation(&self, conversation: &Conversation) -> Conversation {
        let message = |message: &Value| {
            map(message, &mut |key, value| match key.as_str() {
                Some("role") => (key.clone(), value.clone()),
                _ => (self.key(key), self.value(value, 1)),
            })
        };
        Conversation {
            messages: conversation.messages.iter().map(message).collect(),
            tools: self.value(&conversation.tools, 0),
        }
    }

    /// Returns the byte positions of the marks in a rendering, or `None` if the rendering without marks is not `text`.
    pub(super) fn breaks(&self, text: &str, marked: &str) -> Option<Vec<usize>> {
        let mut breaks = Vec::new();
        let mut rest = text;
        for piece in marked.split(self.mark) {
            rest = rest.strip_prefix(piece)?;
            let place = text.len() - rest.len();
            if breaks.last() != Some(&place) {
                breaks.push(place);
            }
        }
        // No mark follows the last piece.
        if !marked.ends_with(self.mark) {
            breaks.pop();
        }
        rest.is_empty().then_some(breaks)
    }

    fn value(&self, value: &Value, depth: usize) -> Value {
        if depth > MAX_DEPTH {
            return value.clone();
        }
        match (value.kind(), value.as_str()) {
            (_, Some(text)) => Value::from(self.text(text)),
            (ValueKind::Map, _) => map(value, &mut |key, value| {
                (self.key(key), self.value(value, depth + 1))
            }),
            (ValueKind::Seq, _) => match value.try_iter() {
                Ok(elements) => elements.map(|e| self.value(&e, depth + 1)).collect(),
                Err(_) => value.clone(),
            },
            _ => value.clone(),
        }
    }

    /// Marks a key. Templates look up keys by name, so only the names of control tokens are marked in keys.
    fn key(&self, key: &Value) -> Value {
        match key.as_str() {
            Some(text) => Value::from(self.within_names(text)),
            None => key.clone(),
        }
    }

    fn text(&self, text: &str) -> String {
        let Places::All { before, after, .. } = self.places else {
            return self.within_names(text);
        };
        // The template may write this text itself, and compare messages with it.
        let own = self.literals.binary_search_by(|own| own.as_str().cmp(text));
        if own.is_ok() && !self.control.is_named_in(text) {
            return text.to_owned();
        }
        let mut marked = String::with_capacity(2 * text.len());
        let mut unit = |unit: &str| {
            let visible = !unit.trim().is_empty();
            if visible && before && !(after && marked.ends_with(self.mark)) {
                marked.push(self.mark);
            }
            marked.push_str(unit);
            if visible && after {
                marked.push(self.mark);
            }
        };
        let mut end = 0;
        let whole = self.whole.iter().flat_map(|whole| whole.find_iter(text));
        for place in whole
            .map(|found| found.range())
            .chain(std::iter::once(text.len()..text.len()))
        {
            let between = &text[end..place.start];
            for (at, c) in between.char_indices() {
                unit(&between[at..at + c.len_utf8()]);
            }
            unit(&text[place.clone()]);
            end = place.end;
        }
        marked
    }

    /// Marks every place between two characters of a control token's name.
    fn within_names(&self, text: &str) -> String {
        let names = self.control.names_in(text);
        if names.is_empty() {
            return text.to_owned();
        }
        let mut inside = vec![false; text.len()];
        for name in names {
            inside[name.start + 1..name.end].fill(true);
        }
        let mut marked = String::with_capacity(2 * text.len());
        for (at, c) in text.char_indices() {
            if inside[at] {
                marked.push(self.mark);
            }
            marked.push(c);
        }
        marked
    }
}

/// Returns the number of bytes of the texts in a value.
pub(super) fn bytes(value: &Value) -> usize {
    let mut bytes = 0;
    any_text(value, 0, &mut |text| {
        bytes += text.len();
        false
    });
    bytes
}

/// Returns whether `is` holds for any text in a value, including the keys of mappings.
fn any_text(value: &Value, depth: usize, is: &mut dyn FnMut(&str) -> bool) -> bool {
    if let Some(text) = value.as_str() {
        return is(text);
    }
    if depth > MAX_DEPTH || !matches!(value.kind(), ValueKind::Map | ValueKind::Seq) {
        return false;
    }
    let Ok(mut parts) = value.try_iter() else {
        return false;
    };
    let is_map = value.kind() == ValueKind::Map;
    parts.any(|part| {
        let inner = is_map.then(|| value.get_item(&part).ok()).flatten();
        any_text(&part, depth + 1, is) || inner.is_some_and(|inner| any_text(&inner, depth + 1, is))
    })
}

/// Maps the entries of a mapping and keeps their order.
fn map(value: &Value, change: &mut dyn FnMut(&Value, &Value) -> (Value, Value)) -> Value {
    let Ok(keys) = value.try_iter() else {
        return value.clone();
    };
    Value::from_pairs(keys.map(|key| {
        let inner = value.get_item(&key).unwrap_or_default();
        change(&key, &inner)
    }))
}
