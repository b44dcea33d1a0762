//! Readers of a header's parts. Each checks the remaining size before reading.

use std::collections::BTreeMap;
use std::io::Read;

use super::error::{GgufError, Section};
use super::tensor::{GgmlType, TensorInfo};
use super::value::{Array, FromValue, StringArray, Value};
use super::wrong_value;
use super::{
    DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_DIMS, MAX_HEADER_BYTES, MAX_KEY_BYTES,
    MAX_METADATA, MAX_TENSOR_NAME_BYTES, MAX_TENSORS,
};

/// A sequential reader of a file that tracks its position.
pub(super) struct Input<R> {
    pub(super) reader: R,
    pub(super) position: u64,
    pub(super) size: u64,
}

impl<R: Read> Input<R> {
    /// Fails unless the next `bytes` bytes are within the file and within [`MAX_HEADER_BYTES`]. Must be called before memory is
    /// allocated for them.
    fn ensure(&self, bytes: u64, section: &Section) -> Result<(), GgufError> {
        let needed = self.position.saturating_add(bytes);
        if needed > self.size {
            return Err(GgufError::Truncated {
                section: section.clone(),
                needed,
                actual: self.size,
            });
        }
        if needed > MAX_HEADER_BYTES {
            return Err(GgufError::TooLarge {
                section: section.clone(),
                offset: self.position,
                what: "the end of the header",
                found: needed,
                limit: MAX_HEADER_BYTES,
            });
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self, section: &Section) -> Result<[u8; N], GgufError> {
        self.ensure(N as u64, section)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, section: &Section) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(section)?))
    }

    fn u64(&mut self, section: &Section) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(section)?))
    }

    /// Appends `length` bytes to `out`.
    fn append(
        &mut self,
        out: &mut Vec<u8>,
        length: u64,
        section: &Section,
    ) -> Result<(), GgufError> {
        self.ensure(length, section)?;
        let start = out.len();
        out.resize(start + length as usize, 0);
        self.reader.read_exact(&mut out[start..])?;
        self.position += length;
        Ok(())
    }

    /// Reads a length-prefixed text of at most `limit` bytes.
    fn text(
        &mut self,
        what: &'static str,
        limit: u64,
        section: &Section,
    ) -> Result<String, GgufError> {
        let offset = self.position;
        let length = self.u64(section)?;
        // Checked before the limit: a length beyond the end of the file means a truncated file rather than a long text.
        self.ensure(length, section)?;
        if length > limit {
            return Err(GgufError::TooLarge {
                section: section.clone(),
                offset,
                what,
                found: length,
                limit,
            });
        }
        let mut bytes = Vec::new();
        self.append(&mut bytes, length, section)?;
        String::from_utf8(bytes)
            .map_err(|_| self.invalid(section, format!("the {what} is not UTF-8")))
    }

    fn invalid(&self, section: &Section, what: String) -> GgufError {
        GgufError::Invalid {
            section: section.clone(),
            offset: self.position,
            what,
        }
    }
}

pub(super) fn read_preamble<R: Read>(input: &mut Input<R>) -> Result<(u32, u64, u64), GgufError> {
    let section = Section::Header;
    if input.size < 4 {
        let mut found = Vec::new();
        input.append(&mut found, input.size, &section)?;
        return Err(GgufError::BadMagic { found });
    }
    let magic: [u8; 4] = input.array(&section)?;
    if magic != MAGIC {
        return Err(GgufError::BadMagic {
            found: magic.to_vec(),
        });
    }
    let version = input.u32(&section)?;
    match version {
        2 | 3 => {}
        // A small number in the opposite byte order.
        v if v != 0 && v.swap_bytes() <= 0xffff => return Err(GgufError::BigEndian),
        found => return Err(GgufError::UnsupportedVersion { found }),
    }
    let tensors = read_count(input, "the number of tensors", MAX_TENSORS)?;
    if tensors == 0 {
        return Err(input.invalid(
            &section,
            "it has no tensors, so it is not a model".to_owned(),
        ));
    }
    let metadata = read_count(input, "the number of metadata entries", MAX_METADATA)?;
    // The smallest possible metadata entry (empty key, one byte) and tensor description (empty name, one dimension).
    input.ensure(
        metadata * (8 + 4 + 1) + tensors * (8 + 4 + 8 + 4 + 8),
        &section,
    )?;
    Ok((version, tensors, metadata))
}

fn read_count<R: Read>(
    input: &mut Input<R>,
    what: &'static str,
    limit: u64,
) -> Result<u64, GgufError> {
    let offset = input.position;
    let found = input.u64(&Section::Header)?;
    if found > limit {
        return Err(GgufError::TooLarge {
            section: Section::Header,
            offset,
            what,
            found,
            limit,
        });
    }
    Ok(found)
}

