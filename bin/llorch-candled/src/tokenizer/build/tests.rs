use pool_core::catalog::gguf::{GgufFile, Vocabulary, VocabularyError};
use pool_core::catalog::support::PRE_TOKENIZERS;

use proptest::prelude::*;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use crate::tokenizer::sentence_piece::{SPACE, byte_token};
use crate::tokenizer::{Splitter, Tokenizer, TokenizerError};

/// Text, score and kind of a token.
type Token<'t> = (&'t str, f32, u32);

/// Returns the header of a file with this tokenizer.
fn header(kind: &str, pre: Option<&str>, merges: &[&str], vocabulary: &[Token<'_>]) -> GgufFile {
    header_of("some", kind, pre, merges, vocabulary)
}

fn header_of(
    architecture: &str,
    kind: &str,
    pre: Option<&str>,
    merges: &[&str],
    vocabulary: &[Token<'_>],
) -> GgufFile {
    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }
    fn array(ty: u32, elements: Vec<Vec<u8>>) -> Vec<u8> {
        let head = [
            9u32.to_le_bytes().to_vec(),
            ty.to_le_bytes().to_vec(),
            (elements.len() as u64).to_le_bytes().to_vec(),
        ];
        [head.concat(), elements.concat()].concat()
    }
    let text_value = |value: &str| [8u32.to_le_bytes().to_vec(), text(value)].concat();
    let column = |ty: u32, element: &dyn Fn(&Token<'_>) -> Vec<u8>| {
        array(ty, vocabulary.iter().map(element).collect())
    };
    let mut entries = vec![
        ("general.architecture", text_value(architecture)),
        ("tokenizer.ggml.model", text_value(kind)),
        ("tokenizer.ggml.tokens", column(8, &|token| text(token.0))),
        (
            "tokenizer.ggml.scores",
            column(6, &|token| token.1.to_le_bytes().to_vec()),
        ),
        (
            "tokenizer.ggml.token_type",
            column(5, &|token| token.2.to_le_bytes().to_vec()),
        ),
        (
            "tokenizer.ggml.merges",
            array(8, merges.iter().map(|rule| text(rule)).collect()),
        ),
        (
            "tokenizer.ggml.bos_token_id",
            [4u32.to_le_bytes(), 1u32.to_le_bytes()].concat(),
        ),
    ];
    entries.extend(pre.map(|pre| ("tokenizer.ggml.pre", text_value(pre))));
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        bytes.extend(text(key));
        bytes.extend(value);
    }
    // One tensor: a name, one dimension of 1, 32-bit floats, at the start of the data.
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(b"t\x01\0\0\0\x01\0\0\0\0\0\0\0");
    bytes.extend([0; 4 + 8]);
    bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
    GgufFile::read(&bytes[..], bytes.len() as u64).expect("a valid header")
}

const NORMAL: u32 = 1;
const CONTROL: u32 = 3;

fn sentence_piece() -> Tokenizer {
    let mut vocabulary = vec![
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
    ];
    vocabulary.extend([("<0xC3>", 0.0, 6), ("<0xA9>", 0.0, 6)]);
    vocabulary.extend([
        ("\u{2581}", -20.0, NORMAL),
        ("a", -21.0, NORMAL),
        ("b", -22.0, NORMAL),
        ("c", -23.0, NORMAL),
    ]);
    // "bc" scores better than "ab", so "abc" is a + bc.
    vocabulary.extend([
        ("ab", -5.0, NORMAL),
        ("bc", -4.0, NORMAL),
        ("\u{2581}a", -6.0, NORMAL),
    ]);
    Tokenizer::from_header(&header("llama", None, &[], &vocabulary)).expect("a valid vocabulary")
}

