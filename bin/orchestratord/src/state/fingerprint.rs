//! The digest by which an `Idempotency-Key` recognizes its request.
//!
//! The digest is made of a canonical form that this module writes itself: the fields of the validated request, sorted by name,
//! without those at their defaults, every number in one notation. So a digest depends neither on how a client words its request nor
//! on the features of a JSON library, and a new field changes the digests only of requests that use it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use orchestrator_core::api::tasks::{DEFAULT_MAX_ATTEMPTS, DEFAULT_MAX_TOKENS};
use orchestrator_core::job::{Input, JobSpec, Placement, Priority};
use pool_core::api::worker::{Message, Role, Sampling};
use pool_core::kit::hex::hex;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::spec::StoredSpecRef;

/// Digests of a request, in all forms that a store may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    current: String,
    earlier: String,
}

impl Fingerprint {
    /// Computes the digests of a request. `seed_given` is false for a drawn seed, which is not part of the request.
    ///
    /// # Errors
    ///
    /// Fails if the request has no JSON form.
    pub fn of(spec: &JobSpec, seed_given: bool) -> serde_json::Result<Self> {
        let canonical = Canonical::of(spec, seed_given);
        Ok(Self {
            current: format!("2:{}", canonical.digest()),
            earlier: earlier_digest(spec, seed_given)?,
        })
    }

    /// Returns the digest to store. It begins with the version of the form.
    pub fn as_str(&self) -> &str {
        &self.current
    }

    /// Returns whether a stored digest is of the same request. No digest of another form begins with this version.
    pub fn matches(&self, stored: &str) -> bool {
        stored == self.current || stored == self.earlier
    }
}

/// Returns the digest that builds before version 2 stored, without a version: that of the request's JSON. Databases hold such
/// digests for as long as they keep jobs, and a client must get its job by its key after an update, too.
fn earlier_digest(spec: &JobSpec, seed_given: bool) -> serde_json::Result<String> {
    let mut asked = serde_json::to_value(StoredSpecRef(spec))?;
    let sampling = spec.sampling.for_worker();
    asked["sampling"] = json!({
        // In 64 bits, because the text of a 32-bit number depends on a feature of the JSON library.
        "temperature": f64::from(sampling.temperature),
        "top_p": f64::from(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": f64::from(sampling.min_p),
        "repetition_penalty": f64::from(sampling.repetition_penalty),
    });
    if !seed_given {
        asked["seed"] = Value::Null;
    }
    // Without `preserve_order`, objects are sorted anyway.
    asked.sort_all_objects();
    Ok(hex(&Sha256::digest(asked.to_string())))
}

/// The fields of a request that are not at their defaults, by name. An item of a list or a map is a field of its own.
#[derive(Default)]
struct Canonical<'a>(BTreeMap<String, Cow<'a, str>>);

impl<'a> Canonical<'a> {
    fn of(spec: &'a JobSpec, seed_given: bool) -> Self {
        // Without `..`: a new field has to be put here, or two requests that differ in it would count as the same.
        let JobSpec {
            model,
            input,
            raw,
            allow_special,
            system,
            sampling,
            max_tokens,
            stop,
            seed,
            priority,
            session_id,
            timeout_ms,
            max_attempts,
            placement: Placement { pool, device },
            labels,
        } = spec;
        // In the precision of workers: requests that they can't tell apart are the same.
        let Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
        } = sampling.for_worker();
        let default = Sampling::default();

