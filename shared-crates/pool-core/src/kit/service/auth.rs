//! Access control: tokens, and for callers without one, checks of `Host` and `Origin` that keep foreign web pages out.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::{ServiceError, ServiceOptions, codes};
use crate::kit::secret::Secret;

/// A token that opens only certain methods and paths.
#[derive(Debug, Clone)]
pub struct ScopedToken {
    /// Name of the holder, passed to handlers in [`Caller`].
    pub caller: &'static str,
    /// The token's text.
    pub secret: Secret,
    /// Test for the methods and paths that the token opens.
    pub opens: fn(&Method, &str) -> bool,
}

/// The caller of a request, according to its token. An extension of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Caller {
    /// A caller without a valid token, on a path or daemon that needs none.
    Anonymous,
    /// The holder of the daemon's own token.
    Operator,
    /// The holder of a [`ScopedToken`].
    Scoped(&'static str),
}

/// Access rules of one daemon.
#[derive(Debug, Clone)]
pub(super) struct Guard(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    token: Option<Secret>,
    scoped: Vec<ScopedToken>,
    open_paths: Vec<&'static str>,
    bound: IpAddr,
    hosts: Vec<String>,
}

impl Guard {
    pub(super) fn new(local_addr: SocketAddr, options: &ServiceOptions) -> Self {
        let machine = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .to_lowercase();
        let short = machine.split('.').next().unwrap_or_default().to_owned();
        let mut hosts = vec![
            "localhost".to_owned(),
            format!("{short}.local"),
            short,
            machine,
        ];
        hosts.extend(options.allowed_hosts.iter().map(|host| host.to_lowercase()));
        Self(Arc::new(Rules {
            token: options.token.clone(),
            scoped: options.scoped_tokens.clone(),
            open_paths: options.open_paths.clone(),
            bound: local_addr.ip(),
            hosts,
        }))
    }
}

/// Passes a request on with its [`Caller`], or refuses it.
pub(super) async fn check(
    State(guard): State<Guard>,
    mut request: Request,
    next: Next,
) -> Response {
    let judged = check_target(request.uri(), request.headers()).and_then(|()| {
        guard
            .0
            .judge(request.method(), request.uri().path(), request.headers())
    });
    match judged {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// Refuses a request that names its server more than once. A proxy could have acted on one name, and this daemon on the
/// other.
fn check_target(uri: &Uri, headers: &HeaderMap) -> Result<(), ServiceError> {
    let refuse = |message: &str| {
        Err(ServiceError::new(
            StatusCode::BAD_REQUEST,
            codes::INVALID_REQUEST,
            message,
        ))
    };
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return refuse("the request has more than one Host header");
    }
    let agrees = |authority: &Authority| {
        host.and_then(|host| host.to_str().ok())
            .is_some_and(|host| host.eq_ignore_ascii_case(authority.as_str()))
    };
    if uri.authority().is_some_and(|authority| !agrees(authority)) {
        return refuse("the request's address and its Host header name different servers");
    }
    Ok(())
}

impl Rules {
    fn judge(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Caller, ServiceError> {
        let given = bearer(headers);
        let scoped = || {
            self.scoped
                .iter()
                .filter(|token| (token.opens)(method, path))
        };
        if let Some(given) = given {
            if self
                .token
                .as_ref()
                .is_some_and(|token| token.matches(given))
            {
                return Ok(Caller::Operator);
            }
            if let Some(token) = scoped().find(|token| token.secret.matches(given)) {
                return Ok(Caller::Scoped(token.caller));
            }
        }
        self.check_host(headers)?;
        self.check_origin(headers)?;
        // Without a token for all paths, only paths that a scoped token opens need one.
        let needs_token = self.token.is_some() || scoped().next().is_some();
        if !needs_token || self.open_paths.contains(&path) {
            return Ok(Caller::Anonymous);
        }
        let unauthorized = |message: &str| {
            ServiceError::new(StatusCode::UNAUTHORIZED, codes::UNAUTHORIZED, message)
        };
        Err(match given {
            None => unauthorized("this daemon requires a token")
                .hint(
                    "send `Authorization: Bearer TOKEN`; our command-line programs read it from LLORCH_API_TOKEN or \
                     LLORCH_POOL_TOKEN",
                ),
            Some(given) => {
                tracing::warn!(token = Secret::new(given).fingerprint(), "rejected a wrong token");
                unauthorized("the token is not valid for this daemon").hint("compare it with the daemon's own token")
            }
        })
    }

    /// Refuses a request to a foreign host name. A web page whose name resolves to this machine (DNS rebinding) still sends
    /// that name.
    fn check_host(&self, headers: &HeaderMap) -> Result<(), ServiceError> {
        let host = headers
            .get(HOST)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        if host
            .parse::<Authority>()
            .is_ok_and(|authority| self.is_ours(authority.host()))
        {
            return Ok(());
        }
        let message = if host.is_empty() {
            "the request has no usable Host header".to_owned()
        } else {
            format!("`{host}` is not a name of this daemon")
        };
        Err(
            ServiceError::new(StatusCode::FORBIDDEN, codes::UNKNOWN_HOST, message)
                .hint("use its address, or list the name among the daemon's allowed hosts"),
        )
    }

    /// Refuses a browser's request on behalf of a page of another origin.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), ServiceError> {
        const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
        let foreign_site = headers
            .get(FETCH_SITE)
            .is_some_and(|site| site == "cross-site");
        let same_origin = match (headers.get(ORIGIN), headers.get(HOST)) {
            (None, _) => true,
            (Some(origin), Some(host)) => {
                let origin = origin.to_str().unwrap_or_default();
                let authority = origin
                    .strip_prefix("http://")
                    .or_else(|| origin.strip_prefix("https://"));
                authority.is_some_and(|authority| {
                    host.to_str()
                        .is_ok_and(|host| authority.eq_ignore_ascii_case(host))
                })
            }
            (Some(_), None) => false,
        };
        if same_origin && !foreign_site {
            return Ok(());
        }
        Err(ServiceError::new(
            StatusCode::FORBIDDEN,
            codes::FOREIGN_ORIGIN,
            "a page from another origin may not call this daemon without a token",
        )
        .hint(
            "call it from a program, or through a server on the page's own origin; a browser sends a preflight before a token",
        ))
    }

    fn is_ours(&self, host: &str) -> bool {
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .trim_end_matches('.')
            .to_lowercase();
        match host.parse::<IpAddr>() {
            // The addresses behind an unspecified one are not known, so accept any: DNS can't rebind a numeric address.
            Ok(ip) => ip.is_loopback() || self.bound.is_unspecified() || ip == self.bound,
            Err(_) => self.hosts.contains(&host),
        }
    }
}

/// Returns the token in a request's `Authorization: Bearer` header.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}
