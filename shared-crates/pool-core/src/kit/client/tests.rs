use super::*;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const EVENTS: &str = "event: queued\nid: 0.1\ndata: {\"a\":1}\n\n: a comment\n\nevent: token\r\nid: 1.2\r\ndata: {\"t\":\"é漢🦙\"}\r\n\r\ndata: line one\ndata: line two\n\nevent: shutdown\nretry: 1500\ndata: {}\n\n";

fn expected() -> Vec<ServerEvent> {
    let event = |event: &str, data: &str, id: Option<&str>, retry| ServerEvent {
        event: event.into(),
        data: data.into(),
        id: id.map(Into::into),
        retry,
    };
    vec![
        event("queued", "{\"a\":1}", Some("0.1"), None),
        event("token", "{\"t\":\"é漢🦙\"}", Some("1.2"), None),
        // An event without an id must not inherit the previous one: readers resume by ids.
        event("message", "line one\nline two", None, None),
        event("shutdown", "{}", None, Some(Duration::from_millis(1500))),
    ]
}

fn decoded(chunks: Vec<Result<Vec<u8>, io::Error>>) -> Events {
    decode(
        "http://test".into(),
        Duration::from_secs(60),
        stream::iter(chunks),
    )
}

#[tokio::test] // [POOLCORE-051]
async fn events_are_the_same_wherever_the_bytes_are_cut() {
    for size in 1..EVENTS.len() {
        let chunks = EVENTS
            .as_bytes()
            .chunks(size)
            .map(|chunk| Ok(chunk.to_vec()))
            .collect();
        let events: Vec<_> = decoded(chunks).map(Result::unwrap).collect().await;
        assert_eq!(events, expected(), "in pieces of {size}");
    }
    let marked = format!("\u{feff}{EVENTS}").into_bytes();
    assert_eq!(decoded(vec![Ok(marked)]).count().await, 4);
}

#[tokio::test] // [POOLCORE-052]
async fn a_broken_stream_gives_its_events_then_one_error() {
    let chunks = vec![
        Ok(EVENTS.as_bytes().to_vec()),
        Err(io::Error::other("reset")),
        Ok(EVENTS.as_bytes().to_vec()),
    ];
    let events: Vec<_> = decoded(chunks).collect().await;
    assert_eq!(events.len(), 5);
    assert!(
        matches!(&events[4], Err(ClientError::Broken { detail, .. }) if detail == "reset"),
        "{:?}",
        events[4]
    );

    let half = vec![Ok(b"data: cut off".to_vec())];
    assert_eq!(
        decoded(half).count().await,
        0,
        "an incomplete event is dropped"
    );
}

#[tokio::test] // [POOLCORE-052]
async fn a_silent_stream_times_out() {
    let bytes = stream::once(async { Ok::<_, io::Error>(b"data: a\n\n".to_vec()) })
        .chain(stream::pending());
    let events: Vec<_> = decode("http://test".into(), Duration::from_millis(50), bytes)
        .collect()
        .await;
    assert_eq!(events.len(), 2);
    assert!(matches!(events[1], Err(ClientError::Timeout { .. })));
}

/// Starts a server that answers one request with `answer`. Returns its URL, and a task that returns the request's head.
async fn answering(answer: String) -> (String, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let request = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    });
    (url, request)
}

fn answer(status: &str, kind: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nLocation: /v2/tasks/j\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn get(answer: String) -> Result<serde_json::Value, ClientError> {
    let (url, _request) = answering(answer).await;
    ApiClient::new(&url, None).unwrap().get("/path").await
}

#[tokio::test] // [POOLCORE-050]
async fn a_daemons_refusal_is_told_from_a_strangers_answer() {
    let body = r#"{"error":{"code":"QUEUE_FULL","message":"full","hint":"wait","correlation_id":"c","retriable":true,"retry_after_ms":5}}"#;
    let error = get(answer("429 Too Many Requests", "application/json", body))
        .await
        .unwrap_err();
    assert_eq!(
        (error.status(), error.hint().as_deref()),
        (Some(429), Some("wait"))
    );
    let api = error.api().unwrap();
    assert_eq!(
        (api.code.as_str(), api.retriable, api.retry_after_ms),
        ("QUEUE_FULL", true, Some(5))
    );

    let error = get(answer("502 Bad Gateway", "text/html", "<html>nginx</html>"))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ClientError::NotOurs { status: 502, detail, .. } if detail.contains("nginx")),
        "{error}"
    );
    let error = get(answer("200 OK", "text/html", "<html>hello</html>"))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ClientError::NotOurs { status: 200, .. }),
        "{error}"
    );
    // Redirects are not followed: they could send the token elsewhere.
    let error = get(answer("302 Found", "text/html", "")).await.unwrap_err();
    assert!(
        matches!(error, ClientError::NotOurs { status: 302, .. }),
        "{error}"
    );
}

