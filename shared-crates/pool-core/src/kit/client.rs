//! Client of our HTTP APIs: tokens, the error envelope, event streams.
//!
//! The client never retries: only the caller knows which requests may be repeated.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use eventsource_stream::{EventStreamError, Eventsource};
use futures_util::{Stream, StreamExt, stream};
pub use reqwest::Method;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::kit::address;
use crate::kit::clock::{self, Patience};
use crate::kit::errors::with_causes;
use crate::kit::secret::Secret;
use crate::kit::units::human_duration;
use crate::kit::wire::VersionInfo;
use crate::kit::wire::{ErrorBody, ErrorEnvelope};

/// Time limit for connecting. Our daemons run on the same host or the local network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Lifetime of an idle connection, shorter than a daemon's own limit, so that its descriptor is free again soon.
const KEPT_IDLE: Duration = Duration::from_secs(5);
/// Default time limit for an answer, including its body.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Default limit on the silence of an event stream: four intervals of the comments that daemons send every 15 seconds.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Most characters of an unexpected answer that an error shows.
const DETAIL_CHARS: usize = 200;

/// An error of a call to a daemon.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// An address that can't be used, with the reason.
    #[error("`{url}` is not a daemon address: {detail}")]
    BadUrl {
        /// The address, without a user or password that it may contain.
        url: String,
        /// The problem with the address.
        detail: String,
    },
    /// A connection that failed, or broke before an answer.
    #[error("could not reach {url}")]
    Unreachable {
        /// The URL called.
        url: String,
        /// The transport's error, without the URL.
        source: reqwest::Error,
    },
    /// A refusal by the daemon, with its reason.
    #[error("{}", error.message)]
    Api {
        /// The HTTP status of the refusal.
        status: u16,
        /// The error from the envelope.
        error: Box<ErrorBody>,
    },
    /// An answer that none of our daemons would give.
    #[error("{url} answered {status}, but not like a llama-orch daemon: {detail}")]
    NotOurs {
        /// The URL called.
        url: String,
        /// The HTTP status of the answer.
        status: u16,
        /// The beginning of the answer, with the parser's error if there is one.
        detail: String,
    },
    /// A connection that broke during an event stream.
    #[error("the event stream from {url} broke off: {detail}")]
    Broken {
        /// The URL called.
        url: String,
        /// The cause of the break.
        detail: String,
    },
    /// No answer in time, or too long a silence in a stream.
    #[error("{url} did not answer within {}", human_duration(*after))]
    Timeout {
        /// The URL called.
        url: String,
        /// The time limit that passed.
        after: Duration,
    },
    /// A daemon with a different version of the API.
    #[error(
        "{url} is {name} {version} and speaks API version {theirs}; this program speaks version {ours}"
    )]
    VersionMismatch {
        /// The base URL of the daemon.
        url: String,
        /// The daemon's name, from `/version`.
        name: String,
        /// The daemon's own version.
        version: String,
        /// The API version of the daemon.
        theirs: u32,
        /// The API version of this program.
        ours: u32,
    },
}

impl ClientError {
    /// Returns a remedy, if there is one. For a refusal this is the daemon's own hint.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Api { error, .. } => return error.hint.clone(),
            Self::BadUrl { .. } => address::FORMS,
            Self::Unreachable { url, .. } if url.starts_with("https://") => {
                "check that this is the address of a TLS proxy; the daemons themselves speak plain HTTP: `http://...`"
            }
            Self::Unreachable { .. } => {
                "check that the daemon is running and that this is its address"
            }
            Self::Timeout { .. } => {
                "the daemon may be suspended or overloaded: check its process and log on its host"
            }
            Self::NotOurs { .. } => "another program may be listening at this address",
            Self::VersionMismatch { .. } => "install the same release on both sides",
            Self::Broken { .. } => return None,
        };
        Some(hint.to_owned())
    }

    /// Returns the error from the envelope; `None` unless this is a refusal by the daemon.
    pub fn api(&self) -> Option<&ErrorBody> {
        match self {
            Self::Api { error, .. } => Some(error),
            _ => None,
        }
    }

    /// Returns the HTTP status; `None` without a complete answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Api { status, .. } | Self::NotOurs { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// A client of one daemon. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct ApiClient {
    http: reqwest::Client,
    base: String,
    token: Option<Secret>,
    correlation_id: Option<String>,
    answer_timeout: Duration,
    idle_timeout: Duration,
}

