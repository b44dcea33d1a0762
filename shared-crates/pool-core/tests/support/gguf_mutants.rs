//! Hostile GGUF files, made from a valid file by structure-aware mutations.
//!
//! [`Layout`] finds every field of a valid file, without the reader under test, and [`hostile`] mutates each field as
//! `promises.md` lists under "Bad input". This module needs only the standard library, so that the fuzz target and other
//! test crates can include it.

#![allow(dead_code)] // Each test crate uses only a part of this module.

/// Kind of a field of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Field {
    Magic,
    Version,
    TensorCount,
    MetadataCount,
    KeyLength,
    Key,
    ValueType,
    /// A number, a boolean, or the bytes of a text.
    Value,
    TextLength,
    ElementType,
    ElementCount,
    ElementTextLength,
    /// All numbers of an array, or the bytes of one of its texts.
    Elements,
    NameLength,
    Name,
    DimensionCount,
    Dimension,
    TensorType,
    TensorOffset,
    Padding,
    TensorData,
}

/// A field with its offset and length in bytes, and the metadata key or tensor name that it belongs to (empty for none).
#[derive(Debug, Clone)]
pub struct Place {
    pub field: Field,
    pub at: usize,
    pub length: usize,
    pub of: String,
}

/// All fields of a valid file in order, which together cover every byte.
#[derive(Debug, Clone)]
pub struct Layout {
    pub places: Vec<Place>,
}

struct Walk<'a> {
    file: &'a [u8],
    at: usize,
    of: String,
    places: Vec<Place>,
}

impl Walk<'_> {
    fn take(&mut self, field: Field, length: usize) -> u64 {
        let bytes = &self.file[self.at..self.at + length];
        self.places.push(Place {
            field,
            at: self.at,
            length,
            of: self.of.clone(),
        });
        self.at += length;
        let mut number = [0; 8];
        number[..length.min(8)].copy_from_slice(&bytes[..length.min(8)]);
        u64::from_le_bytes(number)
    }

    fn text(&mut self, length: Field, bytes: Field) -> String {
        let length = self.take(length, 8) as usize;
        let start = self.at;
        self.take(bytes, length);
        String::from_utf8_lossy(&self.file[start..start + length]).into_owned()
    }

    fn value(&mut self) {
        match self.take(Field::ValueType, 4) {
            8 => drop(self.text(Field::TextLength, Field::Value)),
            9 => {
                let ty = self.take(Field::ElementType, 4);
                let count = self.take(Field::ElementCount, 8) as usize;
                if ty == 8 {
                    (0..count)
                        .for_each(|_| drop(self.text(Field::ElementTextLength, Field::Elements)));
                } else {
                    self.take(Field::Elements, count * width(ty));
                }
            }
            ty => drop(self.take(Field::Value, width(ty))),
        }
    }
}

fn width(ty: u64) -> usize {
    match ty {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        other => panic!("the valid file has a value of type {other}"),
    }
}

impl Layout {
    /// Returns the layout of a valid file.
    pub fn of(file: &[u8]) -> Self {
        let mut walk = Walk {
            file,
            at: 0,
            of: String::new(),
            places: Vec::new(),
        };
        walk.take(Field::Magic, 4);
        walk.take(Field::Version, 4);
        let tensors = walk.take(Field::TensorCount, 8);
        let metadata = walk.take(Field::MetadataCount, 8);
        for _ in 0..metadata {
            walk.of.clear();
            walk.of = walk.text(Field::KeyLength, Field::Key);
            walk.value();
        }
        for _ in 0..tensors {
            walk.of.clear();
            walk.of = walk.text(Field::NameLength, Field::Name);
            for _ in 0..walk.take(Field::DimensionCount, 4) {
                walk.take(Field::Dimension, 8);
            }
            walk.take(Field::TensorType, 4);
            walk.take(Field::TensorOffset, 8);
        }
        walk.of.clear();
        walk.take(Field::Padding, walk.at.next_multiple_of(32) - walk.at);
        walk.take(Field::TensorData, file.len() - walk.at);
        Self {
            places: walk.places,
        }
    }

    /// Returns all fields of this kind.
    pub fn all(&self, field: Field) -> impl Iterator<Item = &Place> {
        self.places.iter().filter(move |place| place.field == field)
    }

