//! Progress reports of a download: bars and notes for people, or one line of JSON per event.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use pool_core::api::models::{DownloadEvent, DownloadPhase, DownloadProgress, DownloadWait};
use pool_core::kit::terminal::progress::{self, Progress};
use pool_core::kit::terminal::say;

/// Shortest time between two progress events for programs.
const JSON_EVERY: Duration = Duration::from_millis(250);

/// Recipient of the reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Report {
    /// For people: a bar on a terminal, otherwise a line now and then.
    #[default]
    Bar,
    /// For programs: one line of JSON per event on standard output, the last one `end` or `error`.
    Json,
}

/// Progress of work measured in bytes.
pub struct Meter {
    phase: DownloadPhase,
    total: Option<u64>,
    shown: Shown,
}

enum Shown {
    Bar(Progress),
    Json(RefCell<Pace>),
}

/// State at the latest event, from which the speed is computed.
struct Pace {
    at: Instant,
    done: u64,
    bytes_per_s: u64,
}

impl Report {
    /// Begins work of `total` bytes (`None` if unknown), of which `done` are already there.
    pub fn meter(
        self,
        phase: DownloadPhase,
        label: impl Into<String>,
        total: Option<u64>,
        done: u64,
    ) -> Meter {
        let shown = match self {
            Self::Bar => {
                let bar = progress::bar(total.unwrap_or(0), label);
                bar.begin_at(done);
                Shown::Bar(bar)
            }
            Self::Json => Shown::Json(RefCell::new(Pace {
                at: Instant::now(),
                done,
                bytes_per_s: 0,
            })),
        };
        let meter = Meter {
            phase,
            total,
            shown,
        };
        if let Shown::Json(_) = meter.shown {
            emit(&meter.event(done, 0));
        }
        meter
    }

    /// Reports a wait for another process. The returned spinner turns until it is dropped.
    pub fn waiting(self, message: String) -> Option<Progress> {
        match self {
            Self::Bar => Some(progress::spinner(message)),
            Self::Json => {
                emit(&DownloadEvent::Waiting(DownloadWait { message }));
                None
            }
        }
    }
}

impl Meter {
    /// Reports the number of bytes that are done.
    pub fn set(&self, done: u64) {
        match &self.shown {
            Shown::Bar(bar) => bar.set(done),
            Shown::Json(pace) => {
                let mut pace = pace.borrow_mut();
                let elapsed = pace.at.elapsed();
                if elapsed < JSON_EVERY {
                    return;
                }
                let came = u128::from(done.saturating_sub(pace.done)) * 1000;
                let bytes_per_s = came / elapsed.as_millis().max(1);
                *pace = Pace {
                    at: Instant::now(),
                    done,
                    bytes_per_s: u64::try_from(bytes_per_s).unwrap_or(u64::MAX),
                };
                emit(&self.event(done, pace.bytes_per_s));
            }
        }
    }

    fn event(&self, done_bytes: u64, bytes_per_s: u64) -> DownloadEvent {
        DownloadEvent::Progress(DownloadProgress {
            phase: self.phase,
            done_bytes,
            total_bytes: self.total,
            bytes_per_s,
        })
    }
}

/// Prints an event. A closed output does not stop a download.
pub fn emit(event: &DownloadEvent) {
    if let Ok(line) = serde_json::to_string(event) {
        let _ = say(line);
    }
}
