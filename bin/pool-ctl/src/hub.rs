//! The hub's protocol, as far as a download needs it beside `hf`: what a file is (size, hash, entity tag), which GGUF
//! files a repository has, and the rest of a file that was broken off.
//!
//! `hf` 2.x begins again after a kill. The address that it fetches from serves ranges, so the rest is asked for there;
//! whether both halves are one file is decided by its entity tag before and by its hash afterwards.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue,
    IF_RANGE, LOCATION, RANGE,
};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::fs::OpenOptions;
use tokio::io::AsyncWriteExt;

/// The hub itself.
const ENDPOINT: &str = "https://huggingface.co";
/// How long a connection, and the beginning of an answer, may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a file's stream may be silent before it is asked for again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The most steps from an address of the hub to where the bytes are.
const MAX_REDIRECTS: usize = 5;
/// The most bytes of a listing: a repository of thousands of files has one of a few megabytes.
const MAX_LISTING_BYTES: usize = 32 << 20;

/// Calls the hub that `hf` would call, with the token that `hf` would send.
pub struct Hub {
    http: Client,
    endpoint: Url,
    token: Option<HeaderValue>,
}

/// A file as the hub describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Tells this content from any other.
    pub etag: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
    /// Where the bytes are.
    url: Url,
    /// The tag to send along with a request for a part, where the bytes are served by whoever gave it.
    validator: Option<HeaderValue>,
}

impl RemoteFile {
    /// The SHA-256, which is the entity tag of large files.
    pub fn sha256(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| {
            etag.len() == 64 && etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    }
}

/// Why the hub gave no answer that helps.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It refused.
    #[error("the hub answered {status}{}", code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default())]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// Its `X-Error-Code`.
        code: Option<String>,
    },
    /// It can't be reached, or the connection broke.
    #[error("the hub could not be reached")]
    Unreachable(#[source] reqwest::Error),
    /// It sent nothing for a while.
    #[error(
        "the hub sent nothing for {}",
        pool_core::units::human_duration(IDLE_TIMEOUT)
    )]
    Silent,
    /// It answered in a way that nobody expects.
    #[error("the hub's answer can't be used: {0}")]
    Odd(String),
    /// What came can't be written.
    #[error("could not write {}", path.display())]
    Write {
        /// The file in question.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The rest of the file can't be had on its own.
    #[error("{0}")]
    NoRest(String),
}

impl HubError {
    /// Whether the same call may do better in a moment.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Silent => true,
            Self::Refused { status, .. } => {
                status.is_server_error()
                    || *status == StatusCode::TOO_MANY_REQUESTS
                    || *status == StatusCode::REQUEST_TIMEOUT
            }
            Self::Odd(_) | Self::Write { .. } | Self::NoRest(_) => false,
        }
    }
}