        let mut form = Self::default();
        form.put("model", model.to_string());
        match input {
            Input::Prompt(text) => form.put("prompt", text),
            Input::Messages(messages) => {
                for (n, Message { role, content }) in messages.iter().enumerate() {
                    let role = match role {
                        Role::System => "system",
                        Role::User => "user",
                        Role::Assistant => "assistant",
                    };
                    form.put(format!("messages.{n}.role"), role);
                    form.put(format!("messages.{n}.content"), content);
                }
            }
        }
        form.put_unless("raw", *raw, false);
        form.put_unless("allow_special", *allow_special, false);
        form.put_some("system", system.as_deref());
        form.put_float("temperature", temperature, default.temperature);
        form.put_float("top_p", top_p, default.top_p);
        form.put_unless("top_k", top_k, default.top_k);
        form.put_float("min_p", min_p, default.min_p);
        form.put_float(
            "repetition_penalty",
            repetition_penalty,
            default.repetition_penalty,
        );
        form.put_unless("max_tokens", *max_tokens, DEFAULT_MAX_TOKENS);
        for (n, text) in stop.iter().enumerate() {
            form.put(format!("stop.{n}"), text);
        }
        form.put_some("seed", seed_given.then(|| seed.to_string()));
        form.put_unless("priority", *priority, Priority::default());
        form.put_some("session_id", session_id.as_deref());
        form.put_some("timeout_ms", timeout_ms.map(|ms| ms.to_string()));
        form.put_unless("max_attempts", *max_attempts, DEFAULT_MAX_ATTEMPTS);
        form.put_some("placement.pool", pool.as_deref());
        form.put_some("placement.device", device.map(|device| device.to_string()));
        for (key, value) in labels {
            form.put(format!("labels.{key}"), value);
        }
        form
    }

    fn put(&mut self, name: impl Into<String>, value: impl Into<Cow<'a, str>>) {
        self.0.insert(name.into(), value.into());
    }

    fn put_some(&mut self, name: &str, value: Option<impl Into<Cow<'a, str>>>) {
        if let Some(value) = value {
            self.put(name, value);
        }
    }

    fn put_unless<T: PartialEq + ToString>(&mut self, name: &str, value: T, default: T) {
        if value != default {
            self.put(name, value.to_string());
        }
    }

    /// Puts a number by its bits, of which zero has only the positive ones.
    fn put_float(&mut self, name: &str, value: f32, default: f32) {
        let bits = |value: f32| (value + 0.0).to_bits();
        self.put_unless(name, bits(value), bits(default));
    }

    /// Returns the SHA-256 of the form. The lengths make the form unambiguous whatever the texts contain.
    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (name, value) in &self.0 {
            hash.update(format!("{}:{name}={}:", name.len(), value.len()));
            hash.update(value.as_bytes());
        }
        hex(&hash.finalize())
    }
}

#[cfg(test)]
mod tests {
    use orchestrator_core::TaskSubmitRequest;
    use proptest::prelude::*;

    use super::*;
    use crate::state::tests::EARLIER_DIGEST;

    fn fingerprint(request: &str) -> Fingerprint {
        let request: TaskSubmitRequest = serde_json::from_str(request).unwrap();
        let seed_given = request.seed.is_some();
        Fingerprint::of(&request.validate().unwrap(), seed_given).unwrap()
    }

    fn of(request: &Value) -> Fingerprint {
        fingerprint(&request.to_string())
    }

    /// A request with all its fields.
    fn full() -> Value {
        json!({
            "model": "file:/models/m.gguf",
            "messages": [{"role": "user", "content": "h\u{e9} \"\n"}, {"role": "assistant", "content": "ho"}],
            "allow_special": true, "system": "s", "max_tokens": 8, "temperature": 0.1, "top_p": 0.9, "top_k": 4,
            "min_p": 1e-7, "repetition_penalty": 1.1, "stop": ["x", "y"], "seed": u64::MAX, "priority": "batch",
            "session_id": "a", "timeout_ms": 1000, "max_attempts": 2,
            "placement": {"pool": "mac", "device": "cuda:1"}, "labels": {"team": "a", "a": "team"}
        })
    }

