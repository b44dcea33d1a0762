//! Fuzz target of the GGUF reader: properties that must hold for any input. See "Fuzzing and coverage" in
//! `.specs/02_gguf.md` of pool-core.

#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use pool_core::catalog::gguf::{
    DEFAULT_ALIGNMENT, GgufFile, MAX_DIMS, MAX_HEADER_BYTES, MAX_METADATA, MAX_TENSORS,
};

fuzz_target!(|bytes: &[u8]| {
    let size = bytes.len() as u64;
    let Ok(file) = GgufFile::read(bytes, size) else {
        // An announced size larger than the data, as for a file that is truncated during the read.
        let _ = GgufFile::read(bytes, size.saturating_add(1 << 40));
        return;
    };
    header_is_within_limits(&file, size);
    tensors_fill_the_file(&file);
    sums_hold(&file);
    questions_are_safe(&file);

    // The result depends only on the bytes of the header.
    let header = &bytes[..file.data_offset() as usize];
    let again = GgufFile::read(header, size).expect("the header alone is enough");
    assert_eq!(again.tensors(), file.tensors());
    // Compared as text, because NaN does not equal itself.
    assert_eq!(
        format!("{:?}", again.metadata()),
        format!("{:?}", file.metadata())
    );
    // With one byte fewer, not counting padding, a tensor is cut off.
    let used: u64 = file
        .tensors()
        .iter()
        .map(|t| t.offset + t.size_bytes)
        .max()
        .unwrap_or(0);
    let end = file.data_offset() + used;
    assert!(GgufFile::read(header, end - 1).is_err());
});

fn header_is_within_limits(file: &GgufFile, size: u64) {
    assert!([2, 3].contains(&file.version()));
    assert_eq!(file.file_size(), size);
    assert!(file.data_offset() <= size && file.data_offset() < MAX_HEADER_BYTES + (1 << 16));
    assert!(file.metadata().len() as u64 <= MAX_METADATA);
    assert!((1..=MAX_TENSORS).contains(&(file.tensors().len() as u64)));
}

fn tensors_fill_the_file(file: &GgufFile) {
    let alignment: u64 = file
        .get("general.alignment")
        .expect("what was used is a number")
        .unwrap_or(DEFAULT_ALIGNMENT);
    assert!(alignment.is_power_of_two());
    assert_eq!(file.data_offset() % alignment, 0);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut names = BTreeSet::new();
    for tensor in file.tensors() {
        assert!(names.insert(&tensor.name), "a name twice");
        assert!((1..=MAX_DIMS as usize).contains(&tensor.dims.len()));
        let elements = tensor
            .dims
            .iter()
            .try_fold(1u64, |n, d| n.checked_mul(*d))
            .expect("the product of dimensions fits");
        assert_eq!(elements, tensor.elements());
        assert!(elements > 0 && tensor.dims[0] % tensor.ty.block_elements() == 0);
        let blocks = elements / tensor.ty.block_elements();
        assert_eq!(
            Some(tensor.size_bytes),
            blocks.checked_mul(tensor.ty.block_bytes())
        );
        let start = file
            .data_offset()
            .checked_add(tensor.offset)
            .expect("the start fits");
        let end = start.checked_add(tensor.size_bytes).expect("the end fits");
        assert!(end <= file.file_size(), "a tensor past the end");
        assert_eq!(start % alignment, 0);
        ranges.push((start, end));
    }
    ranges.sort_unstable();
    let mut free = file.data_offset();
    for (start, end) in ranges {
        assert_eq!(start, free, "tensors overlap or leave a gap");
        free = end.next_multiple_of(alignment);
    }
    assert!(file.file_size() <= free, "bytes that no tensor owns");
}

fn sums_hold(file: &GgufFile) {
    let elements = file
        .tensors()
        .iter()
        .map(|t| t.elements())
        .try_fold(0, u64::checked_add);
    assert_eq!(elements, Some(file.parameter_count()));
    if let (Ok(blocks), Ok(heads)) = (file.block_count(), file.head_counts_kv()) {
        assert_eq!(heads.len() as u64, blocks);
        let width = file.head_dim().ok().zip(file.value_head_dim().ok());
        if let Some((key, value)) = width {
            let sum: u128 = heads.iter().map(|n| u128::from(*n)).sum();
            // Without attention there is no cache, and the width of the heads is irrelevant.
            if sum == 0 {
                return;
            }
            let bytes = sum.checked_mul((u128::from(key) + u128::from(value)) * 12);
            let bytes = bytes.and_then(|b| u64::try_from(b).ok());
            assert_eq!(file.kv_cache_bytes(3, 4).ok(), bytes);
        }
    }
}

/// Checks that queries are safe even if the metadata is nonsense, and that errors can be displayed.
fn questions_are_safe(file: &GgufFile) {
    let show = |error: pool_core::catalog::gguf::GgufError| {
        assert!(!error.to_string().is_empty());
        assert!(
            error.hint().is_some(),
            "only errors of the system have no hint"
        );
    };
    let numbers = [
        file.context_length(),
        file.embedding_length(),
        file.feed_forward_length(),
        file.expert_count(),
        file.head_count(),
        file.head_count_kv(),
        file.vocab_size(),
        file.kv_cache_bytes(u64::MAX, 4),
    ];
    numbers.into_iter().filter_map(Result::err).for_each(show);
    let texts = [
        file.name(),
        file.license(),
        file.chat_template(),
        file.tokenizer_pre(),
    ];
    texts.into_iter().filter_map(Result::err).for_each(show);
    let _ = (
        file.tokenizer_kind(),
        file.quantization(),
        file.has_chat_template(),
    );
    for tensor in file.tensors() {
        assert!(file.tensor(&tensor.name).is_some());
    }
}