impl Hub {
    /// The hub of this environment: `HF_ENDPOINT`, and `HF_TOKEN` or the file that `hf auth login` writes. `None`
    /// where it must not be called (`HF_HUB_OFFLINE`) or can't be.
    pub fn from_env() -> Option<Self> {
        let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let on = |name| set(name).is_some_and(|value| !matches!(&*value, "0" | "false" | "no"));
        if on("HF_HUB_OFFLINE") {
            return None;
        }
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let http = Client::builder()
            .connect_timeout(ANSWER_TIMEOUT)
            .user_agent(concat!("llorch-pool/", env!("CARGO_PKG_VERSION")))
            // Where a redirect leads decides whether the token goes along, so they are followed here.
            .redirect(reqwest::redirect::Policy::none());
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| token_file(&set).and_then(|path| std::fs::read_to_string(path).ok()));
        let token = token.and_then(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim())).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        Some(Self {
            http: http.build().ok()?,
            endpoint: Url::parse(endpoint.trim_end_matches('/')).ok()?,
            token,
        })
    }

    /// What the hub says of a file.
    pub async fn look(
        &self,
        repo: &str,
        revision: Option<&str>,
        file: &str,
    ) -> Result<RemoteFile, HubError> {
        let revision = revision.unwrap_or("main");
        let steps = repo
            .split('/')
            .chain(["resolve", revision])
            .chain(file.split('/'));
        let mut headers = HeaderMap::new();
        // Compressed, a file's length would be another one.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        // The hub sends on to where the bytes are; that answer describes the file, and is not followed.
        let (url, answer) = self
            .send(Method::HEAD, self.url(steps)?, &headers, false)
            .await?;
        let header = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
        let number = |name: &str| header(name)?.trim().parse().ok();
        let moved = answer.status().is_redirection();
        let linked = header("x-linked-etag");
        let own = header(ETAG.as_str());
        let location = match header(LOCATION.as_str()) {
            Some(location) if moved => url
                .join(&location)
                .map_err(|error| HubError::Odd(error.to_string()))?,
            _ => url,
        };
        let strong = own
            .as_deref()
            .filter(|tag| !moved && tag.starts_with('"'))
            .and_then(|tag| HeaderValue::try_from(tag).ok());
        Ok(RemoteFile {
            etag: linked.or(own).map(|tag| plain_etag(&tag)),
            size: number("x-linked-size")
                .or_else(|| (!moved).then(|| number(CONTENT_LENGTH.as_str())).flatten()),
            url: location,
            validator: strong,
        })
    }

    /// The GGUF files of a repository.
    pub async fn gguf_files(
        &self,
        repo: &str,
        revision: Option<&str>,
    ) -> Result<Vec<String>, HubError> {
        #[derive(Deserialize)]
        struct Listing {
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let steps = ["api", "models"]
            .into_iter()
            .chain(repo.split('/'))
            .chain(["revision", revision.unwrap_or("main")]);
        let (_, mut answer) = self
            .send(Method::GET, self.url(steps)?, &HeaderMap::new(), true)
            .await?;
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(HubError::Unreachable)? {
            if body.len() + chunk.len() > MAX_LISTING_BYTES {
                return Err(HubError::Odd("the list of its files is too long".into()));
            }
            body.extend_from_slice(&chunk);
        }
        let listing: Listing =
            serde_json::from_slice(&body).map_err(|error| HubError::Odd(error.to_string()))?;
        let names = listing.siblings.into_iter().map(|file| file.rfilename);
        Ok(names.filter(|name| name.ends_with(".gguf")).collect())
    }

    /// Appends to `part`, which has the first `have` bytes of `remote`, what lies behind them. `came` is told how much
    /// there is, and how it ends does not matter: what was written stays and is the beginning of the same file.
    pub async fn fetch_rest(
        &self,
        remote: &RemoteFile,
        part: &Path,
        have: u64,
        came: impl Fn(u64),
    ) -> Result<(), HubError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let range = HeaderValue::try_from(format!("bytes={have}-"));
        headers.insert(
            RANGE,
            range.map_err(|error| HubError::Odd(error.to_string()))?,
        );
        if let Some(tag) = &remote.validator {
            headers.insert(IF_RANGE, tag.clone());
        }
        let (_, mut answer) = self
            .send(Method::GET, remote.url.clone(), &headers, true)
            .await
            .map_err(|error| match error {
                HubError::Refused {
                    status: StatusCode::RANGE_NOT_SATISFIABLE,
                    ..
                } => HubError::NoRest("the hub has no bytes behind those that are here".into()),
                error => error,
            })?;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            return Err(HubError::NoRest(
                "the hub sends files whole only".to_owned(),
            ));
        }
        let range = answer.headers().get(CONTENT_RANGE);
        let range = range.and_then(|value| parse_range(value.to_str().ok()?));
        let size = remote.size;
        let fits = range.is_some_and(|(first, total)| {
            first == have && (size.is_none() || total.is_none() || total == size)
        });
        if !fits {
            return Err(HubError::NoRest(
                "the hub sent another part than was asked for".to_owned(),
            ));
        }
        let write = |source| HubError::Write {
            path: part.to_path_buf(),
            source,
        };
        let mut file = OpenOptions::new()
            .append(true)
            .open(part)
            .await
            .map_err(write)?;
        let mut done = have;
        loop {
            let chunk = tokio::time::timeout(IDLE_TIMEOUT, answer.chunk())
                .await
                .map_err(|_| HubError::Silent)?
                .map_err(HubError::Unreachable)?;
            let Some(chunk) = chunk else { break };
            done += chunk.len() as u64;
            if size.is_some_and(|size| done > size) {
                return Err(HubError::NoRest(
                    "the hub sent more than the file has".to_owned(),
                ));
            }
            file.write_all(&chunk).await.map_err(write)?;
            // Written by another thread: without this an error would show at the next chunk only.
            file.flush().await.map_err(write)?;
            came(done);
        }
        if size.is_some_and(|size| done < size) {
            return Err(HubError::Silent);
        }
        Ok(())
    }

    fn url<'a>(&self, steps: impl IntoIterator<Item = &'a str>) -> Result<Url, HubError> {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .map_err(|()| HubError::Odd(format!("{} is no address", self.endpoint)))?
            .pop_if_empty()
            .extend(steps);
        Ok(url)
    }

    /// Sends a request and follows redirects: `away` ones, to another host, only where that is asked for, and never
    /// with the token. Returns the address that answered.
    async fn send(
        &self,
        method: Method,
        mut url: Url,
        headers: &HeaderMap,
        away: bool,
    ) -> Result<(Url, Response), HubError> {
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self
                .http
                .request(method.clone(), url.clone())
                .headers(headers.clone());
            if let Some(token) = &self.token
                && url.origin() == self.endpoint.origin()
            {
                request = request.header(AUTHORIZATION, token.clone());
            }
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, request.send())
                .await
                .map_err(|_| HubError::Silent)?
                .map_err(HubError::Unreachable)?;
            let status = answer.status();
            if status.is_redirection() {
                let next = answer.headers().get(LOCATION);
                let next = next
                    .and_then(|value| value.to_str().ok())
                    .and_then(|text| url.join(text).ok())
                    .ok_or_else(|| HubError::Odd("a redirect leads nowhere".to_owned()))?;
                if next.origin() != url.origin() && !away {
                    return Ok((url, answer));
                }
                url = next;
                continue;
            }
            if status.is_success() {
                return Ok((url, answer));
            }
            let code = answer.headers().get("x-error-code");
            return Err(HubError::Refused {
                status,
                code: code
                    .and_then(|value| value.to_str().ok())
                    .map(str::to_owned),
            });
        }
        Err(HubError::Odd("it redirects in a circle".to_owned()))
    }
}

