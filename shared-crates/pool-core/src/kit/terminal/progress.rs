//! Progress of long work on standard error: a live line on a terminal, otherwise a plain line every few seconds.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::{human_bytes, human_duration, note, sanitize};

/// Shortest interval between two lines without a terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(3);
/// Interval at which the live line is redrawn.
const TICK: Duration = Duration::from_millis(100);

/// Returns a bar for work of `total` bytes; a spinner if `total` is 0, which means unknown.
pub fn bar(total: u64, label: impl Into<String>) -> Progress {
    if total == 0 {
        return Progress::turning("{spinner} {msg} {bytes} {bytes_per_sec}", label.into());
    }
    Progress::new(
        ProgressBar::new(total),
        "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
        label.into(),
    )
}

/// Returns a bar for work measured in percent.
pub fn percent(label: impl Into<String>) -> Progress {
    Progress::new(
        ProgressBar::new(100),
        "{msg} [{bar:30}] {pos} % {elapsed}",
        label.into(),
    )
}

/// Returns a bar for work of `total` items.
pub fn count(total: u64, label: impl Into<String>) -> Progress {
    let progress = Progress::new(
        ProgressBar::new(total),
        "{msg} [{bar:30}] {pos}/{len} {elapsed}, {eta} left",
        label.into(),
    );
    if progress.live {
        // Keeps the elapsed time current between items.
        progress.bar.enable_steady_tick(TICK);
    }
    progress
}

/// Returns a spinner for work that can't be measured.
pub fn spinner(label: impl Into<String>) -> Progress {
    Progress::turning("{spinner} {msg} {elapsed}", label.into())
}

/// Work in progress. The live line disappears when this is dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    live: bool,
    last_line: Mutex<Instant>,
}

impl Progress {
    fn new(bar: ProgressBar, template: &str, label: String) -> Self {
        let label = one_line(&label);
        let live = io::stderr().is_terminal();
        // Without a terminal, the bar only counts, and `plain` prints the lines.
        bar.set_draw_target(if live {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        });
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(in_our_units(style).progress_chars("=> "));
        }
        if !live {
            note(&label);
        }
        bar.set_message(label);
        Self {
            bar,
            live,
            last_line: Mutex::new(Instant::now()),
        }
    }

    fn turning(template: &str, label: String) -> Self {
        let progress = Self::new(ProgressBar::new_spinner(), template, label);
        if progress.live {
            progress.bar.enable_steady_tick(TICK);
        }
        progress
    }

    /// Sets the number of bytes that were present before the work began. They don't count towards the speed.
    pub fn begin_at(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    /// Sets the number of finished bytes.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
        self.plain(|| {
            let (message, speed) = (self.bar.message(), self.bar.per_sec());
            // The cast saturates, so any float is safe.
            let speed = human_bytes(speed as u64);
            match self.bar.length() {
                Some(total) => format!(
                    "{message}: {} of {}, {speed}/s, {} left",
                    human_bytes(done),
                    human_bytes(total),
                    human_duration(self.bar.eta())
                ),
                None => format!("{message}: {}, {speed}/s", human_bytes(done)),
            }
        });
    }

    /// Sets the finished percentage of a [`percent`] bar.
    pub fn set_percent(&self, done: u8) {
        self.bar.set_position(done.into());
        self.plain(|| format!("{}: {done} %", self.bar.message()));
    }

    /// Sets the number of finished items of a [`count`] bar, and how many of them failed.
    pub fn set_count(&self, done: u64, failed: u64) {
        self.bar.set_position(done);
        let trouble = match failed {
            0 => String::new(),
            failed => format!(" ({failed} failed)"),
        };
        self.plain(|| {
            let (message, total) = (self.bar.message(), self.bar.length().unwrap_or(0));
            format!("{message}: {done} of {total}{trouble}")
        });
        if self.live && failed > 0 {
            let label = self.bar.message();
            let label = label.split(" (").next().unwrap_or_default();
            self.bar.set_message(format!("{label}{trouble}"));
        }
    }

    /// Adds to the number of finished bytes.
    pub fn add(&self, bytes: u64) {
        self.set(self.bar.position().saturating_add(bytes));
    }

    /// Sets the description of the current step.
    pub fn message(&self, text: impl Into<String>) {
        let text = one_line(&text.into());
        self.plain(|| text.clone());
        self.bar.set_message(text);
    }

    /// Prints a line above the live line.
    pub fn println(&self, text: impl AsRef<str>) {
        self.bar.suspend(|| note(text));
    }

    /// Ends the work and prints a last line.
    pub fn finish(self, text: impl AsRef<str>) {
        self.bar.finish_and_clear();
        note(text);
    }

    fn plain(&self, line: impl FnOnce() -> String) {
        if self.live {
            return;
        }
        let mut last = self
            .last_line
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.elapsed() >= PLAIN_EVERY {
            *last = Instant::now();
            note(line());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Makes the style format sizes and times like all other output.
fn in_our_units(style: ProgressStyle) -> ProgressStyle {
    type Key = fn(&ProgressState) -> String;
    let keys: [(&'static str, Key); 5] = [
        ("bytes", |state| human_bytes(state.pos())),
        ("total_bytes", |state| human_bytes(state.len().unwrap_or(0))),
        // The cast saturates, so any float is safe.
        ("bytes_per_sec", |state| {
            format!("{}/s", human_bytes(state.per_sec() as u64))
        }),
        ("elapsed", |state| whole_seconds(state.elapsed())),
        ("eta", |state| whole_seconds(state.eta())),
    ];
    keys.into_iter().fold(style, |style, (name, key)| {
        style.with_key(
            name,
            move |state: &ProgressState, out: &mut dyn fmt::Write| {
                // A failure is harmless: the line is soon drawn again.
                let _ = out.write_str(&key(state));
            },
        )
    })
}

/// Formats a time in whole seconds, so that the live line changes only once a second.
fn whole_seconds(duration: Duration) -> String {
    human_duration(Duration::from_secs(duration.as_secs()))
}

/// Returns a label that can't control the terminal: it may contain file names chosen by others.
fn one_line(label: &str) -> String {
    sanitize::clean(label).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_steers_no_terminal() {
        assert_eq!(
            one_line("importing \x1b[31m\x1b]0;x\x07a\nb.gguf"),
            "importing a b.gguf"
        );
    }
}
