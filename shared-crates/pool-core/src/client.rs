//! A client of our HTTP APIs: tokens, the error envelope, event streams. It never repeats a request by itself: what
//! may be repeated is for the caller to know.

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

use crate::address;
use crate::api::error::{ErrorBody, ErrorEnvelope};
use crate::api::version::VersionInfo;
use crate::clock::{self, Patience};
use crate::errors::with_causes;
use crate::secret::Secret;
use crate::units::human_duration;

/// How long a connection may take: our daemons stand on the same host or in the next room.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Lifetime of an idle connection: shorter than in daemons, so that a descriptor is soon free again.
const KEPT_IDLE: Duration = Duration::from_secs(5);
/// How long an answer may take by default, its body included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an event stream may be silent by default: four of the comments that daemons send every 15 seconds.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of an unknown answer an error shows.
const DETAIL_CHARS: usize = 200;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address can't be used.
    #[error("`{url}` is not an address of a daemon: {detail}")]
    BadUrl {
        /// The address as given.
        url: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Nothing listens there, or the connection broke before an answer.
    #[error("could not reach {url}")]
    Unreachable {
        /// The address that was called.
        url: String,
        /// What the system said.
        source: reqwest::Error,
    },
    /// The daemon refused, and said why.
    #[error("{}", error.message)]
    Api {
        /// The HTTP status.
        status: u16,
        /// The error of the envelope.
        error: Box<ErrorBody>,
    },
    /// Something answered, but not as one of our daemons does.
    #[error("{url} answered {status}, and not as a llama-orch daemon does: {detail}")]
    NotOurs {
        /// The address that was called.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The beginning of the answer, or what is wrong with it.
        detail: String,
    },
    /// The connection broke within an event stream.
    #[error("the event stream of {url} broke: {detail}")]
    Broken {
        /// The address that was called.
        url: String,
        /// How it broke.
        detail: String,
    },
    /// No answer, or no event, in time.
    #[error("{url} did not answer within {}", human_duration(*after))]
    Timeout {
        /// The address that was called.
        url: String,
        /// How long was waited.
        after: Duration,
    },
    /// The other side speaks another version of the API.
    #[error(
        "{url} is {name} {version} and speaks API version {theirs}; this program speaks version {ours}"
    )]
    VersionMismatch {
        /// The address that was called.
        url: String,
        /// The other side's name.
        name: String,
        /// The other side's version.
        version: String,
        /// Its API version.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
}

impl ClientError {
    /// What to try next.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Api { error, .. } => return error.hint.clone(),
            Self::BadUrl { .. } => address::FORMS,
            Self::Unreachable { url, .. } if url.starts_with("https://") => {
                "is it the address of a proxy that speaks TLS? The daemons themselves speak plain HTTP: `http://...`"
            }
            Self::Unreachable { .. } => "is the daemon running, and is this its address?",
            Self::Timeout { .. } => {
                "the daemon may be stopped or overloaded: look at its process and its log on its host"
            }
            Self::NotOurs { .. } => "another program may be listening at this address",
            Self::VersionMismatch { .. } => "install the same release on both sides",
            Self::Broken { .. } => return None,
        };
        Some(hint.to_owned())
    }

    /// The error of the envelope, when the daemon gave one.
    pub fn api(&self) -> Option<&ErrorBody> {
        match self {
            Self::Api { error, .. } => Some(error),
            _ => None,
        }
    }

    /// The HTTP status, when there was an answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Api { status, .. } | Self::NotOurs { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// Calls one daemon. Cheap to clone; clones share their connections.
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
    /// A client of the daemon at `base_url`, which sends `token` with every request.
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
            // Addresses are shown and logged: this one not even here.
            return Err(ClientError::BadUrl {
                url: url.host_str().unwrap_or_default().to_owned(),
                detail: "it must not hold a user or a password; a token goes into the settings"
                    .to_owned(),
            });
        }
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(KEPT_IDLE)
            .tcp_nodelay(true)
            // A proxy of the environment is for the internet, not for daemons next door; and a redirect could carry
            // the token to a stranger.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none());
        if url.scheme() == "http" {
            // The system's certificates are not needed, and a bare machine may have none.
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

    /// A client of another daemon that shares this one's connections.
    pub fn at(&self, base_url: impl Into<String>, token: Option<Secret>) -> Self {
        Self {
            base: base_url.into(),
            token,
            ..self.clone()
        }
    }

    /// Sends `id` as `X-Correlation-Id` with every request.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// Waits this long for a whole answer, or for the beginning of an event stream. Default 30 seconds.
    #[must_use]
    pub fn with_answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    /// Takes an event stream for broken after this long without a byte. Default 60 seconds.
    #[must_use]
    pub fn with_idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// The daemon's address, without a slash at the end.
    pub fn base_url(&self) -> &str {
        &self.base
    }

    /// A request to `path` (`/v2/tasks`), to be completed and given to [`ApiClient::fetch`] or
    /// [`ApiClient::events`].
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

    /// `GET`, with a JSON answer.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.fetch(self.request(Method::GET, path)).await
    }

    /// `POST` of a JSON body, with a JSON answer.
    pub async fn post<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.fetch(self.request(Method::POST, path).json(body))
            .await
    }

    /// `DELETE`, with a JSON answer.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.fetch(self.request(Method::DELETE, path)).await
    }

    /// `GET`, with the answer as it is.
    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        Ok(self.answer(self.request(Method::GET, path)).await?.body)
    }

    /// Sends a request and reads a JSON answer. An empty one (204) reads as `null`, so `T` may be `()`.
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

    /// Fails unless the daemon speaks `expected`, the API version this program was built for.
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

    /// Opens an event stream. An answer of 204 is a stream without events: the reader has them all.
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

    /// Sends a request for somebody else, who gets the answer as it is and as it comes, whatever its status.
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
            // The address is named already; reqwest would name it again.
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

