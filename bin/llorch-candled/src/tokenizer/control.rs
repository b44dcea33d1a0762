//! Lookup of control tokens by name.

use std::cmp::Reverse;
use std::ops::Range;

use aho_corasick::{AhoCorasick, BuildError};

/// Tokens that no text of a message may become.
pub struct ControlTokens {
    /// Ids in the order of the patterns, ascending.
    ids: Vec<u32>,
    names: AhoCorasick,
}

impl ControlTokens {
    /// Collects tokens from ids, ascending, and names. Skips tokens without a name.
    pub fn new<'a>(tokens: impl IntoIterator<Item = (u32, &'a str)>) -> Result<Self, BuildError> {
        let named = tokens.into_iter().filter(|(_, name)| !name.is_empty());
        let (ids, names): (Vec<u32>, Vec<&str>) = named.unzip();
        Ok(Self {
            names: AhoCorasick::new(&names)?,
            ids,
        })
    }

    /// Returns the tokens in `text` from left to right, without tokens whose name contains a position in `breaks` (ascending).
    /// Of several names that begin at one place, the longest wins.
    pub fn find(&self, text: &str, breaks: &[usize]) -> Vec<(u32, Range<usize>)> {
        let mut names: Vec<_> = self
            .names
            .find_overlapping_iter(text)
            .filter(|name| !is_broken(text, name.range(), breaks))
            .map(|name| (name.range(), name.pattern().as_usize()))
            .collect();
        names.sort_by_key(|(place, _)| (place.start, Reverse(place.end)));
        let mut end = 0;
        names.retain(|(place, _)| {
            let free = place.start >= end;
            if free {
                end = place.end;
            }
            free
        });
        let tokens = names.into_iter();
        tokens
            .map(|(place, name)| (self.ids[name], place))
            .collect()
    }

    /// Returns whether a token is a control token that no message may become.
    pub fn has(&self, id: u32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    /// Returns whether the name of a control token is in `text`.
    pub fn is_named_in(&self, text: &str) -> bool {
        self.names.is_match(text)
    }

    /// Returns the places of all names in `text`, including overlapping ones.
    pub fn names_in(&self, text: &str) -> Vec<Range<usize>> {
        let names = self.names.find_overlapping_iter(text);
        names.map(|name| name.range()).collect()
    }
}

/// Returns whether a position in `breaks` is within a name.
fn is_broken(text: &str, name: Range<usize>, breaks: &[usize]) -> bool {
    let next = breaks.partition_point(|place| *place <= name.start);
    let within = breaks.get(next).is_some_and(|place| *place < name.end);
    // A name of one character has no inner position, so breaks on both sides count instead.
    let single = text[name.clone()].chars().nth(1).is_none();
    let at = |place: usize| breaks.binary_search(&place).is_ok();
    within || single && at(name.start) && at(name.end)
}
