//! The plan of the strikes, drawn from a seed before anything runs: the same seed gives the same plan.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt as _, SeedableRng as _};

/// A kind of part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// The `orchestratord` of the chain.
    Orchestratord,
    /// The `pool-managerd` of a pool host.
    PoolManager,
    /// A worker of any pool host.
    Worker,
}

impl Victim {
    /// All kinds of parts.
    pub const ALL: [Self; 3] = [Self::Orchestratord, Self::PoolManager, Self::Worker];

    /// Returns the program's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Orchestratord => "orchestratord",
            Self::PoolManager => "pool-managerd",
            Self::Worker => "llorch-candled",
        }
    }
}

/// The effect of a strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL, and a restart after a pause. Workers are not restarted here: their pool and the orchestrator do that.
    Kill {
        /// Pause before the restart, in milliseconds.
        away_ms: u64,
    },
    /// SIGSTOP, and SIGCONT after a pause.
    Freeze {
        /// Length of the pause, in milliseconds.
        for_ms: u64,
    },
}

/// A strike against one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strike {
    /// Undisturbed time before the strike, in milliseconds.
    pub after_ms: u64,
    /// Kind of the struck part.
    pub victim: Victim,
    /// Number of the struck part among those of its kind, taken modulo their count.
    pub which: usize,
    /// Kill or freeze.
    pub blow: Blow,
}

/// Returns strikes with this many kills among them. About one strike in five only freezes.
pub fn plan(seed: u64, kills: usize) -> Vec<Strike> {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    let mut strikes = Vec::new();
    let mut left = kills;
    while left > 0 {
        let victim = match dice.random_range(0..10) {
            0..4 => Victim::Orchestratord,
            4..6 => Victim::PoolManager,
            _ => Victim::Worker,
        };
        let blow = if dice.random_range(0..5) == 0 {
            Blow::Freeze {
                for_ms: dice.random_range(50..1500),
            }
        } else {
            left -= 1;
            // Usually at once, as a supervisor restarts; sometimes so late that heartbeats are missed.
            let longest = if dice.random_range(0..6) == 0 {
                2500
            } else {
                200
            };
            Blow::Kill {
                away_ms: dice.random_range(0..longest),
            }
        };
        // Usually during the recovery from the previous strike; sometimes while the system is at rest.
        let longest = if dice.random_range(0..4) == 0 {
            1500
        } else {
            400
        };
        let after_ms = dice.random_range(20..longest);
        strikes.push(Strike {
            after_ms,
            victim,
            which: dice.random_range(0..1000),
            blow,
        });
    }
    strikes
}
