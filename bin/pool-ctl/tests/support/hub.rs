//! A stand-in for the hub: a server on this host that implements the hub's protocol as needed for `hf download` of one file,
//! and misbehaves on request.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, Response, StatusCode, header};
use axum::routing::any;
use tokio::runtime::Runtime;

use super::sha256;

/// Commit of all files served.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Bytes sent at a time.
const PIECE: usize = 256 * 1024;

/// Behaviour of the server, which may change at any time.
#[derive(Clone)]
pub struct Behaviour {
    /// Content of every file.
    pub content: Bytes,
    /// Entity tag that the server announces.
    pub etag: String,
    /// Position in the file after which nothing is sent, with the connection left open.
    pub stall_at: Option<usize>,
    /// True to break the connection at that position instead.
    pub cut: bool,
    /// True to serve ranges.
    pub ranges: bool,
    /// Status and `X-Error-Code` with which every request is answered.
    pub refuses: Option<(StatusCode, &'static str)>,
    /// Token that every request must have.
    pub token: Option<&'static str>,
    /// True to redirect to another host for the bytes.
    pub elsewhere: bool,
    /// Pause between two pieces.
    pub pause: Duration,
    /// Files in the listing.
    pub files: Vec<&'static str>,
}

/// A request to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub method: Method,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Seen {
    asked: Vec<Asked>,
    served_bytes: u64,
}

#[derive(Clone)]
struct Stand {
    behaviour: Arc<Mutex<Behaviour>>,
    seen: Arc<Mutex<Seen>>,
    port: u16,
}

/// A running stand-in for the hub. Dropping it stops the server.
pub struct Hub {
    stand: Stand,
    _runtime: Runtime,
}

impl Hub {
    /// Serves `content` as any file of any repository.
    pub fn serving(content: Vec<u8>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let stand = Stand {
            behaviour: Arc::new(Mutex::new(Behaviour {
                etag: sha256(&content),
                content: content.into(),
                stall_at: None,
                cut: false,
                ranges: true,
                refuses: None,
                token: None,
                elsewhere: false,
                pause: Duration::ZERO,
                files: vec!["sub/tiny.gguf", "README.md"],
            })),
            seen: Arc::default(),
            port: listener.local_addr().unwrap().port(),
        };
        let routes = Router::new()
            .route("/{org}/{repo}/resolve/{revision}/{*file}", any(resolve))
            .route("/api/models/{org}/{repo}/revision/{revision}", any(list))
            .route("/elsewhere/{*file}", any(bytes))
            .with_state(stand.clone());
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self {
            stand,
            _runtime: runtime,
        }
    }

    /// Returns the server's address, for `HF_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.stand.port)
    }

    pub fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        self.stand.behaviour.lock().unwrap()
    }

    /// Returns the bytes of content sent since the last call.
    pub fn take_served(&self) -> u64 {
        std::mem::take(&mut self.stand.seen.lock().unwrap().served_bytes)
    }

    /// Returns the requests since the last call of [`Hub::take_asked`].
    pub fn asked(&self) -> Vec<Asked> {
        self.stand.seen.lock().unwrap().asked.clone()
    }

    /// Returns the requests since the last call.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.stand.seen.lock().unwrap().asked)
    }
}