#[tokio::test] // [POOLCORE-050]
async fn a_request_carries_token_correlation_id_and_query() {
    let (url, request) = answering(answer("200 OK", "application/json", "{}")).await;
    let client = ApiClient::new(&url, Some(Secret::new("tok")))
        .unwrap()
        .with_correlation_id("corr-1");
    let query = [("status", "queued"), ("model", "a&b")];
    let _: serde_json::Value = client
        .fetch(client.request(Method::GET, "/v2/tasks").query(&query))
        .await
        .unwrap();
    let request = request.await.unwrap();
    assert!(
        request.starts_with("GET /v2/tasks?status=queued&model=a%26b HTTP/1.1\r\n"),
        "{request}"
    );
    assert!(
        request.contains("authorization: Bearer tok\r\n")
            && request.contains("x-correlation-id: corr-1\r\n"),
        "{request}"
    );
    assert!(!format!("{client:?}").contains("tok\""));
}

#[tokio::test] // [POOLCORE-051]
async fn an_event_stream_keeps_its_headers_and_a_refusal_stays_one() {
    let (url, _request) = answering(answer("200 OK", "text/event-stream", EVENTS)).await;
    let client = ApiClient::new(&url, None).unwrap();
    let stream = client
        .events(client.request(Method::POST, "/v2/tasks").json("x"))
        .await
        .unwrap();
    assert_eq!(
        (stream.status(), stream.header("location")),
        (200, Some("/v2/tasks/j"))
    );
    let events: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert_eq!(events, expected());

    let body = r#"{"error":{"code":"NO_SUCH_JOB","message":"no job j"}}"#;
    let (url, _request) = answering(answer("404 Not Found", "application/json", body)).await;
    let client = ApiClient::new(&url, None).unwrap();
    let error = client
        .events(client.request(Method::GET, "/v2/tasks/j/events"))
        .await
        .unwrap_err();
    assert_eq!(error.api().unwrap().code, "NO_SUCH_JOB");
}

#[tokio::test] // [POOLCORE-053]
async fn an_unreachable_daemon_and_another_api_version_are_told() {
    let free = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let client = ApiClient::new(&format!("http://{free}"), None).unwrap();
    let error = client.get::<()>("/health").await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    for bad in ["127.0.0.1", "ftp://host", "http://", ""] {
        assert!(
            matches!(ApiClient::new(bad, None), Err(ClientError::BadUrl { .. })),
            "{bad}"
        );
    }

    let (url, _request) = answering(answer(
        "200 OK",
        "application/json",
        r#"{"name":"orchestratord","version":"9.0","api_version":3}"#,
    ))
    .await;
    let error = ApiClient::new(&url, None)
        .unwrap()
        .check_version(2)
        .await
        .unwrap_err();
    assert!(
        error.to_string().ends_with(
            "is orchestratord 9.0 and speaks API version 3; this program speaks version 2"
        ),
        "{error}"
    );
}

#[test]
fn an_address_with_a_password_is_refused_and_not_shown() {
    for address in [
        "http://user:secret@127.0.0.1:1",
        "http://secret@127.0.0.1:1",
        "user:secret@127.0.0.1:1",
        "secret@127.0.0.1",
    ] {
        let error = ApiClient::new(address, None).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(
            matches!(error, ClientError::BadUrl { .. }) && !shown.contains("secret"),
            "{shown}"
        );
    }
}
