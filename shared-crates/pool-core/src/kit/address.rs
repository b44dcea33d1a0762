//! Parsing of daemons' addresses as people write them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Deserializer, de};

/// The accepted forms of a daemon's address, as a hint.
pub const FORMS: &str =
    "write it like `http://127.0.0.1:8080`, `localhost:8080`, `:8080` or `8080`";

/// Parses the address of a daemon to call: a URL, `HOST:PORT`, `:PORT` or `PORT`, the last two on this host. Returns the
/// URL, without a slash at its end.
pub fn url(text: &str) -> Result<String, String> {
    let text = text.trim();
    match port(text)? {
        Some(0) => return Err("no daemon listens on port 0".to_owned()),
        Some(port) => return Ok(format!("http://127.0.0.1:{port}")),
        None => {}
    }
    let whole = if text.contains("://") {
        text.to_owned()
    } else {
        let authority = text.split('/').next().unwrap_or_default();
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
        if !has_port {
            return Err(format!("it has no port; {FORMS}"));
        }
        format!("http://{text}")
    };
    Ok(whole.trim_end_matches('/').to_owned())
}

/// Parses an address to listen on: `ADDRESS:PORT`, `localhost:PORT`, `:PORT` or `PORT`, the last three on loopback. For
/// clap's `value_parser`.
pub fn bind(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    if let Some(port) = port(text)? {
        return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    }
    let numeric = text
        .strip_prefix("localhost:")
        .map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
    numeric.parse().map_err(|_| {
        "write it like `127.0.0.1:8080`, `localhost:8080`, `:8080` or `8080`; give any other host by its IP address"
            .to_owned()
    })
}

/// Returns the port of `:PORT` or `PORT`; `None` for any other form.
fn port(text: &str) -> Result<Option<u16>, String> {
    let digits = text.strip_prefix(':').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let port = digits.parse();
    port.map(Some)
        .map_err(|_| format!("invalid port {digits}: ports are 0 to 65535"))
}

/// A visitor for an address in a settings file: a string, or a port number.
struct Written;

impl de::Visitor<'_> for Written {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address such as \"127.0.0.1:8080\", or a port")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_u64<E: de::Error>(self, port: u64) -> Result<String, E> {
        Ok(port.to_string())
    }
}

/// Parses a setting that [`bind`] accepts. For serde's `deserialize_with`.
pub fn deserialize_bind<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<SocketAddr, D::Error> {
    let text = deserializer.deserialize_any(Written)?;
    bind(&text).map_err(|reason| de::Error::custom(format!("`{text}`: {reason}")))
}

/// Parses a setting that is an IP address, or `localhost`. For serde's `deserialize_with`.
pub fn deserialize_ip<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "localhost" {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    text.parse()
        .map_err(|_| de::Error::custom(format!("`{text}` is not an IP address")))
}

/// Parses an optional setting that [`url`] accepts, and keeps its spelling. For serde's `deserialize_with`.
pub fn deserialize_url<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    struct Optional;
    impl<'de> de::Visitor<'de> for Optional {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            Written.expecting(f)
        }

        fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Self::Value, D::Error> {
            inner.deserialize_any(Written).map(Some)
        }
    }
    deserializer.deserialize_option(Optional)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-128]
    fn an_address_is_called_however_it_is_written() {
        for (text, expected) in [
            ("8080", "http://127.0.0.1:8080"),
            (":8080", "http://127.0.0.1:8080"),
            ("localhost:8080", "http://localhost:8080"),
            ("blep.local:8080", "http://blep.local:8080"),
            ("192.168.1.5:9200", "http://192.168.1.5:9200"),
            ("[::1]:8080", "http://[::1]:8080"),
            ("localhost:8080/", "http://localhost:8080"),
            (" http://127.0.0.1:8080/ ", "http://127.0.0.1:8080"),
            (
                "https://llorch.example/behind/a/proxy",
                "https://llorch.example/behind/a/proxy",
            ),
        ] {
            assert_eq!(url(text), Ok(expected.to_owned()), "{text}");
        }
        for text in [
            "localhost",
            "blep:",
            "",
            ":",
            "65536",
            ":99999",
            "blep:http",
        ] {
            assert!(url(text).is_err(), "{text}");
        }
        assert!(
            url("localhost")
                .unwrap_err()
                .contains("`localhost:8080`, `:8080` or `8080`")
        );
    }

    #[test] // [POOLCORE-128]
    fn an_address_to_listen_on_is_loopback_unless_it_names_another() {
        for (text, expected) in [
            ("8080", "127.0.0.1:8080"),
            (":0", "127.0.0.1:0"),
            ("localhost:8080", "127.0.0.1:8080"),
            ("0.0.0.0:8080", "0.0.0.0:8080"),
            ("[::1]:8080", "[::1]:8080"),
        ] {
            assert_eq!(bind(text), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in [
            "localhost",
            "blep:8080",
            "",
            "70000",
            "http://127.0.0.1:8080",
        ] {
            assert!(bind(text).is_err(), "{text}");
        }
    }
}
