//! Prompts that have nothing in common, so that no server finds part of one in its cache.

/// Words that most vocabularies have as one token each.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

/// Returns the prompt with this number, of about `tokens` tokens.
pub fn of(number: u64, tokens: u32) -> String {
    // SplitMix64, so that different numbers begin with different words.
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        WORDS[((z ^ (z >> 31)) % WORDS.len() as u64) as usize]
    };
    let words: Vec<&str> = (0..tokens).map(|_| word()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [LLORCH-100]
    fn prompts_are_the_same_each_time_and_begin_differently() {
        assert_eq!(of(3, 50), of(3, 50));
        assert_eq!(of(3, 50).split(' ').count(), 50);
        let beginnings: std::collections::HashSet<String> = (0..500).map(|n| of(n, 6)).collect();
        assert_eq!(beginnings.len(), 500);
    }
}