    /// Returns the value field of the metadata entry `key`.
    pub fn value(&self, key: &str) -> &Place {
        let mut values = self.all(Field::Value);
        values
            .find(|place| place.of == key)
            .unwrap_or_else(|| panic!("the valid file has `{key}`"))
    }
}

/// A hostile variant of the valid file.
#[derive(Debug, Clone)]
pub struct Mutant {
    /// Kind of attack, as listed in `promises.md`.
    pub kind: &'static str,
    /// Description of the change.
    pub change: String,
    pub bytes: Vec<u8>,
}

/// Returns a small valid file with every type of value, three tensors, a vocabulary and a chat template.
pub fn valid() -> Vec<u8> {
    let mut metadata: Vec<(&str, u32, Vec<u8>)> = vec![
        ("general.architecture", 8, text("llama")),
        ("general.name", 8, text("Valid")),
        ("general.alignment", 4, 32u32.to_le_bytes().into()),
        ("general.file_type", 4, 0u32.to_le_bytes().into()),
        ("llama.context_length", 4, 2048u32.to_le_bytes().into()),
        ("llama.block_count", 10, 2u64.to_le_bytes().into()),
        ("llama.embedding_length", 5, 64i32.to_le_bytes().into()),
        ("llama.feed_forward_length", 11, 256i64.to_le_bytes().into()),
        ("llama.attention.head_count", 2, 8u16.to_le_bytes().into()),
        ("llama.attention.key_length", 3, 8i16.to_le_bytes().into()),
        (
            "llama.attention.head_count_kv",
            9,
            array(4, 2, [2u32, 2].map(u32::to_le_bytes).concat()),
        ),
        ("llama.rope.freq_base", 6, 10_000f32.to_le_bytes().into()),
        (
            "llama.attention.layer_norm_epsilon",
            12,
            1e-5f64.to_le_bytes().into(),
        ),
        ("tokenizer.ggml.model", 8, text("gpt2")),
        (
            "tokenizer.ggml.tokens",
            9,
            array(8, 3, [text("a"), text("b"), text("ab")].concat()),
        ),
        (
            "tokenizer.ggml.scores",
            9,
            array(6, 3, [0f32; 3].map(f32::to_le_bytes).concat()),
        ),
        ("tokenizer.ggml.merges", 9, array(8, 1, text("a b"))),
        ("tokenizer.ggml.add_bos_token", 7, vec![1]),
        ("tokenizer.ggml.eos_token_id", 0, vec![2]),
        ("tokenizer.ggml.bos_token_id", 1, vec![1]),
        (
            "tokenizer.chat_template",
            8,
            text("{{ messages[0].content }}"),
        ),
    ];
    // Arrays of all other types, under keys that no reader looks up.
    let zeros = |ty, width: usize| array(ty, 2, vec![0; 2 * width]);
    let names = [
        "x.0", "x.1", "x.2", "x.3", "x.5", "x.7", "x.10", "x.11", "x.12",
    ];
    let others = [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 2),
        (5, 4),
        (7, 1),
        (10, 8),
        (11, 8),
        (12, 8),
    ];
    metadata.extend(
        names
            .iter()
            .zip(others)
            .map(|(name, (ty, width))| (*name, 9, zeros(ty, width))),
    );
    let tensors: [(&str, &[u64], u32, u64); 3] = [
        ("token_embd.weight", &[64, 3], 8, 0), // Q8_0: six blocks of 34 bytes
        ("blk.0.attn_q.weight", &[8, 4, 2], 0, 224),
        ("output_norm.weight", &[64], 1, 480),
    ];
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, ty, value) in metadata {
        file.extend(text(key));
        file.extend(ty.to_le_bytes());
        file.extend(value);
    }
    for (name, dims, ty, offset) in tensors {
        file.extend(text(name));
        file.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| file.extend(d.to_le_bytes()));
        file.extend(ty.to_le_bytes());
        file.extend(offset.to_le_bytes());
    }
    file.resize(file.len().next_multiple_of(32) + 480 + 128, 0);
    file
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn array(ty: u32, count: u64, content: Vec<u8>) -> Vec<u8> {
    [&ty.to_le_bytes()[..], &count.to_le_bytes(), &content].concat()
}