    /// Digests as the last build before version 2 stored them, with their requests.
    fn earlier() -> [(Value, &'static str); 2] {
        [
            (json!({"model": "m", "prompt": "p"}), EARLIER_DIGEST),
            (
                full(),
                "4baa87f32dfd728a4724eac17faacc13c0b683f3bbae3e8bdd3717ed9990d122",
            ),
        ]
    }

    // [ORCHD-249] P2
    #[test]
    fn digests_of_earlier_builds_name_their_requests() {
        for (request, stored) in earlier() {
            assert!(of(&request).matches(stored), "{request}");
            let mut other = request.clone();
            other["max_tokens"] = json!(9);
            assert!(!of(&other).matches(stored), "{other}");
        }
        let [(_, plain), (full, _)] = earlier();
        assert!(!of(&full).matches(plain));
    }

    // [ORCHD-249] P2: a changed digest would refuse the keys of this build after an update.
    #[test]
    fn digests_of_this_version_keep_their_form() {
        let plain = json!({"model": "m", "prompt": "p"});
        let digests = [
            (
                plain,
                "2:8c8c0a45cc602bae22dbf355fa5d6454e88744ef4fa58fa1a07318c1949ffb7a",
            ),
            (
                full(),
                "2:be8deb19fa53eb3722ee58c3c5e0df6e337839397a804433ae405251073509b9",
            ),
        ];
        for (request, stored) in digests {
            assert_eq!(of(&request).as_str(), stored, "{request}");
            assert!(of(&request).matches(stored));
            // The same digest by the rules of a later build says nothing.
            assert!(!of(&request).matches(&stored.replacen('2', "3", 1)));
            assert!(!of(&request).matches(&stored[2..]));
        }
    }

    // [ORCHD-014] P2
    #[test]
    fn absent_fields_are_those_at_their_defaults() {
        let plain = fingerprint(r#"{"model": "m", "prompt": "p"}"#);
        for same in [
            r#""temperature": 0.7"#,
            r#""temperature": 7e-1, "top_p": 1, "top_k": 0, "min_p": -0.0, "repetition_penalty": 1.00"#,
            r#""temperature": 0.70000001, "top_p": 1.0, "min_p": 0"#,
            r#""max_tokens": 256, "max_attempts": 3, "priority": "interactive""#,
            r#""raw": false, "allow_special": false, "stop": [], "labels": {}, "placement": {}"#,
            r#""system": null, "seed": null, "session_id": null, "timeout_ms": null, "placement": null"#,
            r#""max_tokens": null, "temperature": null, "placement": {"pool": null, "device": null}"#,
        ] {
            let worded = fingerprint(&format!(r#"{{{same}, "prompt": "p", "model": "m"}}"#));
            assert_eq!(worded.as_str(), plain.as_str(), "{same}");
        }
    }

    // [ORCHD-014] P2
    #[test]
    fn requests_that_differ_have_different_digests() {
        let mut found = BTreeMap::new();
        for fields in [
            r#""prompt": "p""#,
            r#""prompt": "q""#,
            r#""messages": [{"role": "user", "content": "p"}]"#,
            r#""messages": [{"role": "system", "content": "p"}]"#,
            r#""messages": [{"role": "user", "content": "p"}, {"role": "user", "content": "p"}]"#,
            r#""prompt": "p", "raw": true"#,
            r#""prompt": "p", "allow_special": true"#,
            r#""prompt": "p", "system": """#,
            r#""prompt": "p", "system": "s""#,
            r#""prompt": "p", "max_tokens": 257"#,
            r#""prompt": "p", "temperature": 0"#,
            r#""prompt": "p", "temperature": 0.71"#,
            r#""prompt": "p", "top_p": 0.5"#,
            r#""prompt": "p", "min_p": 0.5"#,
            r#""prompt": "p", "top_k": 1"#,
            r#""prompt": "p", "repetition_penalty": 0.5"#,
            r#""prompt": "p", "stop": ["a", "b"]"#,
            r#""prompt": "p", "stop": ["b", "a"]"#,
            r#""prompt": "p", "stop": ["ab"]"#,
            r#""prompt": "p", "stop": ["a6:stop.1=1:b"]"#,
            r#""prompt": "p", "seed": 0"#,
            r#""prompt": "p", "seed": 18446744073709551615"#,
            r#""prompt": "p", "seed": 18446744073709551614"#,
            r#""prompt": "p", "priority": "batch""#,
            r#""prompt": "p", "session_id": "a""#,
            r#""prompt": "p", "timeout_ms": 1"#,
            r#""prompt": "p", "max_attempts": 1"#,
            r#""prompt": "p", "placement": {"pool": "cpu"}"#,
            r#""prompt": "p", "placement": {"device": "cpu"}"#,
            r#""prompt": "p", "labels": {"a": "b"}"#,
            r#""prompt": "p", "labels": {"b": "a"}"#,
            r#""prompt": "p", "labels": {"a=1:b": "c"}"#,
            r#""prompt": "p", "labels": {"a": "b", "c": "d"}"#,
        ] {
            let request = fingerprint(&format!(r#"{{"model": "m", {fields}}}"#));
            let other = found.insert(request.as_str().to_owned(), fields);
            assert_eq!(other, None, "{fields}");
        }
    }

    /// Returns the JSON of a value with the names of every object in an order that depends on `seed`.
    fn worded(value: &Value, seed: u64) -> String {
        match value {
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                fields.sort_by_key(|(name, _)| Sha256::digest(format!("{seed} {name}")));
                let fields = fields
                    .into_iter()
                    .map(|(name, value)| format!("{}: {}", json!(name), worded(value, seed)));
                format!("{{ {} }}", fields.collect::<Vec<_>>().join(" ,"))
            }
            Value::Array(items) => {
                let items = items.iter().map(|item| worded(item, seed));
                format!("[{}]", items.collect::<Vec<_>>().join(",\n"))
            }
            other => other.to_string(),
        }
    }

    proptest! {
        // [ORCHD-014] P2
        #[test]
        fn the_order_of_names_makes_no_difference(
            seed in any::<u64>(),
            left_out in proptest::sample::subsequence(
                full().as_object().unwrap().keys().cloned().collect::<Vec<_>>(), 0..=18)
        ) {
            let mut request = full();
            let fields = request.as_object_mut().unwrap();
            fields.retain(|name, _| matches!(name.as_str(), "model" | "messages") || !left_out.contains(name));
            prop_assert_eq!(fingerprint(&worded(&request, seed)), of(&request));
        }
    }
}