// [CAND-032]
#[test]
fn sentence_piece_joins_the_best_scored_pair_first() {
    let tokenizer = sentence_piece();
    let read = |ids: &[u32]| {
        let mut reader = tokenizer.detokenizer();
        ids.iter().map(|id| reader.push(*id)).collect::<String>()
    };
    let ids = tokenizer.encode("abc").unwrap();
    assert_eq!(
        ids,
        [11, 10],
        "a space goes before the text, then bc is joined before ab"
    );
    assert_eq!(read(&ids), " abc");
    let bytes = tokenizer.encode("aé").unwrap();
    assert_eq!(
        bytes,
        [11, 3, 4],
        "text that no piece covers becomes byte tokens"
    );
    assert_eq!(read(&bytes), " aé");
    assert_eq!(tokenizer.encode("a</s>a").unwrap(), [11, 2, 11]);
    assert_eq!(
        tokenizer.encode_prompt("a", &[]).unwrap(),
        [1, 11],
        "these models need their first token"
    );
    assert_eq!(
        tokenizer.encode_prompt("<s>a", &[]).unwrap(),
        [1, 11],
        "but only once"
    );
    assert!(tokenizer.is_end(2) && !tokenizer.is_end(11));
}

// [CAND-032]
#[test]
fn of_pairs_with_one_score_the_leftmost_is_joined() {
    let mut vocabulary = vec![
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
    ];
    vocabulary.extend(["\u{2581}", "a", "b", "ba", "ab"].map(|text| (text, -1.0, NORMAL)));
    let tokenizer = Tokenizer::from_header(&header("llama", None, &[], &vocabulary)).unwrap();
    assert_eq!(tokenizer.encode("abab").unwrap(), [3, 7, 7]);
    assert_eq!(tokenizer.encode("aab").unwrap(), [3, 4, 7]);
    assert_eq!(
        tokenizer.encode("a?!b").unwrap(),
        [3, 4, 0, 5],
        "consecutive unknown characters become one token"
    );
}

// [CAND-032]
#[test]
fn tokens_of_bytes_have_two_hexadecimal_digits() {
    let bytes = ["<0x0A>", "<0xfF>", "<0x+A>", "<0xA>", "<0x0A", "0x0A"].map(byte_token);
    assert_eq!(bytes, [Some(10), Some(255), None, None, None, None]);
}

/// Returns the `tokenizers` library's pipeline for pieces, with a rule for each pair that forms a piece, best first.
fn rules_of(pieces: &[Token<'_>]) -> tokenizers::Tokenizer {
    let vocab: Vocab = (0..)
        .zip(pieces)
        .map(|(id, piece)| (piece.0.to_owned(), id))
        .collect();
    let mut rules: Vec<(f32, (String, String))> = Vec::new();
    for (text, score, _) in pieces.iter().filter(|piece| piece.2 == NORMAL) {
        for (border, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(border);
            if vocab.contains_key(left) && vocab.contains_key(right) {
                rules.push((*score, (left.to_owned(), right.to_owned())));
            }
        }
    }
    rules.sort_by(|a, b| b.0.total_cmp(&a.0));
    let rules = rules.into_iter().map(|(_, rule)| rule).collect();
    let model = BPE::builder()
        .byte_fallback(true)
        .fuse_unk(true)
        .unk_token("<unk>".to_owned())
        .vocab_and_merges(vocab, rules);
    let mut tokenizer = tokenizers::Tokenizer::new(model.build().expect("valid merge rules"));
    let space = || SPACE.to_string();
    let normalizers: [NormalizerWrapper; 2] = [
        Prepend::new(space()).into(),
        Replace::new(" ", space()).expect("a pattern").into(),
    ];
    tokenizer
        .with_normalizer(Some(Normalizers::new(normalizers.to_vec())))
        .expect("normalizers");
    tokenizer
}

/// Pieces of several characters, best first.
fn drawn_pieces() -> impl Strategy<Value = Vec<String>> {
    let pieces = proptest::collection::btree_set("[ab\u{2581}é]{2,5}", 0..40);
    pieces.prop_map(Vec::from_iter).prop_shuffle()
}

proptest! {
    // [CAND-032]
    #[test]
    fn pieces_are_joined_as_by_rules(
        drawn in drawn_pieces(),
        accented in any::<bool>(),
        text in "[abé c\u{2581}]{0,40}",
    ) {
        let mut pieces = vec![("<unk>", 0.0, 2), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)];
        pieces.extend([("<0xC3>", 0.0, 6), ("<0xA9>", 0.0, 6), ("<0x63>", 0.0, 6)]);
        let characters = ["a", "b", "\u{2581}", "é"].into_iter().take(if accented { 4 } else { 3 });
        pieces.extend(characters.map(|text| (text, -100.0, NORMAL)));
        // The library never joins a character that isn't a piece with another.
        let drawn = drawn.iter().filter(|text| accented || !text.contains('é'));
        pieces.extend((0u8..).zip(drawn).map(|(rank, text)| (text.as_str(), -f32::from(rank), NORMAL)));
        let ours = Tokenizer::from_header(&header("llama", None, &[], &pieces)).expect("a vocabulary");
        let rules = rules_of(&pieces).encode_fast(text.as_str(), false).expect("text");
        prop_assert_eq!(ours.encode(&text).expect("text"), rules.get_ids());
    }
}

