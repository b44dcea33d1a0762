use super::super::gguf::GgmlType;
use super::*;
use crate::catalog::draft::{GgufDraft, Meta};

fn read(draft: &GgufDraft) -> GgufFile {
    let bytes = draft.bytes();
    GgufFile::read(&bytes[..], bytes.len() as u64).unwrap()
}

fn refusal(draft: &GgufDraft) -> String {
    let refused = check(&read(draft)).unwrap_err();
    assert!(!refused.hint().is_empty());
    refused.to_string()
}

#[test] // [GGUF-040]
fn a_file_with_all_that_the_engine_needs_passes() {
    let whole = GgufDraft::servable();
    check(&read(&whole)).unwrap();
    // A file that is the only part is complete.
    check(&read(&whole.clone().with_number("split.count", 1))).unwrap();
    check(&read(&whole.clone().with_text("general.type", "model"))).unwrap();
    check(&read(
        &whole.clone().with_text("llama.rope.scaling.type", "linear"),
    ))
    .unwrap();
    // The splitting rule does not apply to a vocabulary of scored pieces.
    check(&read(
        &whole
            .clone()
            .with_text("tokenizer.ggml.model", "llama")
            .with_text("tokenizer.ggml.pre", "odd"),
    ))
    .unwrap();
}

#[test] // [GGUF-040]
fn tensors_of_phi3_may_be_fused_or_not() {
    let fused = GgufDraft::phi3;
    check(&read(&fused())).unwrap();
    check(&read(&GgufDraft::servable().of_architecture("phi3"))).unwrap();
    let long = || {
        fused()
            .with_tensor("rope_factors_long.weight", &[1])
            .with_tensor("rope_factors_short.weight", &[1])
    };
    check(&read(&long())).unwrap();
    for kind in ["longrope", "su", "linear", "none"] {
        check(&read(&long().with_text("phi3.rope.scaling.type", kind))).unwrap();
    }
    for (draft, reason) in [
        (
            fused().without_tensor("blk.0.attn_qkv.weight"),
            "the file has no tensor `blk.0.attn_qkv.weight`",
        ),
        (
            fused().without_tensor("blk.0.ffn_up.weight"),
            "the file has no tensor `blk.0.ffn_up.weight`",
        ),
        // If queries have a tensor of their own, keys and values must have one as well.
        (
            fused().with_tensor("blk.0.attn_q.weight", &[2, 2]),
            "the file has no tensor `blk.0.attn_k.weight`",
        ),
        (
            fused().without("phi3.feed_forward_length"),
            "the metadata has no `phi3.feed_forward_length`",
        ),
        (
            long().without_tensor("rope_factors_long.weight"),
            "the file has no tensor `rope_factors_long.weight`",
        ),
        (
            fused().with_text("phi3.rope.scaling.type", "longrope"),
            "the file has no tensor `rope_factors_long.weight`",
        ),
        (
            long().with_text("phi3.rope.scaling.type", "yarn"),
            "rope scaling of type `yarn`",
        ),
        // Other architectures have no fused tensors.
        (
            GgufDraft::phi3().of_architecture("llama"),
            "the file has no tensor `blk.0.attn_q.weight`",
        ),
        (
            GgufDraft::servable().with_text("llama.rope.scaling.type", "longrope"),
            "rope scaling of type `longrope`",
        ),
    ] {
        let refusal = refusal(&draft);
        assert!(refusal.contains(reason), "{refusal}, not {reason}");
    }
}

#[test] // [GGUF-040]
fn every_reason_for_a_refusal_has_its_name() {
    let whole = GgufDraft::servable;
    let mut with_type = whole();
    with_type.tensors[0] = ("token_embd.weight".to_owned(), vec![256, 2], 16);
    let cases = [
        (
            whole()
                .with_number("split.count", 3)
                .with_number("split.no", 1),
            "part 2 of a model that is split into 3 files",
        ),
        // Parts after the first have no architecture.
        (
            whole()
                .without("general.architecture")
                .with_number("split.count", 2)
                .with_number("split.no", 1),
            "part 2 of a model that is split into 2 files",
        ),
        (
            whole().with_text("general.type", "adapter"),
            "a file of type `adapter`",
        ),
        (
            whole()
                .with_text("general.type", "mmproj")
                .of_architecture("clip"),
            "a file of type `mmproj`",
        ),
        (
            whole().of_architecture("mamba"),
            "architecture `mamba` is not supported (supported: gemma3, llama, phi3, qwen2, qwen3)",
        ),
        (
            whole().without("general.architecture"),
            "the metadata has no `general.architecture`",
        ),
        (
            whole().with_number("llama.expert_count", 8),
            "the model needs a mixture of 8 experts",
        ),
        (
            whole().with_text("llama.rope.scaling.type", "yarn"),
            "rope scaling of type `yarn`",
        ),
        (
            whole().with_number("llama.attention.value_length", 4),
            "value heads (4) of a different width than key heads (2)",
        ),
        (
            whole().with_text("tokenizer.ggml.model", "t5"),
            "tokenizer kind `t5` is not supported",
        ),
        (
            whole().with_text("tokenizer.ggml.pre", "tekken"),
            "pre-tokenizer `tekken` is not supported",
        ),
        (
            whole().without("tokenizer.ggml.model"),
            "the metadata has no `tokenizer.ggml.model`",
        ),
        (
            whole().without("llama.context_length"),
            "the metadata has no `llama.context_length`",
        ),
        (
            whole().without_tensor("blk.0.ffn_up.weight"),
            "the file has no tensor `blk.0.ffn_up.weight`",
        ),
        // The second block is in another file, although the header does not mention a split.
        (
            whole().with_number("llama.block_count", 2),
            "the file has no tensor `blk.1.attn_norm.weight`",
        ),
        (with_type, "tensor `token_embd.weight` is stored as IQ2_XXS"),
    ];
    for (draft, reason) in cases {
        let refusal = refusal(&draft);
        assert!(refusal.contains(reason), "{refusal}, not {reason}");
    }
    let float = whole().with("split.count", Meta::Float(2.0));
    assert!(refusal(&float).contains("split.count"));
}

#[test] // [GGUF-041]
fn a_part_of_a_split_model_is_known_by_its_name() {
    for (name, part, count) in [
        ("big-Q4_K_M-00001-of-00003.gguf", 1, 3),
        ("m-00003-of-00003.gguf", 3, 3),
    ] {
        match check_file_name(name) {
            Err(Unsupported::Split { part: p, count: c }) => assert_eq!((p, c), (part, count)),
            other => panic!("{name}: {other:?}"),
        }
    }
    for name in [
        "m.gguf",
        "m-00001-of-00001.gguf",
        "m-1-of-3.gguf",
        "best-of-00003.gguf",
        "m-00001-of-00003.bin",
        "m-0000x-of-00003.gguf",
        "",
    ] {
        check_file_name(name).unwrap();
    }
}

#[test] // [GGUF-040]
fn every_listed_element_type_is_one_that_files_have() {
    let known: Vec<_> = (0..64)
        .filter_map(GgmlType::from_id)
        .map(GgmlType::name)
        .collect();
    for ty in TENSOR_TYPES {
        assert!(known.contains(ty), "{ty}");
    }
}
