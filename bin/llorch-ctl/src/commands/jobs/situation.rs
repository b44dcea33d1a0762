//! The remarks of a command that follows a job, on standard error: why no text comes, and how much of the prompt has been read.
//! A terminal has a live line for passing states; elsewhere, only lasting reasons get a line.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use orchestrator_core::JobId;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::tasks::TaskWaiting;
use pool_core::kit::terminal::progress::{self, Progress};
use pool_core::kit::terminal::{human_count, human_duration, in_commands, note, paint, sanitize};

/// Delay before a wait gets a line without `notices`. A free worker takes a job sooner.
const WORTH_A_LINE: Duration = Duration::from_secs(1);
/// Pause before another line for the same reason with other numbers.
const SAME_REASON: Duration = Duration::from_secs(60);
/// Pause between lines about the prompt where there is no live line.
const READING_EVERY: Duration = Duration::from_secs(10);

/// The reasons for a wait, printed once for each change of the reason. Skips short waits and most changes of a number.
#[derive(Debug, Default)]
pub struct Reasons {
    /// Name and text of a reason that is not printed yet, with the time at which it is due.
    pending: Option<(String, String, Instant)>,
    /// Name and text of the latest printed reason, with the time of printing.
    told: Option<(String, String, Instant)>,
}

impl Reasons {
    /// Records a reason by its name and its text. The text is due after `delay`, unless it was printed.
    pub fn note(&mut self, reason: &str, text: String, delay: Duration, now: Instant) {
        let due = match &self.told {
            Some((_, told, _)) if *told == text => {
                self.pending = None;
                return;
            }
            Some((told, _, at)) if told == reason => *at + SAME_REASON,
            _ => now + delay,
        };
        // A reason whose numbers change keeps its due time.
        let due = match &self.pending {
            Some((pending, _, before)) if pending == reason => *before,
            _ => due,
        };
        self.pending = Some((reason.to_owned(), text, due));
    }

    /// Returns the text that is due, once.
    pub fn take_due(&mut self, now: Instant) -> Option<String> {
        let told = self.pending.take_if(|(_, _, due)| *due <= now)?;
        let text = told.1.clone();
        self.told = Some((told.0, told.1, now));
        Some(text)
    }

    /// Records that the job no longer waits.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// The reason why a reader receives no text at present.
#[derive(Debug)]
pub struct Situation {
    /// True if every change gets a line at once.
    notices: bool,
    /// True if standard error is a terminal.
    live: bool,
    /// The job named before each remark, for a command that follows several.
    subject: Option<JobId>,
    line: Option<Progress>,
    reasons: Reasons,
    reading: Option<Reading>,
}

/// Progress of a worker in reading a prompt.
#[derive(Debug)]
struct Reading {
    tokens_in: u32,
    last_line: Instant,
}

impl Situation {
    /// Returns a situation without any known reason.
    pub fn new(notices: bool) -> Self {
        Self {
            notices,
            live: io::stderr().is_terminal(),
            subject: None,
            line: None,
            reasons: Reasons::default(),
            reading: None,
        }
    }

    /// Returns a situation of one of several jobs, which its remarks name.
    pub fn of(job: JobId) -> Self {
        Self {
            subject: Some(job),
            ..Self::new(false)
        }
    }

    /// Updates the situation from an event of the job.
    pub fn take(&mut self, event: &TaskEvent, now: Instant) {
        match event {
            TaskEvent::Waiting(waiting) => self.waits(waiting, now),
            TaskEvent::Started(started) => self.reads(started.tokens_in, now),
            TaskEvent::Attempt(attempt) => self.reads(attempt.tokens_in, now),
            TaskEvent::Metrics(figures) => {
                self.progressed(figures.prefill_tokens, figures.tokens_out, now);
            }
            TaskEvent::Token(_) | TaskEvent::End(_) | TaskEvent::Error(_) => self.over(),
            TaskEvent::Queued(_) | TaskEvent::Lagged(_) | TaskEvent::Shutdown(_) => {}
        }
    }

    fn waits(&mut self, waiting: &TaskWaiting, now: Instant) {
        self.reading = None;
        self.show(&place(waiting));
        let explanation = &waiting.explanation;
        let hint = in_commands(&explanation.hint);
        let text = format!("waits: {} ({hint})", explanation.message);
        let delay = if self.notices {
            Duration::ZERO
        } else {
            WORTH_A_LINE
        };
        self.reasons
            .note(&format!("{:?}", explanation.reason), text, delay, now);
        self.tick(now);
    }

    /// Records that a worker reads a prompt of `tokens_in` tokens.
    fn reads(&mut self, tokens_in: u32, now: Instant) {
        self.over();
        self.reading = Some(Reading {
            tokens_in,
            last_line: now,
        });
        self.show("reading the prompt");
    }