// [CAND-033]
#[test]
fn vocabularies_that_are_not_understood_are_refused_by_name() {
    let error = |header: &GgufFile| match Tokenizer::from_header(header) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the vocabulary was accepted"),
    };
    let vocabulary = [("a", 0.0, NORMAL), ("b", 0.0, NORMAL)];
    assert!(error(&header("bert", None, &[], &vocabulary)).contains("tokenizer kind `bert`"));
    assert!(
        error(&header("gpt2", Some("tekken"), &[], &vocabulary)).contains("pre-tokenizer `tekken`")
    );
    assert!(error(&header("gpt2", Some("gpt-2"), &["ab"], &vocabulary)).contains("merge rule 0"));
    let outside = Tokenizer::from_header(&header("gpt2", Some("gpt-2"), &[], &vocabulary[..1]));
    assert!(matches!(
        outside,
        Err(TokenizerError::Vocabulary(VocabularyError::Id {
            id: 1,
            last: 0,
            ..
        }))
    ));
}

// [CAND-030]
#[test]
fn each_way_of_splitting_has_its_own_rules_for_digits() {
    let vocabulary: Vec<Token> = ["1", "x", "11", "111", "1111"]
        .into_iter()
        .map(|text| (text, 0.0, NORMAL))
        .collect();
    let merges = ["1 1", "11 1", "11 11"];
    let lengths = |pre: &str| {
        let tokenizer =
            Tokenizer::from_header(&header("gpt2", Some(pre), &merges, &vocabulary)).unwrap();
        tokenizer
            .encode("1111")
            .unwrap()
            .into_iter()
            .map(|id| vocabulary[id as usize].0.len())
            .collect::<Vec<_>>()
    };
    assert_eq!(lengths("gpt-2"), [4]);
    assert_eq!(lengths("llama-bpe"), [3, 1]);
    assert_eq!(lengths("default"), [3, 1]);
    assert_eq!(lengths("qwen2"), [1, 1, 1, 1]);
    assert_eq!(lengths("smollm"), [1, 1, 1, 1]);
    assert_eq!(lengths("gpt-4o"), [3, 1]);
    assert_eq!(lengths("dbrx"), [3, 1]);
}

/// Returns the pieces that a text is split into before merging.
fn splits<'t>(pre: &str, text: &'t str) -> Vec<&'t str> {
    let vocabulary = [("a", 0.0, NORMAL), ("b", 0.0, NORMAL)];
    let tokenizer = Tokenizer::from_header(&header("gpt2", Some(pre), &[], &vocabulary)).unwrap();
    let Splitter::ByteLevel(tokenizer) = &tokenizer.splitter else {
        panic!("a byte-level vocabulary");
    };
    let splitter = tokenizer.get_pre_tokenizer().unwrap();
    let mut split = PreTokenizedString::from(text);
    splitter.pre_tokenize(&mut split).unwrap();
    let pieces = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
    let places = pieces.into_iter().map(|(_, (start, end), _)| start..end);
    places.map(|place| &text[place]).collect()
}

