//! Progress of long work, on standard error: a live line on a terminal, else a plain line every few seconds.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::{human_bytes, human_duration, note, sanitize};

/// How often a log gets a line.
const PLAIN_EVERY: Duration = Duration::from_secs(3);
/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(100);

/// A bar for work of `total` bytes. A total of 0 means that it isn't known.
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

/// A bar for work that is done by percent.
pub fn percent(label: impl Into<String>) -> Progress {
    Progress::new(
        ProgressBar::new(100),
        "{msg} [{bar:30}] {pos} % {elapsed}",
        label.into(),
    )
}

/// A bar for work of `total` things.
pub fn count(total: u64, label: impl Into<String>) -> Progress {
    let progress = Progress::new(
        ProgressBar::new(total),
        "{msg} [{bar:30}] {pos}/{len} {elapsed}, {eta} left",
        label.into(),
    );
    if progress.live {
        // The time advances even without progress.
        progress.bar.enable_steady_tick(TICK);
    }
    progress
}

/// A spinner for work that can't be measured.
pub fn spinner(label: impl Into<String>) -> Progress {
    Progress::turning("{spinner} {msg} {elapsed}", label.into())
}

/// Work under way. Dropped without [`Progress::finish`], its live line disappears.
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
        // Without a terminal the bar only counts; the lines are ours.
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

    /// Says that `done` bytes were there before the work began: they count for nothing in its speed.
    pub fn begin_at(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    /// Says how many bytes are done.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
        self.plain(|| {
            let (message, speed) = (self.bar.message(), self.bar.per_sec());
            // A float becomes the nearest whole number, or the largest.
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

    /// Says how many percent of a [`percent`] bar are done.
    pub fn set_percent(&self, done: u8) {
        self.bar.set_position(done.into());
        self.plain(|| format!("{}: {done} %", self.bar.message()));
    }

    /// Says how many things of a [`count`] bar are done, and how many of them failed.
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

    /// Says that `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        self.set(self.bar.position().saturating_add(bytes));
    }

    /// Says what is being done now.
    pub fn message(&self, text: impl Into<String>) {
        let text = one_line(&text.into());
        self.plain(|| text.clone());
        self.bar.set_message(text);
    }

    /// Prints a line without disturbing the live one.
    pub fn println(&self, text: impl AsRef<str>) {
        self.bar.suspend(|| note(text));
    }

    /// Ends the work with a last line.
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

/// Formats sizes and times in a template as all other output does.
fn in_our_units(style: ProgressStyle) -> ProgressStyle {
    type Key = fn(&ProgressState) -> String;
    let keys: [(&'static str, Key); 5] = [
        ("bytes", |state| human_bytes(state.pos())),
        ("total_bytes", |state| human_bytes(state.len().unwrap_or(0))),
        // A float becomes the nearest whole number, or the largest.
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
                // A line that can't be drawn is soon drawn again.
                let _ = out.write_str(&key(state));
            },
        )
    })
}

/// Formats a time that changes once a second.
fn whole_seconds(duration: Duration) -> String {
    human_duration(Duration::from_secs(duration.as_secs()))
}

/// A label that can't steer the terminal: it may name files, and others named those.
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
