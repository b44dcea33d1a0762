//! Metadata values, held in memory as compactly as they are stored in the file.

/// The strings of a metadata array, held as one buffer of bytes and the end of each string.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StringArray {
    pub(super) bytes: Vec<u8>,
    pub(super) ends: Vec<u64>,
}

impl StringArray {
    /// Returns the number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether the array has no strings.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the string at `index` as bytes, because some vocabularies are not valid UTF-8.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)? as usize;
        let start = if index == 0 {
            0
        } else {
            self.ends[index - 1] as usize
        };
        self.bytes.get(start..end)
    }

    /// Returns all strings in order, with U+FFFD in place of invalid UTF-8.
    pub fn iter(&self) -> impl Iterator<Item = std::borrow::Cow<'_, str>> {
        (0..self.len()).map(|i| String::from_utf8_lossy(self.get(i).unwrap_or_default()))
    }
}

/// A metadata array. Nested arrays are not supported.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Unsigned bytes.
    U8(Vec<u8>),
    /// Signed bytes.
    I8(Vec<i8>),
    /// Unsigned 16-bit numbers.
    U16(Vec<u16>),
    /// Signed 16-bit numbers.
    I16(Vec<i16>),
    /// Unsigned 32-bit numbers.
    U32(Vec<u32>),
    /// Signed 32-bit numbers.
    I32(Vec<i32>),
    /// Unsigned 64-bit numbers.
    U64(Vec<u64>),
    /// Signed 64-bit numbers.
    I64(Vec<i64>),
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// Strings.
    String(StringArray),
}

impl Array {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
        }
    }

    /// Returns whether the array has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the elements as unsigned numbers, or `None` if any of them is not one.
    pub(super) fn to_u64s(&self) -> Option<Vec<u64>> {
        fn all<T: Copy + TryInto<u64>>(values: &[T]) -> Option<Vec<u64>> {
            values.iter().map(|v| (*v).try_into().ok()).collect()
        }
        match self {
            Self::U8(v) => all(v),
            Self::I8(v) => all(v),
            Self::U16(v) => all(v),
            Self::I16(v) => all(v),
            Self::U32(v) => all(v),
            Self::I32(v) => all(v),
            Self::U64(v) => Some(v.clone()),
            Self::I64(v) => all(v),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) => None,
        }
    }
}

/// A metadata value, with integers widened to 64 bits.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned integer of any width in the file.
    Unsigned(u64),
    /// Signed integer of any width in the file.
    Signed(i64),
    /// 32-bit float.
    F32(f32),
    /// 64-bit float.
    F64(f64),
    /// Boolean; 0 or 1 in the file.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Array of elements of one type.
    Array(Array),
}

impl Value {
    /// Returns a description of the value for error messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Unsigned(v) => format!("the number {v}"),
            Self::Signed(v) => format!("the number {v}"),
            Self::F32(v) => format!("the number {v}"),
            Self::F64(v) => format!("the number {v}"),
            Self::Bool(v) => format!("{v}"),
            Self::String(_) => "a string".to_owned(),
            Self::Array(a) => format!("an array of {} elements", a.len()),
        }
    }
}

/// A type that a metadata value can be converted to.
pub trait FromValue<'a>: Sized {
    /// Description of the expected value, for error messages.
    const EXPECTED: &'static str;
    /// Converts the value, or returns `None` if it has another type or is out of range.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl FromValue<'_> for u64 {
    const EXPECTED: &'static str = "a non-negative integer";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Unsigned(v) => Some(*v),
            Value::Signed(v) => (*v).try_into().ok(),
            _ => None,
        }
    }
}

impl FromValue<'_> for u32 {
    const EXPECTED: &'static str = "an integer from 0 to 4294967295";
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value)?.try_into().ok()
    }
}

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a number";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::F32(v) => Some(f64::from(*v)),
            Value::F64(v) => Some(*v),
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a boolean";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::String(v) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a StringArray {
    const EXPECTED: &'static str = "an array of strings";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::Array(Array::String(v)) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a [f32] {
    const EXPECTED: &'static str = "an array of 32-bit floats";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::Array(Array::F32(v)) => Some(v),
            _ => None,
        }
    }
}

impl FromValue<'_> for Vec<u64> {
    const EXPECTED: &'static str = "an array of non-negative integers";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Array(a) => a.to_u64s(),
            _ => None,
        }
    }
}
