//! Incremental conversion of token ids to text.

/// A decoder that assembles characters from the bytes of tokens. A character may span several tokens; its bytes wait until the
/// last one arrives. U+FFFD replaces only bytes that no further token can complete.
pub struct Detokenizer<'a> {
    pieces: &'a [Box<[u8]>],
    waiting: Vec<u8>,
}

impl<'a> Detokenizer<'a> {
    pub(super) fn new(pieces: &'a [Box<[u8]>]) -> Self {
        Self {
            pieces,
            waiting: Vec::new(),
        }
    }

    /// Adds a token and returns the text that is complete now; empty for tokens that aren't text.
    pub fn push(&mut self, id: u32) -> String {
        if let Some(piece) = self.pieces.get(id as usize) {
            self.waiting.extend_from_slice(piece);
        }
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.waiting) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.waiting.clear();
                    return text;
                }
                Err(error) => {
                    let (whole, rest) = self.waiting.split_at(error.valid_up_to());
                    // The bytes before the split are valid UTF-8, so nothing is replaced here.
                    text.push_str(&String::from_utf8_lossy(whole));
                    let Some(broken) = error.error_len() else {
                        self.waiting = rest.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.waiting = rest[broken..].to_vec();
                }
            }
        }
    }

    /// Returns the remaining text when no token follows: one U+FFFD for an incomplete character, else nothing.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.waiting).into_owned();
        self.waiting.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(parts: &[&[u8]]) -> Vec<Box<[u8]>> {
        parts.iter().map(|p| Box::from(*p)).collect()
    }

    // [CAND-031]
    #[test]
    fn a_character_across_tokens_appears_once_it_is_whole() {
        let crab = "🦀".as_bytes();
        let pieces = pieces(&[b"a", &crab[..1], &crab[1..3], &crab[3..], b"z"]);
        let mut reader = Detokenizer::new(&pieces);
        let texts: Vec<String> = [0, 1, 2, 3, 4].map(|id| reader.push(id)).into();
        assert_eq!(texts, ["a", "", "", "🦀", "z"]);
        assert_eq!(reader.finish(), "");
    }

    // [CAND-031]
    #[test]
    fn bytes_that_can_never_become_a_character_are_replaced_at_once() {
        let pieces = pieces(&[b"\xf0\x9f", b"a", b"\xff", b"\xe2\x82"]);
        let mut reader = Detokenizer::new(&pieces);
        assert_eq!(reader.push(0), "");
        assert_eq!(reader.push(1), "\u{fffd}a");
        assert_eq!(reader.push(2), "\u{fffd}");
        assert_eq!(reader.push(3), "");
        assert_eq!(reader.finish(), "\u{fffd}");
    }

    proptest::proptest! {
        // [CAND-031]
        #[test]
        fn however_a_text_is_cut_it_comes_back(text in ".{0,40}", cuts in proptest::collection::vec(1usize..4, 0..80)) {
            let mut rest = text.as_bytes();
            let mut parts = Vec::new();
            for cut in cuts {
                let (front, back) = rest.split_at(cut.min(rest.len()));
                parts.push(Box::from(front));
                rest = back;
            }
            parts.push(Box::from(rest));
            let mut reader = Detokenizer::new(&parts);
            let mut back: String = (0..parts.len() as u32).map(|id| reader.push(id)).collect();
            back.push_str(&reader.finish());
            proptest::prop_assert_eq!(back, text);
        }
    }
}
