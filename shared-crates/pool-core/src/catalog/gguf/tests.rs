use super::*;
use proptest::prelude::*;

/// A file under construction.
#[derive(Clone, Default)]
struct Build {
    version: u32,
    metadata: Vec<(Vec<u8>, Vec<u8>)>,
    tensors: Vec<Vec<u8>>,
    tensor_count: Option<u64>,
    metadata_count: Option<u64>,
    data: usize,
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn concat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn u32_value(value: u32) -> Vec<u8> {
    concat(&[&4u32.to_le_bytes(), &value.to_le_bytes()])
}

fn text_value(value: &str) -> Vec<u8> {
    concat(&[&8u32.to_le_bytes(), &text(value)])
}

fn array(ty: u32, count: u64, content: &[u8]) -> Vec<u8> {
    concat(&[
        &9u32.to_le_bytes(),
        &ty.to_le_bytes(),
        &count.to_le_bytes(),
        content,
    ])
}

fn tensor(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
    bytes.extend(ty.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl Build {
    /// A small llama: two Q8_0 rows of 64, a norm, and a vocabulary.
    fn model() -> Self {
        let arch = |suffix: &str, value: u32| (text(&format!("llama.{suffix}")), u32_value(value));
        Self {
            version: 3,
            metadata: vec![
                (text("general.architecture"), text_value("llama")),
                (text("general.file_type"), u32_value(7)),
                (text("general.name"), text_value("Tiny")),
                arch("context_length", 2048),
                arch("feed_forward_length", 256),
                arch("block_count", 30),
                arch("embedding_length", 64),
                arch("attention.head_count", 8),
                arch("attention.head_count_kv", 2),
                (text("tokenizer.ggml.model"), text_value("gpt2")),
                (text("tokenizer.ggml.pre"), text_value("smollm")),
                (
                    text("tokenizer.ggml.tokens"),
                    array(8, 2, &concat(&[&text("a"), &text("b")])),
                ),
                (
                    text("tokenizer.chat_template"),
                    text_value("{{ messages }}"),
                ),
            ],
            tensors: vec![
                tensor("token_embd.weight", &[64, 2], 8, 0),
                tensor("norm.weight", &[64], 0, 160),
            ],
            tensor_count: None,
            metadata_count: None,
            data: 160 + 256,
        }
    }

    /// Everything but the tensor data.
    fn header(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(
            self.tensor_count
                .unwrap_or(self.tensors.len() as u64)
                .to_le_bytes(),
        );
        bytes.extend(
            self.metadata_count
                .unwrap_or(self.metadata.len() as u64)
                .to_le_bytes(),
        );
        for (key, value) in &self.metadata {
            bytes.extend(key);
            bytes.extend(value);
        }
        self.tensors.iter().for_each(|t| bytes.extend(t));
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        let start = bytes.len().next_multiple_of(32);
        bytes.resize(start + self.data, 0);
        bytes
    }

    fn with(mut self, key: &str, value: Vec<u8>) -> Self {
        self.metadata.retain(|(k, _)| *k != text(key));
        self.metadata.push((text(key), value));
        self
    }

    fn error(&self) -> String {
        read(&self.bytes()).unwrap_err().to_string()
    }
}

fn read(bytes: &[u8]) -> Result<GgufFile, GgufError> {
    GgufFile::read(bytes, bytes.len() as u64)
}

#[test] // [GGUF-001]
fn a_good_file_is_described() {
    for version in [2, 3] {
        let file = read(
            &Build {
                version,
                ..Build::model()
            }
            .bytes(),
        )
        .unwrap();
        assert_eq!(file.version(), version);
        assert_eq!(file.architecture().unwrap(), "llama");
        assert_eq!(
            (file.context_length().unwrap(), file.block_count().unwrap()),
            (2048, 30)
        );
        assert_eq!(
            (file.head_count().unwrap(), file.head_count_kv().unwrap()),
            (8, 2)
        );
        assert_eq!(
            (file.head_dim().unwrap(), file.vocab_size().unwrap()),
            (8, 2)
        );
        assert_eq!(
            (file.quantization().as_str(), file.parameter_count()),
            ("Q8_0", 192)
        );
        assert_eq!(
            (file.tokenizer_kind().unwrap(), file.has_chat_template()),
            ("gpt2", true)
        );
        // 30 blocks, 2 heads, keys and values of 8, 4 bytes.
        assert_eq!(
            file.kv_cache_bytes(1000, 4).unwrap(),
            30 * 2 * 16 * 4 * 1000
        );
        assert_eq!(
            (file.name().unwrap(), file.license().unwrap()),
            (Some("Tiny"), None)
        );
        assert_eq!(
            (
                file.feed_forward_length().unwrap(),
                file.expert_count().unwrap()
            ),
            (256, 0)
        );
        assert_eq!(
            (file.chat_template().unwrap(), file.tokenizer_pre().unwrap()),
            (Some("{{ messages }}"), Some("smollm"))
        );
        let norm = file.tensor("norm.weight").unwrap();
        assert_eq!(
            (norm.offset, norm.size_bytes, norm.ty.name()),
            (160, 256, "F32")
        );
        assert_eq!(file.data_offset() % 32, 0);
        let tokens: &StringArray = file.require("tokenizer.ggml.tokens").unwrap();
        assert_eq!(tokens.iter().collect::<Vec<_>>(), ["a", "b"]);
    }
}

#[test] // [GGUF-001]
fn heads_may_differ_from_block_to_block() {
    let heads = concat(&[
        &1u32.to_le_bytes(),
        &0u32.to_le_bytes(),
        &3u32.to_le_bytes(),
    ]);
    let file = read(
        &Build::model()
            .with("llama.attention.head_count_kv", array(4, 3, &heads))
            .with("llama.block_count", u32_value(3))
            .bytes(),
    )
    .unwrap();
    assert_eq!(file.head_counts_kv().unwrap(), [1, 0, 3]);
    assert_eq!(file.kv_cache_bytes(1, 2).unwrap(), 4 * 16 * 2);
    let short = Build::model().with("llama.attention.head_count_kv", array(4, 3, &heads));
    assert_eq!(
        read(&short.bytes())
            .unwrap()
            .kv_cache_bytes(1, 2)
            .unwrap_err()
            .to_string(),
        "metadata `llama.attention.head_count_kv` is an array of 3 elements, expected one number for each of 30 blocks"
    );
    let same = read(&Build::model().bytes()).unwrap();
    assert_eq!(same.head_counts_kv().unwrap(), [2; 30]);
    let many = Build::model().with("llama.block_count", u32_value(u32::MAX));
    assert!(
        read(&many.bytes())
            .unwrap()
            .head_counts_kv()
            .unwrap_err()
            .to_string()
            .contains("expected at most 32768")
    );
}

#[test] // [GGUF-002]
fn a_missing_or_wrong_value_names_its_key() {
    let file = read(
        &Build::model()
            .with("llama.context_length", text_value("long"))
            .bytes(),
    )
    .unwrap();
    assert_eq!(
        file.context_length().unwrap_err().to_string(),
        "metadata `llama.context_length` is a string, expected a non-negative integer"
    );
    assert_eq!(
        file.require::<u64>("x.y").unwrap_err().to_string(),
        "the metadata has no `x.y`"
    );
    let zero = read(
        &Build::model()
            .with("llama.attention.head_count", u32_value(0))
            .bytes(),
    )
    .unwrap();
    assert!(
        zero.head_dim()
            .unwrap_err()
            .to_string()
            .contains("is the number 0, expected more than 0")
    );
    let odd = read(
        &Build::model()
            .with("llama.attention.head_count", u32_value(7))
            .bytes(),
    )
    .unwrap();
    assert!(
        odd.head_dim()
            .unwrap_err()
            .to_string()
            .contains("a divisor of the embedding length 64")
    );
    let huge = read(
        &Build::model()
            .with("llama.block_count", u32_value(u32::MAX))
            .bytes(),
    )
    .unwrap();
    assert!(matches!(
        huge.kv_cache_bytes(u64::MAX, 4),
        Err(GgufError::SizeOverflow { .. })
    ));
}

#[test] // [GGUF-003]
fn files_of_other_formats_are_recognised() {
    assert!(matches!(read(b"").unwrap_err(), GgufError::BadMagic { .. }));
    assert!(matches!(
        read(b"GG").unwrap_err(),
        GgufError::BadMagic { .. }
    ));
    assert!(matches!(
        read(b"PK\x03\x04rest of an archive").unwrap_err(),
        GgufError::BadMagic { .. }
    ));
    for (version, says) in [
        (0, "version 0"),
        (1, "version 1"),
        (4, "version 4"),
        (0x0300_0000, "big-endian"),
    ] {
        let error = Build {
            version,
            ..Build::model()
        }
        .error();
        assert!(error.contains(says), "{version}: {error}");
    }
}

#[test] // [GGUF-004]
fn a_file_cut_anywhere_says_how_many_bytes_are_missing() {
    let whole = Build::model().bytes();
    for length in 4..whole.len() {
        let error = read(&whole[..length]).unwrap_err();
        let GgufError::Truncated { needed, actual, .. } = &error else {
            panic!("{length}: {error}")
        };
        assert!(
            *actual == length as u64 && *needed > *actual && *needed <= whole.len() as u64,
            "{length}: {error}"
        );
    }
    let error = read(&whole[..whole.len() - 1]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "truncated: tensor data says {} bytes are needed, the file has {}",
            whole.len(),
            whole.len() - 1
        )
    );
    assert!(error.hint().unwrap().contains("download it again"));
}

/// Values that tend to break arithmetic.
const NASTY: [u64; 6] = [0, 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX];

#[test] // [GGUF-005]
fn counts_and_lengths_are_compared_with_the_file() {
    for nasty in NASTY.into_iter().skip(2) {
        for build in [
            Build {
                tensor_count: Some(nasty),
                ..Build::model()
            },
            Build {
                metadata_count: Some(nasty),
                ..Build::model()
            },
        ] {
            assert!(matches!(
                read(&build.bytes()).unwrap_err(),
                GgufError::TooLarge { .. }
            ));
        }
        let mut key = text("x");
        key[..8].copy_from_slice(&nasty.to_le_bytes());
        let mut build = Build::model();
        build.metadata.insert(3, (key.clone(), u32_value(1)));
        assert!(
            build.error().contains("metadata entry 3 says"),
            "{}",
            build.error()
        );
        for ty in [0, 4, 8, 12] {
            let error = Build::model().with("x", array(ty, nasty, &[])).error();
            assert!(
                error.starts_with("truncated: metadata entry 13 (`x`) says"),
                "{error}"
            );
        }
    }
    // Counts within the limits, but too large for the file.
    for build in [
        Build {
            tensor_count: Some(MAX_TENSORS),
            ..Build::model()
        },
        Build {
            metadata_count: Some(MAX_METADATA),
            ..Build::model()
        },
    ] {
        assert!(
            build.error().starts_with("truncated: header says"),
            "{}",
            build.error()
        );
    }
    let long = Build {
        data: 100_000,
        ..Build::model()
    };
    let mut key = text(&"k".repeat(65_536));
    key[0] = 0;
    let long = Build {
        metadata: vec![(key, u32_value(1))],
        ..long
    };
    assert!(
        long.error().contains("key is 65536, the limit is 65535"),
        "{}",
        long.error()
    );
}

#[test] // [GGUF-006]
fn metadata_of_unknown_or_wrong_form_is_refused() {
    let value = |value: Vec<u8>| Build::model().with("x", value).error();
    assert!(value(13u32.to_le_bytes().to_vec()).contains("unknown metadata value type 13"));
    assert!(value(array(13, 0, &[])).contains("unknown array element type 13"));
    assert!(value(array(9, 0, &[])).contains("array of arrays"));
    assert!(value(concat(&[&7u32.to_le_bytes(), &[2]])).contains("stored as 2"));
    assert!(value(array(7, 2, &[1, 3])).contains("stored as 3"));
    assert!(
        value(concat(&[&8u32.to_le_bytes(), &1u64.to_le_bytes(), &[0xff]])).contains("not UTF-8")
    );
    let mut twice = Build::model();
    twice.metadata.push(twice.metadata[0].clone());
    assert!(
        twice.error().contains("(`general.architecture`)")
            && twice.error().contains("the key appears twice")
    );
}

#[test] // [GGUF-007]
fn alignments_other_than_powers_of_two_are_refused() {
    let aligned = |alignment: u32| Build::model().with("general.alignment", u32_value(alignment));
    for bad in [0, 3, 48, u32::MAX] {
        let error = aligned(bad).error();
        assert!(error.contains("alignment"), "{bad}: {error}");
    }
    assert!(
        aligned(64).error().contains("not a multiple of 64"),
        "a tensor at 160"
    );
    // Without alignment, the data begins right after the descriptions.
    let mut packed = aligned(1);
    packed.tensors[1] = tensor("norm.weight", &[64], 0, 136);
    read(&concat(&[&packed.header(), &[0; 136 + 256]])).unwrap();
}

#[test] // [GGUF-008]
fn tensors_lie_inside_the_file_side_by_side() {
    let tensors = |tensors: Vec<Vec<u8>>| Build {
        tensors,
        ..Build::model()
    };
    let one = |dims: &[u64], ty, offset| tensors(vec![tensor("t", dims, ty, offset)]);
    for nasty in NASTY {
        let error = one(&[nasty, nasty], 0, 0).bytes();
        assert!(nasty == 1 || read(&error).is_err(), "dimensions of {nasty}");
        assert!(
            nasty == 0 || read(&one(&[64], 0, nasty).bytes()).is_err(),
            "an offset of {nasty}"
        );
    }
    assert!(one(&[0], 0, 0).error().contains("dimension 0 is 0"));
    assert!(one(&[], 0, 0).error().contains("it has 0 dimensions"));
    assert!(
        one(&[1, 1, 1, 1, 1], 0, 0)
            .error()
            .contains("it has 5 dimensions")
    );
    assert!(one(&[1 << 40, 1 << 40], 0, 0).error().contains("overflow"));
    assert!(
        one(&[33], 8, 0)
            .error()
            .contains("a row has 33 elements, but Q8_0 stores them in blocks of 32")
    );
    assert!(
        one(&[64], 4, 0).error().contains("unknown element type 4"),
        "a type that was removed"
    );
    assert!(one(&[64], 0, 33).error().contains("not a multiple of 32"));
    assert!(
        one(&[64], 0, u64::MAX - 31)
            .error()
            .starts_with("truncated: tensor data")
    );
    let overlap = tensors(vec![tensor("b", &[64], 0, 64), tensor("a", &[64], 0, 0)]);
    for (built, says) in [
        (one(&[64], 0, 32), "32 bytes before `t` belong to no tensor"),
        (one(&[32], 0, 0), "288 bytes at the end of the file belong"),
        (
            tensors(vec![tensor("a", &[8], 0, 0), tensor("b", &[88], 0, 64)]),
            "32 bytes before `b` belong to no tensor",
        ),
        (tensors(vec![]), "it has no tensors"),
    ] {
        assert!(built.error().contains(says), "{}", built.error());
    }
    assert_eq!(
        overlap.error(),
        "tensors `a` and `b` overlap: one ends at byte 256, the other begins at 64 of the tensor data"
    );
    let twice = tensors(vec![tensor("a", &[8], 0, 0), tensor("a", &[8], 0, 32)]);
    assert!(twice.error().contains("two tensors have the name `a`"));
    let long = tensors(vec![tensor(&"n".repeat(257), &[8], 0, 0)]);
    assert!(long.error().contains("name is 257, the limit is 256"));
}

#[test] // [GGUF-001]
fn whole_numbers_are_read_from_arrays_of_every_width() {
    let heads = |ty: u32, content: &[u8]| {
        let built = Build::model()
            .with("llama.attention.head_count_kv", array(ty, 3, content))
            .with("llama.block_count", u32_value(3));
        read(&built.bytes()).unwrap().head_counts_kv()
    };
    for (ty, width) in [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 4),
        (5, 4),
        (10, 8),
        (11, 8),
    ] {
        let content: Vec<u8> = [1u64, 0, 3]
            .iter()
            .flat_map(|n| n.to_le_bytes()[..width].to_vec())
            .collect();
        assert_eq!(heads(ty, &content).unwrap(), [1, 0, 3], "type {ty}");
    }
    let texts = concat(&[&text("1"), &text("0"), &text("3")]);
    for (ty, content) in [
        (1, &[255; 3][..]),
        (6, &[0; 12]),
        (7, &[0; 3]),
        (8, &texts),
        (12, &[0; 24]),
    ] {
        let error = heads(ty, content).unwrap_err().to_string();
        assert!(
            error.contains("is an array of 3 elements, expected an array of non-negative integers"),
            "type {ty}: {error}"
        );
    }
}

#[test] // [GGUF-002]
fn values_are_what_they_were_asked_for_or_an_error() {
    let value = |ty: u32, bytes: &[u8]| {
        let built = Build::model().with("x", concat(&[&ty.to_le_bytes(), bytes]));
        read(&built.bytes()).unwrap()
    };
    let (float, double) = (
        value(6, &1.5f32.to_le_bytes()),
        value(12, &1.5f64.to_le_bytes()),
    );
    assert_eq!(
        (float.get("x").unwrap(), double.get("x").unwrap()),
        (Some(1.5), Some(1.5))
    );
    assert_eq!(value(7, &[1]).get("x").unwrap(), Some(true));
    assert_eq!(value(5, &7u32.to_le_bytes()).get("x").unwrap(), Some(7u32));
    let said = |file: &GgufFile| file.require::<u32>("x").unwrap_err().to_string();
    for (file, found) in [
        (&float, "the number 1.5"),
        (&double, "the number 1.5"),
        (&value(7, &[0]), "false"),
        (&value(1, &[255]), "the number -1"),
        (
            &value(10, &u64::MAX.to_le_bytes()),
            "the number 18446744073709551615",
        ),
        (&value(8, &text("a")), "a string"),
    ] {
        assert!(
            said(file).contains(&format!("`x` is {found}, expected")),
            "{}",
            said(file)
        );
        assert!(file.get::<&[f32]>("x").is_err() && file.get::<&StringArray>("x").is_err());
        assert!(file.get::<Vec<u64>>("x").is_err());
    }
    assert!(value(8, &text("a")).get::<f64>("x").is_err() && float.get::<bool>("x").is_err());
    assert!(float.get::<&str>("x").is_err() && float.get::<u64>("y").unwrap().is_none());
    let floats = read(
        &Build::model()
            .with("x", array(6, 1, &2f32.to_le_bytes()))
            .bytes(),
    )
    .unwrap();
    assert_eq!(floats.get::<&[f32]>("x").unwrap(), Some(&[2.0][..]));
    let none = read(&Build::model().with("x", array(8, 0, &[])).bytes()).unwrap();
    let texts: &StringArray = none.require("x").unwrap();
    assert!(texts.is_empty() && texts.get(0).is_none());
    assert!(matches!(none.metadata().get("x"), Some(Value::Array(a)) if a.is_empty()));
}

#[test] // [GGUF-001]
fn widths_and_names_come_from_what_the_file_gives() {
    let built = Build::model()
        .with("llama.attention.key_length", u32_value(16))
        .with("llama.attention.value_length", u32_value(4))
        .with("llama.expert_count", u32_value(8));
    let file = read(&built.bytes()).unwrap();
    assert_eq!(
        (file.head_dim().unwrap(), file.value_head_dim().unwrap()),
        (16, 4)
    );
    assert_eq!(file.expert_count().unwrap(), 8);
    assert_eq!(file.require_arch::<u32>("block_count").unwrap(), 30);
    let mut bare = Build::model();
    let dropped = [
        text("general.file_type"),
        text("tokenizer.ggml.tokens"),
        text("llama.attention.head_count_kv"),
    ];
    bare.metadata.retain(|(key, _)| !dropped.contains(key));
    let file = read(&bare.with("llama.vocab_size", u32_value(9)).bytes()).unwrap();
    // The norm takes most of the bytes.
    assert_eq!(
        (file.quantization().as_str(), file.vocab_size().unwrap()),
        ("F32", 9)
    );
    assert_eq!(file.head_count_kv().unwrap(), 8);
    for (id, name) in [
        (0, "F32"),
        (1, "F16"),
        (15, "Q4_K_M"),
        (18, "Q6_K"),
        (38, "MXFP4"),
        (4, "F32"),
    ] {
        let named = Build::model().with("general.file_type", u32_value(id));
        assert_eq!(read(&named.bytes()).unwrap().quantization(), name);
    }
    // Retired and future numbers: the name comes from the weights.
    for id in 0..64 {
        let named = Build::model().with("general.file_type", u32_value(id));
        assert_ne!(
            read(&named.bytes()).unwrap().quantization(),
            "unknown",
            "{id}"
        );
    }
    let q4 = GgmlType::from_id(12).unwrap();
    assert_eq!(
        (q4.id(), q4.name(), q4.block_elements(), q4.block_bytes()),
        (12, "Q4_K", 256, 144)
    );
}

#[test] // [GGUF-003]
fn every_refusal_says_what_to_try() {
    let hint = |bytes: &[u8]| read(bytes).unwrap_err().hint().unwrap();
    assert!(hint(b"PK\x03\x04").contains(".gguf"));
    let version = Build {
        version: 1,
        ..Build::model()
    };
    assert!(hint(&version.bytes()).contains("convert the model again"));
    let damaged = Build::model().with("general.alignment", u32_value(3));
    assert!(hint(&damaged.bytes()).contains("damaged"));
}

/// Reads a file padded with zeros to `size`, without holding it in memory.
fn sparse(header: &[u8], size: u64) -> Result<GgufFile, GgufError> {
    let rest = std::io::repeat(0).take(size - header.len() as u64);
    GgufFile::read(header.chain(rest), size)
}

#[test] // [GGUF-010]
fn a_header_ends_within_its_limit_however_large_the_file_is() {
    for (ty, count) in [(0, 1 << 31), (8, 1 << 29), (12, 1 << 30)] {
        let built = Build::model().with("x", array(ty, count, &[]));
        let error = sparse(&built.bytes(), 1 << 40).unwrap_err().to_string();
        assert!(
            error.contains("(`x`)") && error.contains("the end of the header is"),
            "{error}"
        );
    }
    let mut texts = Build::model();
    let value = concat(&[&8u32.to_le_bytes(), &(1u64 << 33).to_le_bytes()]);
    texts.metadata.insert(0, (text("x"), value));
    let error = sparse(&texts.bytes(), 1 << 40).unwrap_err().to_string();
    assert!(error.contains("the limit is 33554432"), "{error}");
}

#[test] // [GGUF-011]
fn only_regular_files_are_opened() {
    let folder = tempfile::tempdir().unwrap();
    let folder_error = GgufFile::open(folder.path()).unwrap_err();
    assert!(matches!(folder_error, GgufError::Io(_)));
    let missing = GgufFile::open(&folder.path().join("none.gguf")).unwrap_err();
    assert!(missing.hint().is_none());
    let pipe = folder.path().join("pipe.gguf");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let error = GgufFile::open(&pipe).unwrap_err();
    assert_eq!(
        crate::kit::errors::with_causes(&error),
        "could not read the file: it is not a regular file"
    );
}

proptest! {
    // [GGUF-009]
    #[test]
    fn no_change_of_bytes_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Build::model().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for file in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            if let Ok(file) = read(file) {
                // The values may still be nonsense, but reading them must not panic.
                let _ = (file.context_length(), file.head_dim(), file.head_count_kv(), file.vocab_size());
                let _ = (file.kv_cache_bytes(u64::MAX, 4), file.parameter_count(), file.quantization());
                prop_assert!(file.tensors().iter().all(|t| file.data_offset() + t.offset + t.size_bytes <= file.file_size()));
            }
        }
    }
}

