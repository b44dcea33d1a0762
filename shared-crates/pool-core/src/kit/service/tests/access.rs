//! Correlation ids, tokens, hosts and origins.

use super::*;

#[tokio::test] // [POOLCORE-061]
async fn a_correlation_id_is_kept_if_it_is_one_and_made_otherwise() {
    let server = Server::start(options()).await;
    let echoed = |id: &str| server.send(format!("GET /health\nX-Correlation-Id: {id}"), "");
    assert_eq!(echoed("Run-42").await.headers["x-correlation-id"], "Run-42");
    let longest = "x".repeat(64);
    assert_eq!(echoed(&longest).await.headers["x-correlation-id"], longest);
    for bad in ["a b", "a_b", "é", &"x".repeat(65)] {
        let made = &echoed(bad).await.headers["x-correlation-id"];
        assert!(uuid::Uuid::parse_str(made).is_ok(), "{bad} became {made}");
    }
    let refused = server
        .send("GET /nowhere\nX-Correlation-Id: Run-43", "")
        .await;
    assert_eq!(refused.error()["correlation_id"], "Run-43");
}

#[tokio::test] // [POOLCORE-062]
async fn a_token_opens_what_it_is_for() {
    let scoped = ScopedToken {
        caller: "pool",
        secret: Secret::new("pool-token"),
        opens: |method, path| method == Method::GET && path == "/who",
    };
    let server = Server::start(ServiceOptions {
        token: Some(Secret::new("main-token")),
        scoped_tokens: vec![scoped.clone()],
        ..options()
    })
    .await;
    let who = |token: &str| server.send(format!("GET /who\nAuthorization: Bearer {token}"), "");
    assert_eq!(who("main-token").await.body, "Operator");
    assert_eq!(who("pool-token").await.body, "Scoped(\"pool\")");
    for wrong in ["wrong", "", "main-tokeN", &"x".repeat(5000)] {
        let answer = who(wrong).await;
        assert_eq!(
            (answer.refusal().0, answer.refusal().1.as_str()),
            (401, "UNAUTHORIZED"),
            "{wrong}"
        );
        assert!(
            answer.error()["hint"].is_string() && answer.headers["www-authenticate"] == "Bearer"
        );
    }
    assert_eq!(server.send("GET /who", "").await.status, 401);
    assert_eq!(
        server
            .send("GET /who\nAuthorization: Basic main-token", "")
            .await
            .status,
        401
    );
    // A path that needs no token, and paths that the pool's token does not open.
    assert_eq!(server.send("GET /health", "").await.status, 200);
    assert_eq!(
        server
            .send("GET /page?limit=1\nAuthorization: Bearer pool-token", "")
            .await
            .status,
        401
    );
    assert_eq!(server.send("GET /nowhere", "").await.status, 401);

    let only_scoped = Server::start(ServiceOptions {
        scoped_tokens: vec![scoped],
        ..options()
    })
    .await;
    assert_eq!(only_scoped.send("GET /who", "").await.status, 401);
    assert_eq!(only_scoped.send("GET /page?limit=1", "").await.status, 200);
}

#[tokio::test] // [POOLCORE-063]
async fn foreign_hosts_and_origins_need_a_token() {
    let server = Server::start(ServiceOptions {
        allowed_hosts: vec!["Blep.home.arpa".into()],
        ..options()
    })
    .await;
    let port = server.addr.port();
    for host in [
        "localhost",
        "LOCALHOST:9",
        "127.0.0.1",
        "[::1]:80",
        "blep.home.arpa",
    ] {
        assert_eq!(
            server
                .send(format!("GET /who\nHost: {host}"), "")
                .await
                .body,
            "Anonymous",
            "{host}"
        );
    }
    for host in [
        "evil.example",
        "localhost.evil.example",
        "10.1.2.3",
        "",
        "a b",
    ] {
        let answer = server.send(format!("GET /health\nHost: {host}"), "").await;
        assert_eq!(
            (answer.refusal().0, answer.refusal().1.as_str()),
            (403, "UNKNOWN_HOST"),
            "{host}"
        );
    }
    let from = |origin: &str| {
        server.send(
            format!("GET /who\nHost: 127.0.0.1:{port}\nOrigin: {origin}"),
            "",
        )
    };
    assert_eq!(from(&format!("http://127.0.0.1:{port}")).await.status, 200);
    for origin in [
        "http://evil.example",
        "http://127.0.0.1:1",
        "null",
        "file://",
    ] {
        let answer = from(origin).await;
        assert_eq!(
            (answer.refusal().0, answer.refusal().1.as_str()),
            (403, "FOREIGN_ORIGIN"),
            "{origin}"
        );
    }
    assert_eq!(
        server
            .send("GET /who\nSec-Fetch-Site: cross-site", "")
            .await
            .status,
        403
    );

    let server = Server::start(ServiceOptions {
        token: Some(Secret::new("t")),
        ..options()
    })
    .await;
    let answer = server.send("GET /who\nHost: tunnel.example\nOrigin: http://console.example\nAuthorization: Bearer t", "").await;
    assert_eq!(answer.body, "Operator");
}

#[tokio::test] // [POOLCORE-070]
async fn a_request_names_its_server_once() {
    let token = Secret::new("right");
    let server = Server::start(ServiceOptions {
        token: Some(token),
        ..options()
    })
    .await;
    let addr = server.addr;
    for (line, headers) in [
        ("GET /version", format!("Host: {addr}\r\nHost: {addr}")),
        (
            "GET /version",
            format!("Host: {addr}\r\nHost: evil.example"),
        ),
        ("GET http://evil.example/version", format!("Host: {addr}")),
    ] {
        let request = format!(
            "{line} HTTP/1.1\r\n{headers}\r\nAuthorization: Bearer right\r\nConnection: close\r\n\r\n"
        );
        let (status, code, _) = server.raw(&request).await.refusal();
        assert_eq!(
            (status, code.as_str()),
            (400, "INVALID_REQUEST"),
            "{request}"
        );
    }
    let same = format!("GET http://{addr}/version\nAuthorization: Bearer right");
    assert_eq!(server.send(same, "").await.status, 200);
}