impl ApiClient {
    /// Returns a client of the daemon at `base_url` that sends `token` with every request.
    pub fn new(base_url: &str, token: Option<Secret>) -> Result<Self, ClientError> {
        let bad = |detail: String| ClientError::BadUrl {
            // Text before an `@` may contain a password.
            url: base_url.rsplit('@').next().unwrap_or_default().to_owned(),
            detail,
        };
        let base = address::url(base_url).map_err(bad)?;
        let url = Url::parse(&base).map_err(|error| bad(error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(bad("it must begin with http:// or https://".to_owned()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            // Addresses are shown and logged, so a password must not appear even in this error.
            return Err(ClientError::BadUrl {
                url: url.host_str().unwrap_or_default().to_owned(),
                detail:
                    "it must not contain a user name or password; a token goes into the settings"
                        .to_owned(),
            });
        }
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(KEPT_IDLE)
            .tcp_nodelay(true)
            // A proxy from the environment is meant for the internet, not for local daemons; and a redirect could
            // carry the token to another server.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none());
        if url.scheme() == "http" {
            // Plain HTTP needs no certificates, and a minimal host may have none to load.
            builder = builder.tls_certs_only([]);
        }
        Ok(Self {
            http: builder.build().map_err(|error| bad(error.to_string()))?,
            base,
            token,
            correlation_id: None,
            answer_timeout: ANSWER_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
        })
    }

    /// Returns a client of another daemon that shares this client's connection pool. `base_url` must be a complete URL
    /// without a slash at its end: it is not checked.
    pub fn at(&self, base_url: impl Into<String>, token: Option<Secret>) -> Self {
        Self {
            base: base_url.into(),
            token,
            ..self.clone()
        }
    }

    /// Sets an `id` that is sent as `X-Correlation-Id` with every request.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// Sets the time limit for a whole answer, or for the beginning of an event stream. Default 30 seconds.
    #[must_use]
    pub fn with_answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    /// Sets the time without a byte after which an event stream counts as broken. Default 60 seconds.
    #[must_use]
    pub fn with_idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Returns the daemon's URL, without a slash at its end.
    pub fn base_url(&self) -> &str {
        &self.base
    }

    /// Begins a request to `path` (such as `/v2/tasks`), to be completed and passed to [`ApiClient::fetch`],
    /// [`ApiClient::events`] or [`ApiClient::relay`].
    pub fn request(&self, method: Method, path: &str) -> Request {
        let url = format!("{}{path}", self.base);
        let mut builder = self.http.request(method, &url);
        if let Some(token) = &self.token
            && let Ok(mut value) = HeaderValue::try_from(format!("Bearer {}", token.expose()))
        {
            value.set_sensitive(true);
            builder = builder.header(AUTHORIZATION, value);
        }
        if let Some(id) = &self.correlation_id {
            builder = builder.header("x-correlation-id", id);
        }
        Request { url, builder }
    }

    /// Sends a `GET` and reads a JSON answer.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.fetch(self.request(Method::GET, path)).await
    }

    /// Sends a `POST` with a JSON body and reads a JSON answer.
    pub async fn post<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.fetch(self.request(Method::POST, path).json(body))
            .await
    }

    /// Sends a `DELETE` and reads a JSON answer.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.fetch(self.request(Method::DELETE, path)).await
    }

