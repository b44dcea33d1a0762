//! JSON deserialisation that is stricter than serde's: at any depth, a structure must be written as an object, and no name
//! may be repeated in an object. As in JSON Schema, a number without a fraction is an integer, so `7.0` and `70e-1` are
//! integers.
//!
//! serde also accepts an array for a structure, assigning its values by position, and keeps the last of two values with
//! one name in a map. Two programs that read such a body could then act on different requests.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _,
    IntoDeserializer as _, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};

/// Parses `bytes`. An error names the field.
pub(super) fn from_slice<T: DeserializeOwned>(
    bytes: &[u8],
) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let named = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let value = match T::deserialize(Strict(named)) {
        Ok(value) => value,
        Err(error) => return Err(serde_path_to_error::Error::new(track.path(), error)),
    };
    match json.end() {
        Ok(()) => Ok(value),
        Err(error) => Err(serde_path_to_error::Error::new(track.path(), error)),
    }
}

/// A wrapper of one of serde's types that applies the rules and forwards everything else.
struct Strict<T>(T);

/// The counterpart of [`Strict`] for visitors.
struct StrictVisitor<V> {
    inner: V,
    expected: Expected,
}

/// Kind of the type that a value is deserialised into, as far as the rules depend on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// A structure with named fields.
    Object,
    /// An integer type of any width.
    Integer,
    /// Any other type.
    Other,
}

impl<V> StrictVisitor<V> {
    fn of(inner: V) -> Self {
        Self {
            inner,
            expected: Expected::Other,
        }
    }
}

