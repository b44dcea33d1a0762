//! The parts of the hub's protocol that a download needs besides `hf`: a file's size, hash and entity tag, the GGUF files of a
//! repository, and the rest of an interrupted file.
//!
//! `hf` 2.x starts over after a kill. The address that it fetches from serves ranges, so the rest is requested there. The
//! entity tag before and the hash afterwards decide whether both parts are of one file.

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

/// Address of the hub, unless `HF_ENDPOINT` names another.
const ENDPOINT: &str = "https://huggingface.co";
/// Time limit for a connection, and for the beginning of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest silence of a file's stream before the file is requested again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum number of redirects from an address of the hub to the bytes.
const MAX_REDIRECTS: usize = 5;
/// Maximum size of a listing in bytes. A repository with thousands of files has a listing of a few megabytes.
const MAX_LISTING_BYTES: usize = 32 << 20;

/// Client of the hub that `hf` would call, with the token that `hf` would send.
pub struct Hub {
    http: Client,
    endpoint: Url,
    token: Option<HeaderValue>,
}

/// A file as the hub describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Entity tag, which identifies the content; `None` if the hub sends none.
    pub etag: Option<String>,
    /// Size in bytes; `None` if the hub does not give it.
    pub size: Option<u64>,
    /// Address of the bytes.
    url: Url,
    /// Tag for `If-Range`; `None` unless the host that serves the bytes gave a strong tag.
    validator: Option<HeaderValue>,
}

impl RemoteFile {
    /// Returns the SHA-256, which is the entity tag of large files.
    pub fn sha256(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| {
            etag.len() == 64 && etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    }
}

/// Reason the hub gave no useful answer.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Refusal by the hub.
    #[error("the hub answered {status}{}", code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default())]
    Refused {
        /// HTTP status of the answer.
        status: StatusCode,
        /// Value of `X-Error-Code`, if it was sent.
        code: Option<String>,
    },
    /// Hub that can't be reached, or connection that broke.
    #[error("the hub could not be reached")]
    Unreachable(#[source] reqwest::Error),
    /// Stream that was silent for too long, or that ended early.
    #[error(
        "the hub sent nothing for {}",
        pool_core::kit::units::human_duration(IDLE_TIMEOUT)
    )]
    Silent,
    /// Answer that was not expected.
    #[error("the hub's answer can't be used: {0}")]
    Odd(String),
    /// Received bytes that can't be written.
    #[error("could not write {}", path.display())]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// Rest of a file that can't be fetched separately, with the reason.
    #[error("{0}")]
    NoRest(String),
}

impl HubError {
    /// Returns whether the same call may succeed a moment later.
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
    /// Returns the hub of this environment, from `HF_ENDPOINT`, and `HF_TOKEN` or the file that `hf auth login` writes. Returns
    /// `None` if the hub must not be called (`HF_HUB_OFFLINE`) or can't be.
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
            // Redirects are followed in `send`, because their target decides whether the token is sent along.
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

    /// Returns the hub's description of a file.
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
        // A compressed answer would have a different length.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        // The hub redirects to the host of the bytes. The redirect itself describes the file, so it is not followed.
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

    /// Returns the GGUF files of a repository.
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

    /// Fetches the bytes of `remote` after the first `have`, and appends them to `part`, which has those already. `came`
    /// receives the number of bytes so far. After a failure, the written bytes stay a valid beginning of the file.
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
                } => HubError::NoRest("the hub has no bytes after those already received".into()),
                error => error,
            })?;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            return Err(HubError::NoRest(
                "the hub only sends whole files".to_owned(),
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
                "the hub sent a part other than the requested one".to_owned(),
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
                    "the hub sent more bytes than the file has".to_owned(),
                ));
            }
            file.write_all(&chunk).await.map_err(write)?;
            // A background thread writes: without this, an error would only show at the next chunk.
            file.flush().await.map_err(write)?;
            came(done);
        }
        // A stream that ends early counts as a silent one, so that the caller requests the rest again.
        if size.is_some_and(|size| done < size) {
            return Err(HubError::Silent);
        }
        Ok(())
    }

    fn url<'a>(&self, steps: impl IntoIterator<Item = &'a str>) -> Result<Url, HubError> {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .map_err(|()| HubError::Odd(format!("invalid address {}", self.endpoint)))?
            .pop_if_empty()
            .extend(steps);
        Ok(url)
    }

    /// Sends a request and follows redirects: those to another host only if `away` is set, and never with the token. Returns
    /// the final address with its answer.
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
                    .ok_or_else(|| HubError::Odd("a redirect has no valid target".to_owned()))?;
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
        Err(HubError::Odd("redirect loop".to_owned()))
    }
}

/// Returns the path at which `hf auth login` stores the token.
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

/// Returns an entity tag as `hf` compares it: without quotes, and without the mark of a weak tag.
fn plain_etag(tag: &str) -> String {
    tag.trim_start_matches("W/").trim_matches('"').to_owned()
}

/// Parses `bytes FIRST-LAST/LENGTH` into the first byte and the whole length.
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