/// Values that are likely to break arithmetic, as `promises.md` lists them.
pub const NASTY: [(&str, u64); 5] = [
    ("0", 0),
    ("1", 1),
    ("2^31", 1 << 31),
    ("2^63", 1 << 63),
    ("2^64-1", u64::MAX),
];

/// Returns all hostile variants of `valid` that the header reader must refuse.
pub fn hostile(valid: &[u8]) -> Vec<Mutant> {
    let layout = Layout::of(valid);
    let mut mutants = Vec::new();
    let mut add = |kind, change: String, bytes: Vec<u8>| {
        mutants.push(Mutant {
            kind,
            change,
            bytes,
        });
    };
    let patched = |place: &Place, bytes: &[u8]| {
        let mut file = valid.to_vec();
        file[place.at..place.at + bytes.len()].copy_from_slice(bytes);
        file
    };

    for place in layout.places.iter().filter(|place| place.length > 0) {
        for (what, length) in [
            ("before", place.at),
            ("inside", place.at + place.length.div_ceil(2)),
        ] {
            let change = format!("cut {what} {:?} `{}`", place.field, place.of);
            // The middle of a one-byte field is its end, which is the start of the next field or the end of the file.
            if length < place.at + place.length {
                add(truncated(place.field), change, valid[..length].to_vec());
            }
        }
    }
    let magic = &layout.places[0];
    for wrong in [b"GGML", b"gguf", b"PK\x03\x04", b"FUGG"] {
        add(
            "wrong magic",
            format!("{wrong:02x?}"),
            patched(magic, wrong),
        );
    }
    let version = &layout.places[1];
    for wrong in [0, 1, 4, 3 << 24, u32::MAX] {
        add(
            "wrong version",
            wrong.to_string(),
            patched(version, &wrong.to_le_bytes()),
        );
    }
    for (field, kinds) in [
        (Field::TensorCount, COUNTS),
        (Field::MetadataCount, COUNTS),
        (Field::ElementCount, COUNTS),
        (Field::DimensionCount, COUNTS),
        (Field::KeyLength, LENGTHS),
        (Field::TextLength, LENGTHS),
        (Field::ElementTextLength, LENGTHS),
        (Field::NameLength, LENGTHS),
        (Field::Dimension, DIMENSIONS),
        (Field::TensorOffset, OFFSETS),
    ] {
        for place in layout.all(field) {
            for ((shown, value), kind) in NASTY.into_iter().zip(kinds) {
                let mut bytes = value.to_le_bytes().to_vec();
                if place.length == 4 && value > u64::from(u32::MAX) {
                    // A 4-byte field gets the upper half of 2^63 or 2^64-1: 2^31 or 2^32-1.
                    bytes = bytes[4..].to_vec();
                }
                let file = patched(place, &bytes[..place.length]);
                if file != valid {
                    add(kind, format!("{field:?} `{}` = {shown}", place.of), file);
                }
            }
        }
    }
    let alignment = layout.value("general.alignment");
    for wrong in [0u32, 3] {
        let kind = if wrong == 0 {
            "alignment of 0"
        } else {
            "alignment of 3"
        };
        add(
            kind,
            "as a 32-bit number".to_owned(),
            patched(alignment, &wrong.to_le_bytes()),
        );
        // The same number as another type of the same width.
        let ty = Place {
            at: alignment.at - 4,
            ..alignment.clone()
        };
        let bytes = [5u32.to_le_bytes(), wrong.to_le_bytes()].concat();
        add(kind, "as a signed number".to_owned(), patched(&ty, &bytes));
    }
    let offsets: Vec<&Place> = layout.all(Field::TensorOffset).collect();
    for (at, shown, offset) in [
        (1, "the second begins with the first", 0u64),
        (1, "the second begins inside the first", 192),
        (2, "the third begins inside the second", 256),
        (0, "the first begins inside the second", 224),
    ] {
        add(
            "tensors overlapping",
            shown.to_owned(),
            patched(offsets[at], &offset.to_le_bytes()),
        );
    }
    let beyond = (valid.len() as u64).next_multiple_of(32);
    for (at, shown, offset) in [
        (2, "one alignment later", 512),
        (1, "beyond the file", beyond),
        (0, "near 2^64", u64::MAX - 31),
    ] {
        add(
            "tensors past the end",
            shown.to_owned(),
            patched(offsets[at], &offset.to_le_bytes()),
        );
    }
    for place in layout.all(Field::Dimension) {
        let bytes = (1u64 << 20).to_le_bytes();
        add(
            "tensors past the end",
            format!("a dimension of 2^20 in `{}`", place.of),
            patched(place, &bytes),
        );
    }
    for (field, unknown, kind) in [
        (Field::ValueType, [13, u32::MAX], "unknown type of value"),
        (Field::ElementType, [13, 9], "unknown type of elements"),
        (Field::TensorType, [4, 1000], "unknown type of tensor"),
    ] {
        for place in layout.all(field) {
            for ty in unknown {
                add(
                    kind,
                    format!("{ty} in `{}`", place.of),
                    patched(place, &ty.to_le_bytes()),
                );
            }
        }
    }
    mutants
}

