//! Guesses of the next tokens of a text, from the text itself: the tokens that followed the same three tokens before may follow
//! them again (prompt lookup decoding). The pass that computes the next token verifies a guess as well, so a right guess costs
//! little, and a wrong one changes nothing but time.

use std::collections::HashMap;

/// Number of latest tokens that must have occurred before in the same order.
const CONTEXT: usize = 3;
/// Tokens of the first guess, and of a guess after a wrong one.
const FIRST: usize = 3;
/// Most tokens of a guess. A pass with this many rows takes less than twice as long as a pass with one row.
pub const LONGEST: usize = 7;
/// Most tokens without a guess after a wrong one.
const LONGEST_PAUSE: usize = 32;

/// The guesses for one text.
#[derive(Debug)]
pub struct Lookup {
    /// Position after the last occurrence of each context, where its followers begin.
    followers: HashMap<[u32; CONTEXT], usize>,
    /// Number of tokens of the text whose contexts are in `followers`.
    seen: usize,
    length: usize,
    pause: usize,
    /// Number of tokens of the text below which no guess is made.
    silent_until: usize,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            followers: HashMap::new(),
            seen: CONTEXT,
            length: FIRST,
            pause: 1,
            silent_until: 0,
        }
    }
}

impl Lookup {
    /// Guesses at most `most` tokens that follow `tokens`, which must begin with those of the last call.
    pub fn guess(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        let Some((_, context)) = tokens.split_last_chunk::<CONTEXT>() else {
            return Vec::new();
        };
        while self.seen < tokens.len() {
            if let Some((_, context)) = tokens[..self.seen].split_last_chunk() {
                self.followers.insert(*context, self.seen);
            }
            self.seen += 1;
        }
        if tokens.len() < self.silent_until {
            return Vec::new();
        }
        let known = self.followers.get(context);
        let length = self.length.min(most);
        known.map_or_else(Vec::new, |&start| {
            tokens[start..].iter().copied().take(length).collect()
        })
    }

    /// Adapts to the number of right tokens in a guess, after which the text has `tokens` tokens.
    pub fn learn(&mut self, guessed: usize, right: usize, tokens: usize) {
        if guessed == 0 {
            return;
        }
        if right == 0 {
            self.length = FIRST;
            self.silent_until = tokens + self.pause;
            self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        } else if right == guessed {
            self.length = (2 * self.length).min(LONGEST);
            self.pause = 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [CAND-019]
    fn what_followed_last_time_is_guessed() {
        let mut lookup = Lookup::default();
        assert!(lookup.guess(&[1, 2], 7).is_empty());
        let text = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9];
        assert!(
            lookup.guess(&text, 7).is_empty(),
            "its last tokens have not occurred before"
        );
        let again = [&text[..], &[1, 2, 3]].concat();
        assert_eq!(lookup.guess(&again, 7), [6, 7, 8]);
        assert_eq!(lookup.guess(&again, 2), [6, 7]);
        // Also where the text repeats itself immediately.
        assert_eq!(Lookup::default().guess(&[5; 4], 7), [5]);
    }

    #[test] // [CAND-019]
    fn right_guesses_get_longer_and_wrong_ones_rare() {
        let mut lookup = Lookup::default();
        let period: Vec<u32> = (0..20).collect();
        let mut text = period.repeat(3);
        assert_eq!(lookup.guess(&text, 100).len(), FIRST);
        lookup.learn(FIRST, FIRST, text.len());
        assert_eq!(lookup.guess(&text, 100).len(), 2 * FIRST);
        lookup.learn(6, 6, text.len());
        assert_eq!(lookup.guess(&text, 100).len(), LONGEST);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            lookup.learn(3, 0, text.len());
            let before = text.len();
            while lookup.guess(&text, 100).is_empty() {
                text.push(period[text.len() % 20]);
            }
            pauses.push(text.len() - before);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 32, 32]);
    }
}
