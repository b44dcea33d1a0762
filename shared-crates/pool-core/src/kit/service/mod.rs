//! The HTTP service common to all daemons: an accept loop with limits, token and `Host` checks, correlation ids, the error
//! envelope, `/version`, an orderly stop, and the files by which clients find the daemon. Each daemon adds its routes.

mod accept;
mod auth;
mod body;
mod capacity;
mod correlation;
mod error;
mod extract;
mod failure;
mod linger;
mod log_file;
pub mod routes;
mod shutdown;
pub mod state_files;
mod streams;
mod strict;
pub mod telemetry;
pub mod threads;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderMap, Method};
use axum::middleware;
use axum::routing::get;
use tokio::net::{TcpListener, TcpSocket};
use tower_http::catch_panic::CatchPanicLayer;

pub use accept::Stopped;
pub use auth::{Caller, ScopedToken, bearer};
pub use capacity::{Load, Places};
pub use correlation::CorrelationId;
pub use error::{ServiceError, ServiceResult, codes};
pub use extract::{Json, Path, Query, RawBody};
pub use failure::report_failure;
pub use shutdown::Shutdown;
pub use streams::asks_for_events;

use capacity::Resources;

use crate::kit::secret::Secret;
use crate::kit::wire::VersionInfo;

/// Options that a daemon sets for its service.
#[derive(Debug, Clone)]
pub struct ServiceOptions {
    /// The program's name, as `/version` reports it.
    pub name: &'static str,
    /// The program's version, as `/version` reports it.
    pub version: &'static str,
    /// The version of the daemon's API.
    pub api_version: u32,
    /// The token that opens every path. `None` is allowed only on a loopback address.
    pub token: Option<Secret>,
    /// Tokens for some paths only.
    pub scoped_tokens: Vec<ScopedToken>,
    /// Paths that need no token. Default `/health` and `/metrics`.
    pub open_paths: Vec<&'static str>,
    /// Names that a `Host` header may give, in addition to `localhost`, the bound address and the machine's own name.
    pub allowed_hosts: Vec<String>,
    /// Bytes of incomplete request headers after which the answer is 431. A single read may exceed the limit, so it is not
    /// exact. Default 64 KiB.
    pub header_limit: usize,
    /// Most bytes of a request's body. Default 4 MiB.
    pub body_limit: usize,
    /// Time limit for the headers of a request, and for an idle connection that is kept alive. Default 10 seconds.
    pub header_timeout: Duration,
    /// Time limit for the body of a request, from the end of its headers. Default 30 seconds.
    pub body_timeout: Duration,
    /// Most open connections; fewer if the process has too few descriptors or too little memory. A further connection is
    /// served if its request belongs to the control path; otherwise it is answered with 503 and closed. At most 128 such
    /// connections are open at a time; others wait to be accepted. Default 1024.
    pub max_connections: usize,
    /// Descriptors reserved for the daemon's own files, not counting those already open at the bind. Default 8.
    pub own_files: usize,
    /// True if streams to clients are relayed from other daemons, so that each takes two descriptors. Default false.
    pub relays: bool,
    /// Test for requests of the control path: short requests that the fleet depends on, for which places are reserved.
    /// Default [`is_about_the_daemon`].
    pub is_control: fn(&Method, &str) -> bool,
    /// Test for requests for an event stream. Default [`asks_for_events`].
    pub is_stream: fn(&Method, &str, &HeaderMap) -> bool,
}

/// Returns whether a request asks for a daemon's own state: `/health`, `/ready`, `/metrics` or `/version`.
pub fn is_about_the_daemon(_: &Method, path: &str) -> bool {
    matches!(path, "/health" | "/ready" | "/metrics" | "/version")
}

impl ServiceOptions {
    /// Returns the defaults, for a program with this name and version.
    pub fn new(name: &'static str, version: &'static str, api_version: u32) -> Self {
        Self {
            name,
            version,
            api_version,
            token: None,
            scoped_tokens: Vec::new(),
            open_paths: vec!["/health", "/metrics"],
            allowed_hosts: Vec::new(),
            header_limit: 64 * 1024,
            body_limit: 4 * 1024 * 1024,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            max_connections: 1024,
            own_files: 8,
            relays: false,
            is_control: is_about_the_daemon,
            is_stream: asks_for_events,
        }
    }
}

/// Most connections that may wait to be accepted; the system may lower it. With the usual 128, a flood of refused
/// connections would make other clients retry the connect at growing intervals.
const BACKLOG: u32 = 4096;