/// An answer on its way to somebody else. Dropping it lets go of the connection.
#[derive(Debug)]
pub struct RelayedAnswer {
    url: String,
    idle_timeout: Duration,
    response: reqwest::Response,
}

impl RelayedAnswer {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The answer's headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The next piece of the body, as soon as there is one; `None` after the last.
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

/// A request that is being put together.
#[derive(Debug)]
pub struct Request {
    url: String,
    builder: reqwest::RequestBuilder,
}

impl Request {
    /// Adds a header; a name or value that HTTP does not allow fails when the request is sent.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.builder = self.builder.header(name, value);
        self
    }

    /// Adds parameters to the query, encoded as needed.
    #[must_use]
    pub fn query<Q: Serialize + ?Sized>(mut self, parameters: &Q) -> Self {
        self.builder = self.builder.query(parameters);
        self
    }

    /// Sets a body that is somebody else's.
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
    /// Its data, JSON in our APIs.
    pub data: String,
    /// Its id, for `Last-Event-ID`. Momentary events have none.
    pub id: Option<String>,
    /// How long the daemon asks to wait before connecting again.
    pub retry: Option<Duration>,
}

impl ServerEvent {
    /// The data as `T`.
    pub fn json<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(&self.data)
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<ServerEvent, ClientError>> + Send>>;

/// An open event stream. It ends with `None` when the daemon closed it in order, and with one error when it broke.
pub struct EventStream {
    status: StatusCode,
    headers: HeaderMap,
    inner: Events,
}

impl EventStream {
    /// The answer's HTTP status.
    pub fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// A header of the answer, as `Location`.
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

/// How a stream of bytes went wrong.
enum Fault {
    Silent,
    Transport(String),
}

/// Bytes to events. The deadline is on bytes, so that a comment sent to keep the stream alive counts.
fn decode<B, E>(
    url: String,
    idle: Duration,
    bytes: impl Stream<Item = Result<B, E>> + Send + 'static,
) -> Events
where
    B: AsRef<[u8]> + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    // One timer that is put off with each chunk: tokio does that without a lock.
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
    // The decoder looks for a byte order mark at the beginning only, and takes it for one byte long: an empty comment
    // in front keeps it from looking.
    let chunks = stream::once(async { Ok(b":\n".to_vec()) }).chain(chunks);
    let mut last_id = String::new();
    let events = chunks.eventsource().map(move |item| match item {
        Ok(event) => {
            // By the SSE standard an id sticks to the events after it. In our APIs no id is given twice, so one that
            // is the same again was carried over, and the event has none of its own.
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
    // Nothing sensible follows an error.
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
