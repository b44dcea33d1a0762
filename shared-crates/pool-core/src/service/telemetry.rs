//! What a daemon writes about itself: to standard error, where its starter or a service manager collects it.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Starts logging. `LLORCH_LOG` says what is logged (as `info,orchestratord=debug`), else `filter_default`. A terminal
/// gets lines for people, anything else JSON.
pub fn init(filter_default: &str) -> Result<(), ParseError> {
    let chosen = std::env::var("LLORCH_LOG")
        .ok()
        .filter(|value| !value.is_empty());
    let filter = EnvFilter::builder().parse(chosen.as_deref().unwrap_or(filter_default))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // It would say on standard error that standard error can't be written to, and panic: on a full disk a log that
        // lies there would end whatever logs.
        .log_internal_errors(false);
    // `try_init` fails when a subscriber stands already, as in tests that start several daemons in one process.
    let _ = if io::stderr().is_terminal() {
        subscriber.try_init()
    } else {
        subscriber
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init()
    };
    Ok(())
}
