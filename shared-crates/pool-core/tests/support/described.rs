//! Checks of an API against its own OpenAPI description, for the tests of the daemons.

// A panic in a helper fails the test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Checks that `document` describes exactly the methods of the daemon at `addr` on each described path, and includes all
/// routes in `designed`.
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

/// Returns the methods that a path accepts, from the `Allow` header of the answer to an unsupported method.
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
        // axum answers HEAD wherever it answers GET.
        .filter(|method| method != "HEAD")
        .collect()
}

/// Validates an answer against its schema in the document.
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
    // A schema that allows anything would accept any answer, so it must refuse a bare number.
    assert!(
        schemas.validate(&json!(7), described).is_err(),
        "{method} {path} {status}"
    );
}