macro_rules! pass_on {
    ($expected:ident: $($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, inner: V) -> Result<V::Value, D::Error> {
            self.0.$method(StrictVisitor {
                inner,
                expected: Expected::$expected,
            })
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<D> {
    type Error = D::Error;

    pass_on! {
        Integer: deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
    }

    pass_on! {
        Other: deserialize_any deserialize_bool deserialize_f32 deserialize_f64 deserialize_char deserialize_str
        deserialize_string deserialize_bytes deserialize_byte_buf deserialize_option deserialize_unit deserialize_seq
        deserialize_map deserialize_identifier deserialize_ignored_any
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        inner: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = StrictVisitor {
            inner,
            expected: Expected::Object,
        };
        self.0.deserialize_struct(name, fields, visitor)
    }

    /// Deserialises an enum by hand: for anything but a string or an object, `serde_json` would report a syntax error without
    /// saying what is expected.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        inner: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(OneOf { inner, variants })
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0
            .deserialize_unit_struct(name, StrictVisitor::of(visitor))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0
            .deserialize_newtype_struct(name, StrictVisitor::of(visitor))
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_tuple(len, StrictVisitor::of(visitor))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0
            .deserialize_tuple_struct(name, len, StrictVisitor::of(visitor))
    }

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

macro_rules! visit {
    ($($method:ident: $kind:ty)*) => {$(
        fn $method<E: de::Error>(self, value: $kind) -> Result<V::Value, E> {
            self.inner.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for StrictVisitor<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // serde's own text would name the Rust type.
        match self.expected {
            Expected::Object => f.write_str("an object with named fields"),
            _ => self.inner.expecting(f),
        }
    }

    visit! {
        visit_bool: bool visit_i8: i8 visit_i16: i16 visit_i32: i32 visit_i64: i64 visit_i128: i128
        visit_u8: u8 visit_u16: u16 visit_u32: u32 visit_u64: u64 visit_u128: u128 visit_f32: f32
        visit_char: char visit_str: &str visit_borrowed_str: &'de str visit_string: String
        visit_bytes: &[u8] visit_borrowed_bytes: &'de [u8] visit_byte_buf: Vec<u8>
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<V::Value, E> {
        const ABOVE_U64: f64 = 18_446_744_073_709_551_616.0;
        const LEAST_I64: f64 = -9_223_372_036_854_775_808.0;
        let whole = self.expected == Expected::Integer && value.fract() == 0.0;
        // Within these bounds, a float without a fraction converts exactly.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        match value {
            0.0..ABOVE_U64 if whole => self.inner.visit_u64(value as u64),
            LEAST_I64..0.0 if whole => self.inner.visit_i64(value as i64),
            _ => self.inner.visit_f64(value),
        }
    }

    fn visit_none<E: de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, some: D) -> Result<V::Value, D::Error> {
        self.inner.visit_some(Strict(some))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.inner.visit_newtype_struct(Strict(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        if self.expected == Expected::Object {
            return Err(A::Error::invalid_type(Unexpected::Seq, &self));
        }
        self.inner.visit_seq(Strict(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<V::Value, A::Error> {
        self.inner.visit_map(StrictMap {
            inner: fields,
            seen: BTreeSet::new(),
        })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.inner.visit_enum(Strict(variant))
    }
}

/// A visitor for an enum: the name of a variant, or an object with that name as its key and the variant's content.
struct OneOf<V> {
    inner: V,
    variants: &'static [&'static str],
}

impl<'de, V: Visitor<'de>> Visitor<'de> for OneOf<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, variant) in self.variants.iter().enumerate() {
            let or = if i == 0 { "" } else { " or " };
            write!(f, "{or}`{variant}`")?;
        }
        Ok(())
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<V::Value, E> {
        self.inner.visit_enum(name.into_deserializer())
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<V::Value, A::Error> {
        let variant = MapAccessDeserializer::new(object);
        self.inner.visit_enum(Strict(variant))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Strict<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Strict(inner))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Strict<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Strict(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

/// An object and the names read from it so far.
struct StrictMap<A> {
    inner: A,
    seen: BTreeSet<String>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for StrictMap<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let Some(name) = self.inner.next_key::<String>()? else {
            return Ok(None);
        };
        if self.seen.contains(&name) {
            let shown: String = name.chars().take(80).collect();
            return Err(A::Error::custom(format_args!(
                "duplicate field `{}`",
                shown.escape_debug()
            )));
        }
        self.seen.insert(name.clone());
        seed.deserialize(name.into_deserializer()).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.inner.next_value_seed(Strict(seed))
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Strict<A> {
    type Error = A::Error;
    type Variant = Strict<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let (name, content) = self.0.variant_seed(seed)?;
        Ok((name, Strict(content)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Strict<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.0.newtype_variant_seed(Strict(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(len, StrictVisitor::of(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        inner: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = StrictVisitor {
            inner,
            expected: Expected::Object,
        };
        self.0.struct_variant(fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        name: String,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        labels: BTreeMap<String, String>,
        #[serde(default)]
        kinds: Vec<Kind>,
        #[serde(default)]
        pair: Option<(u8, u8)>,
        #[serde(default)]
        anything: Value,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Inner {
        a: u8,
        b: u8,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Plain,
        Of(Inner),
        With { inner: Inner },
    }

    fn read(json: &str) -> Result<Body, String> {
        from_slice(json.as_bytes()).map_err(|error| error.to_string())
    }

    // [POOLCORE-170]
    #[test]
    fn what_is_written_as_meant_reads_as_ever() {
        let body = read(
            r#"{"name": "n", "inner": {"a": 1, "b": 2}, "labels": {"k": "v", "l": "v"}, "pair": [3, 4],
                "kinds": ["plain", {"of": {"b": 1, "a": 2}}, {"with": {"inner": {"a": 5, "b": 6}}}], "anything": [1, {"x": null}]}"#,
        )
        .unwrap();
        assert_eq!(body.inner, Some(Inner { a: 1, b: 2 }));
        assert_eq!((body.labels.len(), body.pair), (2, Some((3, 4))));
        let inner = |a, b| Inner { a, b };
        assert_eq!(
            body.kinds,
            [
                Kind::Plain,
                Kind::Of(inner(2, 1)),
                Kind::With { inner: inner(5, 6) }
            ]
        );
        assert_eq!(body.anything.to_string(), r#"[1,{"x":null}]"#);
        assert_eq!(read(r#"{"name": "n", "inner": null}"#).unwrap().inner, None);
    }

    // [POOLCORE-170]
    #[test]
    fn a_whole_number_is_an_integer_however_it_is_written() {
        let of = |a: &str| {
            read(&format!(
                r#"{{"name": "n", "inner": {{"a": {a}, "b": 2}}}}"#
            ))
        };
        for a in ["7", "7.0", "0.7e1", "70e-1"] {
            assert_eq!(of(a).unwrap().inner, Some(Inner { a: 7, b: 2 }), "{a}");
        }
        for a in ["7.5", "256.0", "-1.0", "1e300"] {
            assert!(of(a).unwrap_err().starts_with("inner.a: invalid"), "{a}");
        }
    }

    // [POOLCORE-170]
    #[test]
    fn objects_are_objects_and_say_each_name_once() {
        for (json, part) in [
            (r#"["n"]"#, "invalid type: sequence"),
            (
                r#"{"name": "n", "inner": [1, 2]}"#,
                "inner: invalid type: sequence, expected an object",
            ),
            (
                r#"{"name": "n", "kinds": [{"of": [1, 2]}]}"#,
                "expected an object",
            ),
            (
                r#"{"name": "n", "kinds": [{"with": [{"a": 1, "b": 2}]}]}"#,
                "expected an object",
            ),
            (
                r#"{"name": "n", "labels": {"k": "1", "k": "2"}}"#,
                "labels: duplicate field `k`",
            ),
            (
                r#"{"name": "n", "labels": {"k": "1", "\u006b": "2"}}"#,
                "duplicate field `k`",
            ),
            (r#"{"name": "n", "name": "m"}"#, "duplicate field `name`"),
            (
                r#"{"name": "n", "anything": {"x": [{"y": 1, "y": 2}]}}"#,
                "duplicate field `y`",
            ),
            (
                r#"{"name": "n", "labels": {"k": 1}}"#,
                "labels.k: invalid type: integer",
            ),
            (r#"{"name": "n", "nome": 1}"#, "unknown field `nome`"),
            (
                r#"{"name": "n", "kinds": [1]}"#,
                "kinds[0]: invalid type: integer `1`, expected `plain` or `of` or `with`",
            ),
            (
                r#"{"name": "n", "kinds": [null]}"#,
                "kinds[0]: invalid type: null, expected `plain` or",
            ),
            (
                r#"{"name": "n", "kinds": ["plane"]}"#,
                "kinds[0]: unknown variant `plane`, expected one of `plain`, `of`, `with`",
            ),
            (
                r#"{"name": "n", "kinds": [{"of": {"a": 1, "b": 2, "b": 3}}]}"#,
                "kinds[0].of: duplicate field `b`",
            ),
            (
                r#"{"name": "n", "kinds": [{"of": {"a": 1, "b": 300}}]}"#,
                "kinds[0].of.b: invalid value: integer `300`",
            ),
            (r#"{"name": "n"} x"#, "trailing characters"),
        ] {
            let error = read(json).expect_err(json);
            assert!(error.contains(part), "{json}: {error}");
        }
    }
}