    /// Records how much of the prompt is read, and how much of a continued text.
    fn progressed(&mut self, prefill_tokens: u32, tokens_out: u32, now: Instant) {
        let Some(reading) = &mut self.reading else {
            return;
        };
        let text = if tokens_out > 0 {
            format!(
                "reading the text so far, {} tokens",
                human_count(tokens_out.into())
            )
        } else {
            let (done, total) = (prefill_tokens.into(), reading.tokens_in.into());
            format!(
                "reading the prompt {}/{} tokens",
                human_count(done),
                human_count(total)
            )
        };
        if let Some(line) = &self.line {
            line.message(text);
        } else if now.duration_since(reading.last_line) >= READING_EVERY {
            reading.last_line = now;
            self.remark(&text);
        }
    }

    /// Ends the live line, because text comes or the job is over.
    pub fn over(&mut self) {
        self.line = None;
        self.reading = None;
        self.reasons.forget();
    }

    /// Returns the time at which [`Situation::tick`] has something to print.
    pub fn due(&self) -> Option<Instant> {
        self.reasons.pending.as_ref().map(|(_, _, due)| *due)
    }

    /// Prints the reason that is due.
    pub fn tick(&mut self, now: Instant) {
        if let Some(text) = self.reasons.take_due(now) {
            self.remark(&text);
        }
    }

    /// Prints a remark without disturbing the live line.
    pub fn remark(&self, text: &str) {
        let text = match self.subject {
            Some(job) => format!("{job} {text}"),
            None => text.to_owned(),
        };
        match &self.line {
            Some(line) => line.println(dim(&text)),
            None => note(dim(&text)),
        }
    }

    fn show(&mut self, text: &str) {
        if !self.live {
            return;
        }
        match &self.line {
            Some(line) => line.message(text),
            None => self.line = Some(progress::spinner(text)),
        }
    }
}

/// Formats the place of a waiting job in the queue, and the time until it starts.
fn place(waiting: &TaskWaiting) -> String {
    let before = match waiting.queue_position {
        0 => "waiting, first in the queue".to_owned(),
        1 => "waiting, 1 job before it".to_owned(),
        count => format!("waiting, {} jobs before it", human_count(count)),
    };
    match waiting.estimated_start_ms {
        Some(ms) if ms > 0 => {
            let left = human_duration(Duration::from_millis(ms));
            format!("{before}, about {left} left")
        }
        _ => before,
    }
}

fn dim(text: &str) -> String {
    paint::on_stderr(paint::Style::Dim, &sanitize::clean(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use orchestrator_core::scheduler::{Explanation, WaitReason};

    fn waiting(reason: WaitReason, message: &str) -> TaskWaiting {
        TaskWaiting {
            queue_position: 2,
            explanation: Explanation {
                reason,
                message: message.into(),
                hint: "h".into(),
                filters: Vec::new(),
            },
            estimated_start_ms: Some(75_000),
        }
    }

    fn told(situation: &Situation) -> Option<&str> {
        let told = situation.reasons.told.as_ref();
        told.map(|(_, text, _)| text.as_str())
    }

    // [LLORCH-039]
    #[test]
    fn a_reason_that_lasts_gets_one_line_and_a_passing_one_none() {
        let mut situation = Situation::new(false);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        situation.waits(&waiting(WaitReason::WorkerStarting, "5 %"), at(0));
        situation.waits(&waiting(WaitReason::WorkerStarting, "50 %"), at(900));
        assert_eq!((told(&situation), situation.due()), (None, Some(at(1_000))));
        situation.reads(3_000, at(950));
        assert_eq!((told(&situation), situation.due()), (None, None));

        situation.waits(&waiting(WaitReason::NoPool, "none"), at(2_000));
        situation.tick(at(3_000));
        assert_eq!(told(&situation), Some("waits: none (h)"));
        situation.waits(&waiting(WaitReason::NoPool, "none"), at(4_000));
        assert_eq!(situation.due(), None);
        // New numbers for the same reason wait for a minute; another reason waits for a second.
        situation.waits(&waiting(WaitReason::NoPool, "still none"), at(4_000));
        assert_eq!(situation.due(), Some(at(63_000)));
        situation.waits(&waiting(WaitReason::ModelMissing, "no model"), at(5_000));
        assert_eq!(situation.due(), Some(at(6_000)));
        situation.over();
        assert_eq!(situation.due(), None);
    }

    // [LLORCH-039]
    #[test]
    fn where_remarks_are_wanted_they_come_at_once() {
        let mut situation = Situation::new(true);
        let waits = waiting(WaitReason::NoPool, "none");
        situation.waits(&waits, Instant::now());
        assert_eq!(
            (told(&situation), situation.due()),
            (Some("waits: none (h)"), None)
        );
        assert_eq!(place(&waits), "waiting, 2 jobs before it, about 1m15s left");
    }
}