const COUNTS: [&str; 5] = [
    "count of 0",
    "count of 1",
    "count of 2^31",
    "count of 2^63",
    "count of 2^64-1",
];
const LENGTHS: [&str; 5] = [
    "length of 0",
    "length of 1",
    "length of 2^31",
    "length of 2^63",
    "length of 2^64-1",
];
const DIMENSIONS: [&str; 5] = [
    "dimension of 0",
    "dimension of 1",
    "dimension of 2^31",
    "dimension of 2^63",
    "dimension of 2^64-1",
];
const OFFSETS: [&str; 5] = [
    "offset of 0",
    "offset of 1",
    "offset of 2^31",
    "offset of 2^63",
    "offset of 2^64-1",
];

fn truncated(field: Field) -> &'static str {
    match field {
        Field::Magic | Field::Version | Field::TensorCount | Field::MetadataCount => {
            "truncated in the header"
        }
        Field::KeyLength | Field::Key => "truncated in a key",
        Field::ValueType | Field::Value | Field::TextLength => "truncated in a value",
        Field::ElementType | Field::ElementCount | Field::ElementTextLength | Field::Elements => {
            "truncated in an array"
        }
        Field::NameLength | Field::Name => "truncated in a tensor's name",
        Field::DimensionCount | Field::Dimension | Field::TensorType | Field::TensorOffset => {
            "truncated in a tensor's description"
        }
        Field::Padding | Field::TensorData => "truncated in the tensor data",
    }
}

/// Returns the file without the metadata entry `key`. Tensor offsets stay valid: they count from the start of the data.
pub fn without(valid: &[u8], key: &str) -> Vec<u8> {
    rebuilt(valid, key, None)
}

/// Returns the file with another text as the value of `key`.
pub fn with_text(valid: &[u8], key: &str, value: &str) -> Vec<u8> {
    rebuilt(valid, key, Some(text(value)))
}

fn rebuilt(valid: &[u8], key: &str, value: Option<Vec<u8>>) -> Vec<u8> {
    let layout = Layout::of(valid);
    let own: Vec<&Place> = layout.places.iter().filter(|p| p.of == key).collect();
    let (first, last) = (
        own.first().expect("the key is there"),
        own.last().expect("the key is there"),
    );
    let data = layout
        .all(Field::TensorData)
        .next()
        .expect("a valid file has data");
    let padding = layout
        .all(Field::Padding)
        .next()
        .expect("every file has an end of its header");
    let mut file = valid[..first.at].to_vec();
    if let Some(value) = &value {
        file.extend(&valid[first.at..first.at + 4]);
        file.extend(value);
    } else {
        // Remove the key and its length, which precede the fields that belong to the key.
        file.truncate(file.len() - key.len() - 8);
        let count = layout
            .all(Field::MetadataCount)
            .next()
            .expect("every file has counts")
            .at;
        let number =
            u64::from_le_bytes(valid[count..count + 8].try_into().expect("eight bytes")) - 1;
        file[count..count + 8].copy_from_slice(&number.to_le_bytes());
    }
    file.extend(&valid[last.at + last.length..padding.at]);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(&valid[data.at..]);
    file
}