/// A service that can't listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// An address that is reachable from the network, without a token.
    #[error("refusing to listen on {addr} without a token: it can be reached from other machines")]
    Exposed {
        /// The address passed to [`Service::bind`].
        addr: SocketAddr,
    },
    /// An address on which another program listens.
    #[error("another program already listens on {addr}")]
    InUse {
        /// The address passed to [`Service::bind`].
        addr: SocketAddr,
    },
    /// A limit on open files that is too low.
    #[error("the limit of {limit} open files is too low: at least {needed} are needed")]
    Descriptors {
        /// The limit in force.
        limit: usize,
        /// The lowest limit with which the daemon works.
        needed: usize,
    },
    /// Another error of the system.
    #[error("could not listen on {addr}")]
    Listen {
        /// The address passed to [`Service::bind`].
        addr: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
}

impl BindError {
    /// Returns a remedy, if there is one.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Exposed { .. } => {
                Some("set a token (a variable or `token_file`, mode 0600), or bind to 127.0.0.1")
            }
            Self::InUse { .. } => Some("stop it, or choose another port; port 0 picks a free one"),
            Self::Descriptors { .. } => {
                Some("raise it with `ulimit -n 1024`, or `LimitNOFILE=` of the systemd unit")
            }
            Self::Listen { .. } => None,
        }
    }
}

/// A service that listens but does not answer yet.
#[derive(Debug)]
pub struct Service {
    listener: TcpListener,
    local_addr: SocketAddr,
    options: ServiceOptions,
    load: Load,
}

impl Service {
    /// Listens on `addr`. An address that other machines can reach needs a token. Also raises the process's limit on open
    /// files as far as the system allows, and derives the number of places from it.
    pub async fn bind(addr: SocketAddr, options: ServiceOptions) -> Result<Self, BindError> {
        if !addr.ip().is_loopback() && options.token.is_none() {
            return Err(BindError::Exposed { addr });
        }
        let listen = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { addr },
            _ => BindError::Listen { addr, source },
        };
        let listener = bind(addr).map_err(listen)?;
        let local_addr = listener.local_addr().map_err(listen)?;
        let has = Resources::of_this_process();
        let places = Places::of(&options, has)?;
        tracing::info!(
            open_files = has.descriptors,
            connections = places.connections,
            streams = places.streams,
            spare = places.spare,
            calls = places.calls,
            body_bytes = places.body_bytes,
            "limits"
        );
        if places.connections < options.max_connections {
            tracing::warn!(
                connections = places.connections,
                max_connections = options.max_connections,
                open_files = has.descriptors,
                "open-file or memory limit permits fewer connections than the settings"
            );
        }
        Ok(Self {
            listener,
            local_addr,
            options,
            load: Load::new(places),
        })
    }

    /// Returns a shared handle on the service's places and their use.
    pub fn load(&self) -> Load {
        self.load.clone()
    }

    /// Returns the bound address, with the actual port if port 0 was requested.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Returns the URL for clients on this machine.
    pub fn url(&self) -> String {
        state_files::url_of(self.local_addr)
    }

    /// Answers requests until `shutdown` is requested. Then accepts no more connections, lets open requests finish for at
    /// most `grace`, and cuts the remaining connections.
    pub fn serve(
        self,
        router: Router,
        shutdown: Shutdown,
        grace: Duration,
    ) -> impl Future<Output = Stopped> + Send {
        let app = app(router, self.local_addr, &self.options, &self.load);
        accept::run(self.listener, app, self.options, self.load, shutdown, grace)
    }
}

fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // Like `TcpListener::bind`: connections of an earlier run in TIME_WAIT must not block the port.
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit this size: a client that does not read must not fill megabytes of the kernel's
    // memory.
    socket.set_send_buffer_size(capacity::SEND_BUFFER)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Wraps the daemon's routes in the layers common to all daemons.
fn app(router: Router, local_addr: SocketAddr, options: &ServiceOptions, load: &Load) -> Router {
    let version = VersionInfo {
        name: options.name.to_owned(),
        version: options.version.to_owned(),
        api_version: options.api_version,
    };
    let guard = auth::Guard::new(local_addr, options);
    // The last layer is the outermost: the correlation id is known wherever an error arises.
    router
        .route("/version", get(routes::version).with_state(version))
        .fallback(error::no_such_path)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(DefaultBodyLimit::max(options.body_limit))
        .layer(CatchPanicLayer::custom(error::from_panic))
        .layer(middleware::from_fn_with_state(
            streams::Bound {
                load: load.clone(),
                is_stream: options.is_stream,
            },
            streams::limit,
        ))
        .layer(middleware::from_fn_with_state(guard, auth::check))
        .layer(middleware::from_fn_with_state(
            body::Bound {
                time: options.body_timeout,
                load: load.clone(),
                is_control: options.is_control,
            },
            body::limit,
        ))
        .layer(middleware::from_fn(correlation::scope))
}

#[cfg(test)]
mod tests;