/// Where `hf auth login` leaves the token.
fn token_file(set: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    if let Some(path) = set("HF_TOKEN_PATH") {
        return Some(path.into());
    }
    let home = set("HF_HOME").map(PathBuf::from).or_else(|| {
        let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")));
        Some(cache?.join("huggingface"))
    })?;
    Some(home.join("token"))
}

/// An entity tag as `hf` compares it: without quotes, and weak or not.
fn plain_etag(tag: &str) -> String {
    tag.trim_start_matches("W/").trim_matches('"').to_owned()
}

/// First byte and whole length of `bytes FIRST-LAST/LENGTH`.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCTL-017]
    fn what_a_server_says_of_a_part_is_read() {
        assert_eq!(parse_range("bytes 7-9/10"), Some((7, Some(10))));
        assert_eq!(parse_range("bytes 0-0/*"), Some((0, None)));
        for odd in ["bytes */10", "7-9/10", "bytes 7/10", ""] {
            assert_eq!(parse_range(odd), None, "{odd}");
        }
        assert_eq!(plain_etag("W/\"ab-1\""), "ab-1");
        assert_eq!(plain_etag("ab"), "ab");
    }

    #[test] // [POOLCTL-018]
    fn the_token_is_looked_for_where_hf_keeps_it() {
        let file = |pairs: &[(&str, &str)]| {
            token_file(&|name| {
                let found = pairs.iter().find(|(key, _)| *key == name)?;
                Some(found.1.to_owned())
            })
        };
        assert_eq!(
            file(&[("HOME", "/h")]),
            Some("/h/.cache/huggingface/token".into())
        );
        assert_eq!(
            file(&[("HOME", "/h"), ("HF_HOME", "/x")]),
            Some("/x/token".into())
        );
        assert_eq!(
            file(&[("HF_HOME", "/x"), ("HF_TOKEN_PATH", "/t")]),
            Some("/t".into())
        );
        assert_eq!(file(&[]), None);
    }
}