// [GGUF-050] The expected hash was computed from the documented bytes by another program.
#[test]
fn a_tokenizer_is_identified_by_its_own_metadata_alone() {
    let hash = |built: &Build| read(&built.bytes()).unwrap().tokenizer_sha256();
    let own = hash(&Build::model());
    assert_eq!(
        own,
        "b78c2da3f52bfe8f6270641ff915c3007db1dad78d1e703b5243cfc0dec0faa9"
    );
    for (key, value) in [
        ("general.name", text_value("Another")),
        ("llama.context_length", u32_value(4096)),
        ("tokenizer.chat_template", text_value("{{ x }}")),
        ("tokenizer.huggingface.json", text_value("{}")),
    ] {
        assert_eq!(hash(&Build::model().with(key, value)), own, "{key}");
    }
    let mut seen = vec![own];
    let key = "tokenizer.ggml.";
    let texts = |texts: &[&str]| {
        let content: Vec<_> = texts.iter().flat_map(|t| text(t)).collect();
        array(8, texts.len() as u64, &content)
    };
    let mut changes = vec![
        ("pre", text_value("gpt-2")),
        ("bos_token_id", u32_value(1)),
        ("bos_token_id", u32_value(0)),
        ("eos_token_id", u32_value(1)),
        ("add_bos_token", concat(&[&7u32.to_le_bytes(), &[1]])),
        ("scale", concat(&[&6u32.to_le_bytes(), &1f32.to_le_bytes()])),
        ("tokens", texts(&["ab", ""])),
        ("tokens", texts(&["a", "b", ""])),
    ];
    // An array of every other type, each with different values.
    for (ty, width) in [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 4),
        (5, 4),
        (6, 4),
        (7, 1),
        (10, 8),
        (11, 8),
        (12, 8),
    ] {
        let mut content = vec![0; 2 * width];
        // Booleans are only 0 or 1.
        let (first, rest) = if ty == 7 { (0, 1) } else { (1, ty as u8) };
        content[width..].fill(rest);
        content[0] = first;
        changes.push(("more", array(ty, 2, &content)));
    }
    for (name, value) in changes {
        let changed = hash(&Build::model().with(&format!("{key}{name}"), value));
        assert!(!seen.contains(&changed), "{name}");
        seen.push(changed);
    }
}