impl Stand {
    fn note(&self, request: &Request) -> Behaviour {
        let header = |name| {
            let value: &HeaderValue = request.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        self.seen.lock().unwrap().asked.push(Asked {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            range: header(header::RANGE),
            authorization: header(header::AUTHORIZATION),
        });
        self.behaviour.lock().unwrap().clone()
    }
}

/// Returns the refusal of a request, if the behaviour demands one.
fn refusal(behaviour: &Behaviour, request: &Request) -> Option<Response<Body>> {
    let given = request.headers().get(header::AUTHORIZATION);
    let wanted = behaviour.token.map(|token| format!("Bearer {token}"));
    let stranger = wanted.is_some_and(|wanted| given.is_none_or(|given| *given != *wanted));
    let (status, code) = if stranger {
        (StatusCode::UNAUTHORIZED, "GatedRepo")
    } else {
        behaviour.refuses?
    };
    let answer = Response::builder().status(status);
    Some(
        answer
            .header("X-Error-Code", code)
            .header("X-Error-Message", "said by the hub stand-in")
            .body(Body::empty())
            .unwrap(),
    )
}

async fn list(State(stand): State<Stand>, request: Request) -> Response<Body> {
    let behaviour = stand.note(&request);
    if let Some(refusal) = refusal(&behaviour, &request) {
        return refusal;
    }
    let siblings: Vec<_> = behaviour
        .files
        .iter()
        .map(|name| serde_json::json!({ "rfilename": name }))
        .collect();
    let body = serde_json::json!({ "id": "org/repo", "sha": COMMIT, "siblings": siblings });
    Response::new(Body::from(body.to_string()))
}

async fn resolve(
    State(stand): State<Stand>,
    Path((_, _, _, file)): Path<(String, String, String, String)>,
    request: Request,
) -> Response<Body> {
    let behaviour = stand.note(&request);
    if let Some(refusal) = refusal(&behaviour, &request) {
        return refusal;
    }
    if !behaviour.elsewhere {
        return serve(
            &stand,
            &behaviour,
            &request,
            &format!("\"{}\"", behaviour.etag),
        );
    }
    Response::builder()
        .status(StatusCode::FOUND)
        .header("X-Repo-Commit", COMMIT)
        .header("X-Linked-Etag", format!("\"{}\"", behaviour.etag))
        .header("X-Linked-Size", behaviour.content.len())
        // To a client, another name of the same machine is another host.
        .header(
            header::LOCATION,
            format!("http://localhost:{}/elsewhere/{file}", stand.port),
        )
        .body(Body::empty())
        .unwrap()
}

async fn bytes(State(stand): State<Stand>, request: Request) -> Response<Body> {
    let behaviour = stand.note(&request);
    // The host that stores the bytes has entity tags of its own.
    serve(&stand, &behaviour, &request, "\"another tag\"")
}

fn serve(stand: &Stand, behaviour: &Behaviour, request: &Request, etag: &str) -> Response<Body> {
    let size = behaviour.content.len();
    let range = request.headers().get(header::RANGE);
    let first: Option<usize> = range
        .filter(|_| behaviour.ranges)
        .and_then(|value| value.to_str().unwrap().strip_prefix("bytes="))
        .and_then(|range| range.split('-').next()?.parse().ok());
    let fresh = request
        .headers()
        .get(header::IF_RANGE)
        .is_none_or(|tag| *tag == *etag);
    let first = first.filter(|_| fresh);
    let mut answer = Response::builder()
        .header("X-Repo-Commit", COMMIT)
        .header(header::ETAG, etag);
    if behaviour.ranges {
        answer = answer.header(header::ACCEPT_RANGES, "bytes");
    }
    if let Some(first) = first {
        if first >= size {
            return answer
                .status(StatusCode::RANGE_NOT_SATISFIABLE)
                .body(Body::empty())
                .unwrap();
        }
        answer = answer.status(StatusCode::PARTIAL_CONTENT).header(
            header::CONTENT_RANGE,
            format!("bytes {first}-{}/{size}", size - 1),
        );
    }
    let first = first.unwrap_or(0);
    answer = answer.header(header::CONTENT_LENGTH, size - first);
    let body = if request.method() == Method::HEAD {
        Body::empty()
    } else {
        Body::from_stream(pieces(stand.clone(), first))
    };
    answer.body(body).unwrap()
}

/// Streams the content from `position` on, according to the current behaviour.
fn pieces(
    stand: Stand,
    mut position: usize,
) -> impl futures_util::Stream<Item = Result<Bytes, Box<dyn std::error::Error + Send + Sync>>> {
    async_stream::stream! {
        loop {
            let now = stand.behaviour.lock().unwrap().clone();
            let size = now.content.len();
            let end = now.stall_at.map_or(size, |stall| stall.clamp(position, size));
            if position == size {
                return;
            }
            if position == end {
                if now.cut {
                    yield Err("cut".into());
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            let next = end.min(position + PIECE);
            stand.seen.lock().unwrap().served_bytes += (next - position) as u64;
            yield Ok(now.content.slice(position..next));
            position = next;
            tokio::time::sleep(now.pause).await;
        }
    }
}