pub(super) fn read_metadata<R: Read>(
    input: &mut Input<R>,
    count: u64,
) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let mut section = Section::Metadata {
            index,
            key: String::new(),
        };
        let key = input.text("key", MAX_KEY_BYTES, &section)?;
        section = Section::Metadata {
            index,
            key: key.clone(),
        };
        let ty = input.u32(&section)?;
        let value = read_value(input, ty, &section)?;
        if metadata.insert(key, value).is_some() {
            return Err(input.invalid(&section, "the key appears twice".to_owned()));
        }
    }
    Ok(metadata)
}

fn read_value<R: Read>(
    input: &mut Input<R>,
    ty: u32,
    section: &Section,
) -> Result<Value, GgufError> {
    Ok(match ty {
        0 => Value::Unsigned(u8::from_le_bytes(input.array(section)?).into()),
        1 => Value::Signed(i8::from_le_bytes(input.array(section)?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(input.array(section)?).into()),
        3 => Value::Signed(i16::from_le_bytes(input.array(section)?).into()),
        4 => Value::Unsigned(input.u32(section)?.into()),
        5 => Value::Signed(i32::from_le_bytes(input.array(section)?).into()),
        6 => Value::F32(f32::from_le_bytes(input.array(section)?)),
        7 => {
            let [byte] = input.array(section)?;
            Value::Bool(read_bool(byte).ok_or_else(|| input.invalid(section, not_a_bool(byte)))?)
        }
        8 => Value::String(input.text("text", u64::MAX, section)?),
        9 => Value::Array(read_array(input, section)?),
        10 => Value::Unsigned(input.u64(section)?),
        11 => Value::Signed(i64::from_le_bytes(input.array(section)?)),
        12 => Value::F64(f64::from_le_bytes(input.array(section)?)),
        other => {
            return Err(input.invalid(section, format!("unknown metadata value type {other}")));
        }
    })
}

fn read_bool(byte: u8) -> Option<bool> {
    match byte {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn not_a_bool(byte: u8) -> String {
    format!("a boolean is stored as {byte}, but must be 0 or 1")
}

fn read_array<R: Read>(input: &mut Input<R>, section: &Section) -> Result<Array, GgufError> {
    let ty = input.u32(section)?;
    let count = input.u64(section)?;
    /// Reads numbers of `N` bytes each. Checks that the file contains the whole array before allocating memory for it.
    fn numbers<R: Read, T, const N: usize>(
        input: &mut Input<R>,
        count: u64,
        section: &Section,
        convert: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        input.ensure(count.saturating_mul(N as u64), section)?;
        (0..count)
            .map(|_| Ok(convert(input.array(section)?)))
            .collect()
    }
    Ok(match ty {
        0 => Array::U8(numbers(input, count, section, u8::from_le_bytes)?),
        1 => Array::I8(numbers(input, count, section, i8::from_le_bytes)?),
        2 => Array::U16(numbers(input, count, section, u16::from_le_bytes)?),
        3 => Array::I16(numbers(input, count, section, i16::from_le_bytes)?),
        4 => Array::U32(numbers(input, count, section, u32::from_le_bytes)?),
        5 => Array::I32(numbers(input, count, section, i32::from_le_bytes)?),
        6 => Array::F32(numbers(input, count, section, f32::from_le_bytes)?),
        7 => {
            let bytes = numbers(input, count, section, u8::from_le_bytes)?;
            match bytes.iter().map(|b| read_bool(*b).ok_or(*b)).collect() {
                Ok(values) => Array::Bool(values),
                Err(byte) => return Err(input.invalid(section, not_a_bool(byte))),
            }
        }
        8 => Array::String(read_strings(input, count, section)?),
        9 => return Err(input.invalid(section, "an array of arrays is not supported".to_owned())),
        10 => Array::U64(numbers(input, count, section, u64::from_le_bytes)?),
        11 => Array::I64(numbers(input, count, section, i64::from_le_bytes)?),
        12 => Array::F64(numbers(input, count, section, f64::from_le_bytes)?),
        other => {
            return Err(input.invalid(section, format!("unknown array element type {other}")));
        }
    })
}

fn read_strings<R: Read>(
    input: &mut Input<R>,
    count: u64,
    section: &Section,
) -> Result<StringArray, GgufError> {
    // Each string has a length prefix, so the file must contain at least that much before memory is allocated for the ends.
    input.ensure(count.saturating_mul(8), section)?;
    let mut strings = StringArray {
        bytes: Vec::new(),
        ends: Vec::with_capacity(count as usize),
    };
    for _ in 0..count {
        let length = input.u64(section)?;
        input.append(&mut strings.bytes, length, section)?;
        strings.ends.push(strings.bytes.len() as u64);
    }
    Ok(strings)
}

pub(super) fn alignment_of(
    metadata: &BTreeMap<String, Value>,
    offset: u64,
) -> Result<u64, GgufError> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let alignment =
        u64::from_value(value).ok_or_else(|| wrong_value(key, u64::EXPECTED, value.describe()))?;
    let section = Section::Header;
    if alignment > MAX_ALIGNMENT {
        return Err(GgufError::TooLarge {
            section,
            offset,
            what: "the alignment",
            found: alignment,
            limit: MAX_ALIGNMENT,
        });
    }
    if !alignment.is_power_of_two() {
        return Err(GgufError::Invalid {
            section,
            offset,
            what: format!("the alignment is {alignment}, it must be a power of two"),
        });
    }
    Ok(alignment)
}

pub(super) fn read_tensor_infos<R: Read>(
    input: &mut Input<R>,
    count: u64,
    alignment: u64,
) -> Result<Vec<TensorInfo>, GgufError> {
    // The preamble check ensures that the file is long enough for this many tensors.
    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(count as usize);
    for index in 0..count {
        let mut section = Section::TensorInfo {
            index,
            name: String::new(),
        };
        let name = input.text("name", MAX_TENSOR_NAME_BYTES, &section)?;
        section = Section::TensorInfo {
            index,
            name: name.clone(),
        };
        tensors.push(read_tensor_info(input, name, alignment, &section)?);
    }
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let what = format!("two tensors have the name `{}`", pair[0]);
        return Err(input.invalid(&Section::Header, what));
    }
    Ok(tensors)
}

fn read_tensor_info<R: Read>(
    input: &mut Input<R>,
    name: String,
    alignment: u64,
    section: &Section,
) -> Result<TensorInfo, GgufError> {
    let dim_count = input.u32(section)?;
    if !(1..=MAX_DIMS).contains(&dim_count) {
        return Err(input.invalid(
            section,
            format!("it has {dim_count} dimensions, but must have 1 to {MAX_DIMS}"),
        ));
    }
    let dims = (0..dim_count)
        .map(|_| input.u64(section))
        .collect::<Result<Vec<_>, _>>()?;
    let type_id = input.u32(section)?;
    let ty = GgmlType::from_id(type_id)
        .ok_or_else(|| input.invalid(section, format!("unknown element type {type_id}")))?;
    let offset = input.u64(section)?;
    if let Some(zero) = dims.iter().position(|d| *d == 0) {
        return Err(input.invalid(section, format!("dimension {zero} is 0")));
    }
    if dims[0] % ty.block_elements != 0 {
        return Err(input.invalid(
            section,
            format!(
                "a row has {} elements, but {} stores them in blocks of {}",
                dims[0], ty.name, ty.block_elements
            ),
        ));
    }
    if !offset.is_multiple_of(alignment) {
        return Err(input.invalid(
            section,
            format!("it begins at {offset}, which is not a multiple of {alignment}"),
        ));
    }
    let size_bytes = dims
        .iter()
        .try_fold(1u64, |product, d| product.checked_mul(*d))
        .and_then(|elements| (elements / ty.block_elements).checked_mul(ty.block_bytes))
        .ok_or_else(|| {
            input.invalid(section, format!("its dimensions {dims:?} overflow 64 bits"))
        })?;
    Ok(TensorInfo {
        name,
        dims,
        ty,
        offset,
        size_bytes,
    })
}

/// Checks that the tensors fill the file from `data_offset` to its end, in sequence, with no gaps except alignment padding. All
/// writers produce this layout, and ggml insists on it. A count or dimension that is too small is found by the bytes that
/// belong to no tensor.
pub(super) fn check_layout(
    tensors: &[TensorInfo],
    data_offset: u64,
    alignment: u64,
    file_size: u64,
) -> Result<(), GgufError> {
    let end = |t: &TensorInfo| t.offset.saturating_add(t.size_bytes);
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    if let Some(pair) = order.windows(2).find(|p| p[1].offset < end(p[0])) {
        return Err(GgufError::Overlap {
            first: pair[0].name.clone(),
            second: pair[1].name.clone(),
            first_end: end(pair[0]),
            second_start: pair[1].offset,
        });
    }
    let needed = data_offset.saturating_add(order.last().map_or(0, |t| end(t)));
    if needed > file_size {
        return Err(GgufError::Truncated {
            section: Section::TensorData,
            needed,
            actual: file_size,
        });
    }
    let unowned = |offset: u64, bytes: u64, what: &str| GgufError::Invalid {
        section: Section::TensorData,
        offset: data_offset + offset,
        what: format!("{bytes} bytes {what} belong to no tensor"),
    };
    let padded = |end: u64| end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    let mut free = 0;
    for tensor in order {
        if tensor.offset > free {
            let what = format!("before `{}`", tensor.name);
            return Err(unowned(free, tensor.offset - free, &what));
        }
        free = padded(end(tensor));
    }
    match (file_size - data_offset).checked_sub(free) {
        None | Some(0) => Ok(()),
        Some(bytes) => Err(unowned(free, bytes, "at the end of the file")),
    }
}
