//! Stop texts, which end an answer, found across the boundaries of tokens.

/// The outcome of filtering a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub struct Passed {
    /// Text that may be shown: it contains no stop text, and its end can't be the beginning of one.
    pub text: String,
    /// True if a stop text appeared, after which nothing may follow.
    pub stopped: bool,
}

/// A filter that passes text up to the first stop text. Text that may be the beginning of a stop text is held back.
#[derive(Debug)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// Returns a filter for these stop texts. Empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(),
            held: String::new(),
        }
    }

    /// Filters the next piece of text.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop))
            .min();
        if let Some(start) = found {
            self.held.truncate(start);
            return Passed {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Passed {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// Returns the text held back, once nothing can follow it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Returns the length of the longest end of `text` that is a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    // Such an end begins with the first character of `stop`, so it begins between characters of `text`.
    (1..stop.len())
        .rev()
        .filter(|length| stop.is_char_boundary(*length))
        .find(|length| text.ends_with(&stop[..*length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut filter = StopFilter::new(&stops);
        let mut texts = Vec::new();
        for piece in pieces {
            let passed = filter.push(piece);
            texts.push(passed.text);
            if passed.stopped {
                return (texts, true);
            }
        }
        texts.push(filter.finish());
        (texts, false)
    }

    // [CAND-050]
    #[test]
    fn a_stop_text_across_pieces_ends_the_text_before_it() {
        assert_eq!(
            run(&["END"], &["one E", "N", "D two"]),
            (vec!["one ".into(), "".into(), "".into()], true)
        );
    }

    // [CAND-050]
    #[test]
    fn text_that_only_looked_like_a_beginning_comes_out() {
        assert_eq!(
            run(&["END"], &["EN", "EN", "X"]),
            (vec!["".into(), "EN".into(), "ENX".into(), "".into()], false)
        );
        assert_eq!(
            run(&["aab"], &["aaa", "b"]),
            (vec!["a".into(), "".into()], true)
        );
    }

    // [CAND-050]
    #[test]
    fn the_first_of_several_wins_and_the_held_text_is_flushed() {
        assert_eq!(
            run(&["two", "one"], &["zero one two"]),
            (vec!["zero ".into()], true)
        );
        assert_eq!(
            run(&["ende", "é!"], &["das en"]),
            (vec!["das ".into(), "en".into()], false)
        );
        assert_eq!(
            run(&["é!"], &["caf", "é", "!"]),
            (vec!["caf".into(), "".into(), "".into()], true)
        );
    }

    proptest::proptest! {
        // [CAND-050]
        #[test]
        fn the_outcome_does_not_depend_on_where_the_text_is_cut(
            text in "[abé]{0,30}",
            stops in proptest::collection::vec("[abé]{1,4}", 1..4),
            cuts in proptest::collection::vec(0usize..5, 0..30),
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            for cut in cuts {
                let end = chars.len().min(at + cut);
                pieces.push(chars[at..end].iter().collect::<String>());
                at = end;
            }
            pieces.push(chars[at..].iter().collect());
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (texts, stopped) = run(&stops, &pieces);
            let shown = texts.concat();
            proptest::prop_assert!(text.starts_with(&shown));
            proptest::prop_assert!(stops.iter().all(|stop| !shown.contains(stop)));
            proptest::prop_assert_eq!(stopped, stops.iter().any(|stop| text.contains(stop)));
            proptest::prop_assert!(stopped || shown == text);
        }
    }
}
