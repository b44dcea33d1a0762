//! A scanner that finds the tags of a template without compiling it.

use std::ops::Range;

/// A part of a template between its delimiters.
#[derive(Debug, PartialEq, Eq)]
enum Tag {
    /// `{{ ... }}`.
    Expression(Range<usize>),
    /// `{% ... %}`.
    Statement(Range<usize>),
}

/// Returns the inner ranges of all tags outside of comments and `raw` blocks. Omits an unclosed tag, because the compiler
/// rejects it.
fn tags(source: &str) -> Vec<Tag> {
    let mut tags = Vec::new();
    let mut at = 0;
    while let Some(open) = source[at..].find('{').map(|found| at + found) {
        let inner = open + 2;
        let next = match source.as_bytes().get(open + 1) {
            Some(b'#') => source[inner..].find("#}").map(|end| inner + end + 2),
            Some(b'{') => end_of_tag(source, inner, b'}').inspect(|end| {
                tags.push(Tag::Expression(inner..end - 2));
            }),
            Some(b'%') => end_of_tag(source, inner, b'%').and_then(|end| {
                let statement = inner..end - 2;
                if word(&source[statement.clone()]).1 == "raw" {
                    return end_of_raw(source, end);
                }
                tags.push(Tag::Statement(statement));
                Some(end)
            }),
            _ => Some(open + 1),
        };
        let Some(next) = next else { break };
        at = next;
    }
    tags
}

/// Returns the position after the delimiter that closes the tag whose content begins at `from`.
fn end_of_tag(source: &str, from: usize, delimiter: u8) -> Option<usize> {
    let bytes = source.as_bytes();
    let (mut at, mut open) = (from, 0usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            quote @ (b'\'' | b'"') => at = end_of_text(bytes, at + 1, *quote)?,
            byte if *byte == delimiter && open == 0 && bytes.get(at + 1) == Some(&b'}') => {
                return Some(at + 2);
            }
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Returns the position of the quote that closes a text.
fn end_of_text(bytes: &[u8], from: usize, quote: u8) -> Option<usize> {
    let mut at = from;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            byte if *byte == quote => return Some(at),
            _ => at += 1,
        }
    }
}

fn end_of_raw(source: &str, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let inner = at + source[at..].find("{%")? + 2;
        if word(&source[inner..]).1 == "endraw" {
            return source[inner..].find("%}").map(|end| inner + end + 2);
        }
        at = inner;
    }
}

/// Returns the first word of a statement, and its position.
fn word(statement: &str) -> (usize, &str) {
    let inner = statement.strip_prefix(['-', '+']).unwrap_or(statement);
    let begun = inner.trim_start();
    let start = statement.len() - begun.len();
    let end = begun
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(begun.len());
    (start, &begun[..end])
}

/// Replaces `generation` and `endgeneration`, which mark answers in training texts, by a block that only limits the scope of
/// names. The `transformers` library treats them the same way.
pub(super) fn without_generation(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut copied = 0;
    for tag in tags(source) {
        let Tag::Statement(inner) = tag else { continue };
        let (start, name) = word(&source[inner.clone()]);
        let replacement = match name {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        let start = inner.start + start;
        // A statement with further text after its name is not part of the dialect, so the compiler must reject it.
        let rest = source[start + name.len()..inner.end].trim();
        if matches!(rest, "" | "-" | "+") {
            rewritten.push_str(&source[copied..start]);
            rewritten.push_str(replacement);
            copied = start + name.len();
        }
    }
    rewritten.push_str(&source[copied..]);
    rewritten
}

/// Returns the values of all quoted texts inside a template's tags, sorted and without duplicates.
pub fn literals(source: &str) -> Vec<String> {
    let bytes = source.as_bytes();
    let mut texts = Vec::new();
    for tag in tags(source) {
        let (Tag::Expression(inner) | Tag::Statement(inner)) = tag;
        let mut at = inner.start;
        while at < inner.end {
            if let quote @ (b'\'' | b'"') = bytes[at] {
                let Some(end) = end_of_text(bytes, at + 1, quote) else {
                    break;
                };
                texts.push(unescaped(&source[at + 1..end]));
                at = end;
            }
            at += 1;
        }
    }
    texts.sort();
    texts.dedup();
    texts
}

/// Returns the value of a quoted text. Keeps unusual escapes unchanged.
fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, chars.clone().next()) {
            ('\\', Some(next @ ('\\' | '\'' | '"'))) => {
                plain.push(next);
                chars.next();
            }
            ('\\', Some(next @ ('n' | 't' | 'r'))) => {
                plain.push(match next {
                    'n' => '\n',
                    't' => '\t',
                    _ => '\r',
                });
                chars.next();
            }
            _ => plain.push(c),
        }
    }
    plain
}

/// Returns the bytes of the longest tag between `{{` and `}}` or `{%` and `%}`, without quoted texts. This is an upper bound,
/// because comments and `raw` blocks count as tags.
pub(super) fn longest_tag(source: &str) -> usize {
    let (mut longest, mut length) = (0, None::<usize>);
    let mut quote = None;
    let mut bytes = source.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match (length, quote, byte) {
            (None, _, b'{') if matches!(bytes.peek(), Some(b'{' | b'%')) => length = Some(0),
            (None, ..) => {}
            // Skip the escaped character.
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

#[cfg(test)]
mod tests {
    use super::*;

    // [POOLCORE-056]
    #[test]
    fn the_length_of_a_tag_leaves_out_its_texts() {
        assert_eq!(
            longest_tag("text {{ ab }} more {% cde %} {{ 'much } }} more' }}"),
            6
        );
        assert_eq!(longest_tag(r#"{{ "a\"b" + x }} {{"#), 7);
    }

    // [POOLCORE-056]
    #[test]
    fn the_texts_of_a_template_are_those_in_its_tags() {
        let source = r#"{# 'a' #}'b'{{ 'c' ~ {'d': {"e": 1}} }}{% if x == "f\n\"" %}{% raw %}{{ 'g' }}{% endraw %}{{ 'h"#;
        assert_eq!(literals(source), ["c", "d", "e", "f\n\""]);
    }

    proptest::proptest! {
        // [POOLCORE-056]
        #[test]
        fn any_text_is_scanned(source in "[-{}%#'\"\\\\a ]{0,40}|(\\{%-? ?(raw|endraw|generation|endgeneration) ?-?%\\}|[ a{}]){0,12}") {
            let _ = (literals(&source), without_generation(&source), longest_tag(&source));
        }
    }
}
