//! Liveness of pools, judged by the age of their heartbeats.

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// State of contact with a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum PoolLiveness {
    /// Heartbeats arrive on time.
    Online,
    /// One heartbeat is missing. The pool gets no new work.
    Suspect,
    /// Three heartbeats are missing.
    Offline,
    /// The pool is registered, but no heartbeat of this registration has arrived yet. The pool gets no work. Becomes `Online`
    /// or `Offline`.
    Awaited,
    /// The pool stopped on purpose less than three heartbeats ago. It gets no work, but may return soon.
    Stopped,
}

impl PoolLiveness {
    /// Returns the name used on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Suspect => "suspect",
            Self::Offline => "offline",
            Self::Awaited => "awaited",
            Self::Stopped => "stopped",
        }
    }

    /// Judges a pool by the age of its latest heartbeat. A heartbeat counts as missing half an interval after it was due, so
    /// that a slightly late one changes nothing.
    pub fn judge(last_heartbeat: Timestamp, interval: SignedDuration, now: Timestamp) -> Self {
        let missed_after = |count: i32| interval * count + interval / 2;
        let age = now.duration_since(last_heartbeat);
        if age > missed_after(3) {
            Self::Offline
        } else if age > missed_after(1) {
            Self::Suspect
        } else {
            Self::Online
        }
    }

    /// Returns the times after a heartbeat at which the result of [`PoolLiveness::judge`] changes: to `Suspect`, then to
    /// `Offline`.
    pub fn deadlines(last_heartbeat: Timestamp, interval: SignedDuration) -> [Timestamp; 2] {
        let just_past = SignedDuration::from_millis(1);
        [1, 3].map(|count| {
            last_heartbeat
                .saturating_add(interval * count + interval / 2 + just_past)
                .unwrap_or(Timestamp::MAX)
        })
    }
}

impl fmt::Display for PoolLiveness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // [ORCHCORE-030]
    #[test]
    fn one_missed_heartbeat_is_suspect_and_three_are_offline() {
        let start = Timestamp::from_second(1_000).unwrap();
        let interval = SignedDuration::from_secs(10);
        let after = |s: i64| {
            PoolLiveness::judge(start, interval, Timestamp::from_second(1_000 + s).unwrap())
        };
        assert_eq!([after(0), after(15)], [PoolLiveness::Online; 2]);
        assert_eq!([after(16), after(35)], [PoolLiveness::Suspect; 2]);
        assert_eq!(after(36), PoolLiveness::Offline);
        // Setting the clock back must not take a pool offline.
        assert_eq!(after(-100), PoolLiveness::Online);
        let states = PoolLiveness::deadlines(start, interval)
            .map(|at| PoolLiveness::judge(start, interval, at));
        assert_eq!(states, [PoolLiveness::Suspect, PoolLiveness::Offline]);
    }
}
