use super::*;

const ORIGINAL: &str = "job-01900000-0000-7000-8000-000000000002";
const REPLAY: &str = "job-01900000-0000-7000-8000-000000000001";

fn receipt(output: &str) -> Receipt {
    Receipt {
        model_sha256: Some("ab".repeat(32)),
        engine: "llorch-candled 0.1.0".into(),
        arithmetic: "cpu 2".into(),
        earlier_arithmetic: Vec::new(),
        tokenizer_sha256: "01".into(),
        chat_template_sha256: Some("02".into()),
        prompt_tokens: 3,
        prompt_sha256: "03".into(),
        temperature: 0.8,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 7,
        max_tokens: 8,
        stop_sha256: None,
        output_tokens: 3,
        output_sha256: output.into(),
    }
}

fn text(id: &str, pieces: &[&str], receipt: Option<Receipt>) -> Text {
    Text {
        id: id.parse().unwrap(),
        pieces: pieces.iter().map(|piece| (*piece).to_owned()).collect(),
        tokens: u32::try_from(pieces.len()).unwrap(),
        stop_reason: StopReason::Eos,
        receipt: receipt.map(Box::new),
    }
}

fn compared(
    original: (&[&str], Option<Receipt>),
    replay: (&[&str], Option<Receipt>),
) -> Comparison {
    Comparison::of(
        text(ORIGINAL, original.0, original.1),
        text(REPLAY, replay.0, replay.1),
    )
}

#[test] // [LLORCH-111]
fn equal_tokens_are_the_same_whatever_else_the_receipts_say() {
    let words: &[&str] = &["The", " end", "."];
    let same = compared((words, Some(receipt("aa"))), (words, Some(receipt("aa"))));
    assert!(same.same);
    insta::assert_snapshot!(same.render(false), @"same 3 tokens");
    let other = Receipt {
        engine: "llorch-candled 0.2.0".into(),
        model_sha256: None,
        ..receipt("aa")
    };
    let same = compared((words, Some(receipt("aa"))), (words, Some(other)));
    assert!(same.same);
    insta::assert_snapshot!(same.render(false), @r"
    same 3 tokens

    RECEIPT       ORIGINAL              REPLAY
    engine        llorch-candled 0.1.0  llorch-candled 0.2.0
    model_sha256  abababababab          -
    ");
    let one = compared((&["a"], Some(receipt("aa"))), (&["a"], Some(receipt("aa"))));
    assert_eq!(one.render(false), "same 1 token");
}

#[test] // [LLORCH-111]
fn the_first_different_token_is_named_with_the_likely_cause() {
    let other = Receipt {
        arithmetic: "cuda 1".into(),
        engine: "llorch-candled 0.2.0".into(),
        ..receipt("bb")
    };
    let different = compared(
        (&["The", " end", "."], Some(receipt("aa"))),
        (&["The", " \"fin\"\u{1b}[2J"], Some(other)),
    );
    assert!(!different.same);
    insta::assert_snapshot!(different.render(false), @r#"
    different from token 1 on: " end" originally, " \"fin\"\u{1b}[2J" in the replay (3 tokens originally, 2 in the replay)

    RECEIPT     ORIGINAL              REPLAY
    arithmetic  cpu 2                 cuda 1
    engine      llorch-candled 0.1.0  llorch-candled 0.2.0

    the class of arithmetic differs, so results may be rounded differently
    "#);
    let json = serde_json::to_value(&different).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "original": ORIGINAL, "replay": REPLAY, "same": false, "compared": "tokens",
            "tokens": {"original": 3, "replay": 2}, "stop_reason": {"original": "EOS", "replay": "EOS"},
            "first_difference": {"index": 1, "original": " end", "replay": " \"fin\"\u{1b}[2J"},
            "receipt_differences": [
                {"field": "arithmetic", "original": "cpu 2", "replay": "cuda 1"},
                {"field": "engine", "original": "llorch-candled 0.1.0", "replay": "llorch-candled 0.2.0"},
            ],
            "explanation": "the class of arithmetic differs, so results may be rounded differently",
        })
    );
}

#[test] // [LLORCH-111]
fn a_text_that_ends_early_differs_where_it_ends() {
    let longer = Receipt {
        max_tokens: 2,
        temperature: 0.7,
        ..receipt("bb")
    };
    let different = compared(
        (&["a", "b", "c"], Some(receipt("aa"))),
        (&["a", "b"], Some(longer)),
    );
    insta::assert_snapshot!(different.render(false), @r#"
    different from token 2 on: "c" originally, the end (EOS) in the replay (3 tokens originally, 2 in the replay)

    RECEIPT      ORIGINAL  REPLAY
    max_tokens   8         2
    temperature  0.8       0.7

    the settings differ
    "#);
}

#[test] // [LLORCH-111]
fn tokens_that_differ_without_a_cause_are_reported_as_such() {
    let different = compared((&["a"], Some(receipt("aa"))), (&["b"], Some(receipt("bb"))));
    assert_eq!(different.explanation, Some(UNEXPLAINED));
    // Different token ids that decode to the same text.
    let different = compared((&["a"], Some(receipt("aa"))), (&["a"], Some(receipt("bb"))));
    assert!(!different.same && different.first_difference.is_none());
    assert!(
        different
            .render(false)
            .starts_with("same text of different tokens: 1 token originally")
    );
}

#[test] // [LLORCH-111]
fn without_a_receipt_the_texts_are_compared() {
    for (first, second) in [(None, None), (Some(receipt("aa")), None)] {
        let same = compared((&["a", "b"], first.clone()), (&["a", "b"], second.clone()));
        assert!(same.same);
        assert_eq!(
            same.render(false),
            format!("same text of 2 tokens\n\n{NO_RECEIPT}")
        );
        let different = compared((&["a", "b"], first), (&["a", "c"], second));
        assert!(!different.same);
        assert_eq!(different.first_difference.as_ref().unwrap().index, 1);
        assert_eq!(
            serde_json::to_value(&different).unwrap()["compared"],
            "text"
        );
    }
}

#[test] // [LLORCH-111]
fn every_input_of_a_receipt_has_a_cause() {
    let mut whole = receipt("aa");
    whole.stop_sha256 = Some("04".into());
    whole.earlier_arithmetic = vec!["cpu 1".into()];
    for name in values(&whole)
        .keys()
        .filter(|name| !RESULTS.contains(&name.as_str()))
    {
        let field = Field {
            field: name.clone(),
            value: pair(Value::Null, Value::Bool(true)),
        };
        assert_ne!(cause(&[field]), UNEXPLAINED, "{name}");
    }
}