// [CAND-030]
#[test]
fn gpt_4o_splits_words_before_capitals_and_keeps_contractions() {
    for (text, pieces) in [
        (
            "HelloWorld's 12345",
            &["Hello", "World's", " ", "123", "45"][..],
        ),
        ("don't STOP", &["don't", " STOP"]),
        ("ABCdef", &["ABCdef"]),
        ("naïveÉcole", &["naïve", "École"]),
        ("日本語 кот", &["日本語", " кот"]),
        ("a/b\n\n  c", &["a", "/b", "\n\n", " ", " c"]),
        ("??\n/x", &["??\n/", "x"]),
    ] {
        assert_eq!(splits("gpt-4o", text), pieces);
    }
}

const USER_DEFINED: u32 = 4;

/// Returns the texts of the tokens that end an answer.
fn ends(vocabulary: &[Token<'_>]) -> Vec<String> {
    let header = header("gpt2", Some("gpt-2"), &[], vocabulary);
    let vocabulary = Vocabulary::from_header(&header).expect("a valid vocabulary");
    vocabulary.ends().map(|end| end.text).collect()
}

// [CAND-035]
#[test]
fn ends_of_turns_are_those_of_the_family() {
    let of = |texts: &[&'static str]| {
        let tokens: Vec<Token> = ["a", "b"]
            .iter()
            .chain(texts)
            .map(|text| (*text, 0.0, USER_DEFINED))
            .collect();
        ends(&tokens)
    };
    assert_eq!(
        of(&["<|im_end|>", "<|eot_id|>", "<think>"]),
        ["<|im_end|>", "<|eot_id|>"]
    );
    assert_eq!(
        of(&["<｜end▁of▁sentence｜>", "</s>", "<end_of_turn>"]).len(),
        3
    );
    // The channels of gpt-oss and of Solar end with `<|end|>`, and the answer continues.
    assert_eq!(of(&["<|end|>"]), ["<|end|>"]);
    assert_eq!(
        of(&["<|end|>", "<|return|>", "<|call|>"]),
        ["<|return|>", "<|call|>"]
    );
    assert_eq!(
        of(&["<|end|>", "<|flush|>", "<|calls|>"]),
        ["<|flush|>", "<|calls|>"]
    );
    // Gemma 4 uses `</s>` for other purposes.
    assert_eq!(
        of(&["</s>", "<|tool_response>", "<turn|>"]),
        ["<|tool_response>", "<turn|>"]
    );
}

// [CAND-034]
#[test]
fn tokens_of_text_stay_what_they_are() {
    let letters = ["<", ">", "|", "t", "h", "i", "n", "k", "u", "r", "s"];
    let mut vocabulary: Vec<Token> = letters.map(|text| (text, 0.0, NORMAL)).to_vec();
    vocabulary.extend([
        ("<think>", 0.0, USER_DEFINED),
        ("<|turn|>", 0.0, USER_DEFINED),
        ("<s>", 0.0, CONTROL),
    ]);
    let think = vocabulary
        .iter()
        .position(|token| token.0 == "<think>")
        .unwrap() as u32;
    let tokenizer =
        Tokenizer::from_header(&header("gpt2", Some("gpt-2"), &[], &vocabulary)).unwrap();
    let guarded = |text: &str| {
        let breaks: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        tokenizer.encode_prompt(text, &breaks).unwrap()
    };
    assert_eq!(
        guarded("<think>"),
        [think],
        "reasoning is text that clients send back"
    );
    let turn = tokenizer.encode("<|turn|>").unwrap();
    assert_eq!(turn.len(), 1);
    assert!(
        !guarded("<|turn|>").contains(&turn[0]),
        "a marker of a turn is not"
    );
    assert!(guarded("<s>").len() > 1);
}

// [CAND-034]
#[test]
fn no_rule_makes_a_control_token_of_text() {
    // As in Llama's vocabulary, every part of `</s>` is a piece.
    let vocabulary = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
        ("\u{2581}", -20.0, NORMAL),
        ("<", -21.0, NORMAL),
        ("/", -22.0, NORMAL),
        ("s", -23.0, NORMAL),
        (">", -24.0, NORMAL),
        ("s>", -5.0, NORMAL),
        ("</", -6.0, NORMAL),
    ];
    let tokenizer = Tokenizer::from_header(&header("llama", None, &[], &vocabulary)).unwrap();
    assert_eq!(tokenizer.encode("</s>").unwrap(), [2]);
    let breaks = [1, 2, 3];
    assert_eq!(
        tokenizer.encode_prompt("</s>", &breaks).unwrap(),
        [1, 3, 9, 8]
    );
    // A byte-level vocabulary has its rules in the file.
    let vocabulary = [
        ("<", 0.0, NORMAL),
        ("|", 0.0, NORMAL),
        ("<|", 0.0, CONTROL),
        ("a", 0.0, NORMAL),
    ];
    let tokenizer =
        Tokenizer::from_header(&header("gpt2", Some("llama-bpe"), &["< |"], &vocabulary)).unwrap();
    assert_eq!(tokenizer.encode_within("a<|", &[2]).unwrap(), [3, 0, 1]);
    assert_eq!(tokenizer.encode_within("a<|", &[]).unwrap(), [3, 2]);
}