    /// Sends a `GET` and returns the answer's text unparsed.
    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        Ok(self.answer(self.request(Method::GET, path)).await?.body)
    }

    /// Sends a request and reads a JSON answer. An empty answer (204) reads as `null`, so `T` may be `()`.
    pub async fn fetch<T: DeserializeOwned>(&self, request: Request) -> Result<T, ClientError> {
        let url = request.url.clone();
        let answer = self.answer(request).await?;
        let text = if answer.body.is_empty() {
            "null"
        } else {
            &answer.body
        };
        serde_json::from_str(text).map_err(|error| ClientError::NotOurs {
            url,
            status: answer.status.as_u16(),
            detail: format!("{error} in {}", beginning(&answer.body)),
        })
    }

    /// Fails unless the daemon's API version is `expected`, the version this program was built for.
    pub async fn check_version(&self, expected: u32) -> Result<VersionInfo, ClientError> {
        let info: VersionInfo = self.get("/version").await?;
        if info.api_version == expected {
            return Ok(info);
        }
        Err(ClientError::VersionMismatch {
            url: self.base.clone(),
            name: info.name,
            version: info.version,
            theirs: info.api_version,
            ours: expected,
        })
    }

    /// Opens an event stream. An answer of 204 is a stream without events: the reader already has all of them.
    pub async fn events(&self, request: Request) -> Result<EventStream, ClientError> {
        let url = request.url.clone();
        let sent = request.builder.header(ACCEPT, "text/event-stream").send();
        let response = clock::timeout(self.answer_timeout, sent)
            .await
            .map_err(|_| ClientError::Timeout {
                url: url.clone(),
                after: self.answer_timeout,
            })?
            .map_err(|error| self.failed(&url, error))?;
        let is_stream = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| value.starts_with("text/event-stream"));
        let is_over = response.status() == StatusCode::NO_CONTENT;
        if !response.status().is_success() || !(is_stream || is_over) {
            let answer = self.read(&url, response).await?;
            return Err(ClientError::NotOurs {
                url,
                status: answer.status.as_u16(),
                detail: beginning(&answer.body),
            });
        }
        let headers = response.headers().clone();
        let status = response.status();
        Ok(EventStream {
            status,
            headers,
            inner: decode(url, self.idle_timeout, response.bytes_stream()),
        })
    }

    /// Sends a request on behalf of another client, and returns its answer unchanged and unbuffered, whatever the status.
    pub async fn relay(&self, request: Request) -> Result<RelayedAnswer, ClientError> {
        let url = request.url;
        let sent = request.builder.send();
        let response = clock::timeout(self.answer_timeout, sent)
            .await
            .map_err(|_| ClientError::Timeout {
                url: url.clone(),
                after: self.answer_timeout,
            })?
            .map_err(|error| self.failed(&url, error))?;
        Ok(RelayedAnswer {
            url,
            idle_timeout: self.idle_timeout,
            response,
        })
    }

    async fn answer(&self, request: Request) -> Result<Answer, ClientError> {
        let (url, limit) = (request.url, self.answer_timeout);
        let answered = async {
            let sent = request.builder.send().await;
            self.read(&url, sent.map_err(|error| self.failed(&url, error))?)
                .await
        };
        clock::timeout(limit, answered)
            .await
            .map_err(|_| ClientError::Timeout {
                url: url.clone(),
                after: limit,
            })?
    }

    async fn read(&self, url: &str, response: reqwest::Response) -> Result<Answer, ClientError> {
        let status = response.status();
        let body = clock::timeout(self.answer_timeout, response.text())
            .await
            .map_err(|_| ClientError::Timeout {
                url: url.to_owned(),
                after: self.answer_timeout,
            })?
            .map_err(|error| self.failed(url, error))?;
        if status.is_success() {
            return Ok(Answer { status, body });
        }
        Err(match serde_json::from_str::<ErrorEnvelope>(&body) {
            Ok(envelope) => ClientError::Api {
                status: status.as_u16(),
                error: Box::new(envelope.error),
            },
            Err(_) => ClientError::NotOurs {
                url: url.to_owned(),
                status: status.as_u16(),
                detail: beginning(&body),
            },
        })
    }

    fn failed(&self, url: &str, error: reqwest::Error) -> ClientError {
        let url = url.to_owned();
        if error.is_builder() {
            ClientError::BadUrl {
                url,
                detail: error.without_url().to_string(),
            }
        } else if error.is_timeout() && !error.is_connect() {
            ClientError::Timeout {
                url,
                after: self.answer_timeout,
            }
        } else {
            // Our error names the address already; reqwest's would repeat it.
            ClientError::Unreachable {
                url,
                source: error.without_url(),
            }
        }
    }
}

impl fmt::Debug for ApiClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiClient")
            .field("base", &self.base)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

struct Answer {
    status: StatusCode,
    body: String,
}

/// An answer to be relayed to another client. Dropping it releases the connection.
#[derive(Debug)]
pub struct RelayedAnswer {
    url: String,
    idle_timeout: Duration,
    response: reqwest::Response,
}

impl RelayedAnswer {
    /// Returns the HTTP status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// Returns the answer's headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Waits for the next chunk of the body; `None` after the last.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        match clock::timeout(self.idle_timeout, self.response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(ClientError::Broken {
                url: self.url.clone(),
                detail: with_causes(&error.without_url()),
            }),
            Err(_) => Err(ClientError::Timeout {
                url: self.url.clone(),
                after: self.idle_timeout,
            }),
        }
    }
}

/// A request under construction.
#[derive(Debug)]
pub struct Request {
    url: String,
    builder: reqwest::RequestBuilder,
}

