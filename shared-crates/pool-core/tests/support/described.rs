//! An API held against its own description, for the tests of every daemon that has one.

// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Every route of the daemon at `addr` stands in `document`, those of `designed` among them, and nothing else does.
pub async fn every_route_is_described(addr: &str, document: &Value, designed: &[&str]) {
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let paths = document["paths"].as_object().unwrap();
    for route in designed {
        let (method, path) = route.split_once(' ').unwrap();
        let described = &paths[path][method.to_lowercase()];
        assert!(described.is_object(), "{route} is not described");
    }
    for (path, item) in paths {
        let methods = item.as_object().unwrap().keys();
        let described: BTreeSet<_> = methods.map(|method| method.to_uppercase()).collect();
        assert_eq!(taken(addr, path).await, described, "{path}");
    }
}

/// A method that a path does not take is answered with those that it does.
async fn taken(addr: &str, path: &str) -> BTreeSet<String> {
    let concrete = path.replace(['{', '}'], "");
    let request = format!("PATCH {concrete} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{path}: {answer}");
    assert!(
        answer.contains(r#""code":"METHOD_NOT_ALLOWED""#),
        "{path}: {answer}"
    );
    let allow = answer
        .lines()
        .find_map(|line| line.strip_prefix("allow: "))
        .unwrap();
    allow
        .split(',')
        .map(|method| method.trim().to_owned())
        // Every GET is a HEAD as well.
        .filter(|method| method != "HEAD")
        .collect()
}

/// Holds an answer against what the document says of it.
pub fn check(document: &Value, method: &str, path: &str, status: &str, answer: &Value) {
    let described = &document["paths"][path][method]["responses"][status]["content"]["application/json"]
        ["schema"];
    assert!(
        described.is_object(),
        "{method} {path} {status} has no schema: {answer}"
    );
    let mut schema = json!({"allOf": [described]});
    schema["components"] = document["components"].clone();
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler
        .add_resource("file:///answer.json", schema)
        .unwrap();
    let described = compiler
        .compile("file:///answer.json", &mut schemas)
        .unwrap();
    if let Err(fault) = schemas.validate(answer, described) {
        panic!("{method} {path}: {answer}\n{fault:#}");
    }
    // Described with care: a schema that allows anything would pass everything.
    assert!(
        schemas.validate(&json!(7), described).is_err(),
        "{method} {path} {status}"
    );
}