// [CAND-036]
#[test]
fn white_space_after_a_control_token_of_phi3_is_left_out() {
    let vocabulary = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, USER_DEFINED),
        ("\u{2581}", -20.0, NORMAL),
        ("a", -21.0, NORMAL),
        ("\u{2581}a", -5.0, NORMAL),
        ("<0x0A>", 0.0, 6),
        ("<|user|>", 0.0, CONTROL),
        ("<|end|>", 0.0, CONTROL),
        ("<|endoftext|>", 0.0, CONTROL),
        // Names of white space: no place in a text may be taken twice.
        ("\n<|x|>", 0.0, CONTROL),
        ("\t", 0.0, CONTROL),
    ];
    let build = |architecture| {
        let header = header_of(architecture, "llama", None, &[], &vocabulary);
        Tokenizer::from_header(&header).unwrap()
    };
    let (phi3, llama) = (build("phi3"), build("llama"));
    let prompt = "<|user|>\n  a<|end|>\n<|user|>a</s> a<s>\na";
    assert_eq!(
        phi3.encode(prompt).unwrap(),
        [7, 5, 8, 7, 5, 2, 5, 1, 3, 6, 4]
    );
    let all = llama.encode(prompt).unwrap();
    assert_eq!(all[..6], [7, 3, 6, 3, 5, 8]);
    assert_eq!(phi3.encode("<|user|>\n<|x|>a").unwrap(), [7, 10, 5]);
    assert_eq!(phi3.encode("<|user|> \t \ta").unwrap(), [7, 11, 11, 5]);
    // In a message the name is text, and so is what follows it.
    let breaks: Vec<usize> = (1..8).collect();
    let guarded = phi3.encode_prompt("<|end|>  a", &breaks).unwrap();
    assert_eq!(guarded[guarded.len() - 2..], [3, 5]);
}

#[test] // [CAND-090]
fn every_accepted_pre_tokenizer_is_known() {
    for pre in PRE_TOKENIZERS {
        let header = header("gpt2", Some(pre), &[], &[("a", 0.0, 1), ("b", 0.0, 1)]);
        let built = Tokenizer::from_header(&header).map(drop);
        assert!(built.is_ok(), "{pre}: {built:?}");
    }
    let unknown = header("gpt2", Some("odd"), &[], &[("a", 0.0, 1)]);
    let refused = Tokenizer::from_header(&unknown).err();
    assert!(matches!(refused, Some(TokenizerError::PreTokenizer { .. })));
}