impl Request {
    /// Adds a header. A name or value that HTTP does not allow makes the sending fail.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.builder = self.builder.header(name, value);
        self
    }

    /// Adds query parameters, encoded as needed.
    #[must_use]
    pub fn query<Q: Serialize + ?Sized>(mut self, parameters: &Q) -> Self {
        self.builder = self.builder.query(parameters);
        self
    }

    /// Sets a body of raw bytes, such as that of a relayed request.
    #[must_use]
    pub fn body(mut self, bytes: Bytes) -> Self {
        self.builder = self.builder.body(bytes);
        self
    }

    /// Sets a JSON body.
    #[must_use]
    pub fn json<B: Serialize + ?Sized>(mut self, body: &B) -> Self {
        self.builder = self.builder.json(body);
        self
    }
}

/// One event of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerEvent {
    /// The event's name; `message` when the stream gave none.
    pub event: String,
    /// The event's data: JSON in our APIs.
    pub data: String,
    /// The event's id, for `Last-Event-ID`. Transient events have none.
    pub id: Option<String>,
    /// Delay before connecting again, if the daemon asks for one.
    pub retry: Option<Duration>,
}

impl ServerEvent {
    /// Parses the data as `T`.
    pub fn json<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(&self.data)
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<ServerEvent, ClientError>> + Send>>;

/// An open event stream. Ends with `None` when the daemon closed it in an orderly way, and with one error when it broke.
pub struct EventStream {
    status: StatusCode,
    headers: HeaderMap,
    inner: Events,
}

impl EventStream {
    /// Returns the HTTP status of the answer.
    pub fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// Returns a header of the answer, such as `Location`.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Stream for EventStream {
    type Item = Result<ServerEvent, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(context)
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// A failure of the byte stream below the events.
enum Fault {
    Silent,
    Transport(String),
}

/// Decodes bytes into events. The time limit applies to bytes, so a comment sent to keep the stream alive counts.
fn decode<B, E>(
    url: String,
    idle: Duration,
    bytes: impl Stream<Item = Result<B, E>> + Send + 'static,
) -> Events
where
    B: AsRef<[u8]> + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    // A single timer, reset with each chunk: tokio can postpone a timer without taking a lock.
    let silent = Patience::new(idle);
    let chunks = stream::unfold(Some((Box::pin(bytes), silent)), move |state| async move {
        let (mut bytes, mut silent) = state?;
        silent.renew();
        tokio::select! {
            biased;
            chunk = bytes.next() => match chunk? {
                Ok(chunk) => Some((Ok(chunk.as_ref().to_vec()), Some((bytes, silent)))),
                Err(error) => Some((Err(Fault::Transport(with_causes(&error))), None)),
            },
            () = &mut silent => Some((Err(Fault::Silent), None)),
        }
    });
    // The decoder strips a byte order mark at the beginning as if it were one byte long. An empty comment in front
    // keeps it from finding one.
    let chunks = stream::once(async { Ok(b":\n".to_vec()) }).chain(chunks);
    let mut last_id = String::new();
    let events = chunks.eventsource().map(move |item| match item {
        Ok(event) => {
            // By the SSE standard, an id also applies to the events after it. In our APIs each id is given once, so
            // a repeated id was carried over from an earlier event, and this event has none.
            let id = (event.id != last_id).then(|| event.id.clone());
            last_id = event.id;
            Ok(ServerEvent {
                event: event.event,
                data: event.data,
                id,
                retry: event.retry,
            })
        }
        Err(EventStreamError::Transport(Fault::Silent)) => Err(ClientError::Timeout {
            url: url.clone(),
            after: idle,
        }),
        Err(EventStreamError::Transport(Fault::Transport(detail))) => Err(ClientError::Broken {
            url: url.clone(),
            detail,
        }),
        Err(EventStreamError::Utf8(error)) => Err(ClientError::Broken {
            url: url.clone(),
            detail: error.to_string(),
        }),
        Err(EventStreamError::Parser(error)) => Err(ClientError::Broken {
            url: url.clone(),
            detail: format!("it is not an event stream ({:?})", error.code),
        }),
    });
    // Nothing after an error can be trusted, so the stream ends with it.
    Box::pin(events.scan(false, |broken, item| {
        let ended = std::mem::replace(broken, item.is_err());
        std::future::ready((!ended).then_some(item))
    }))
}

fn beginning(text: &str) -> String {
    let mut start: String = text
        .chars()
        .take(DETAIL_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.is_empty() {
        start.push_str("(nothing)");
    }
    start
}

#[cfg(test)]
mod tests;
