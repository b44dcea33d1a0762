//! Which part is struck when, drawn from a seed before anything runs: the same seed, the same plan.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt as _, SeedableRng as _};

/// A kind of part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// The orchestrator.
    Orchestratord,
    /// A `pool-managerd`.
    PoolManager,
    /// A worker.
    Worker,
}

impl Victim {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Orchestratord, Self::PoolManager, Self::Worker];

    /// The program's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Orchestratord => "orchestratord",
            Self::PoolManager => "pool-managerd",
            Self::Worker => "llorch-candled",
        }
    }
}

/// What is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL, and a start after so many milliseconds. The start of a worker is its pool's and the orchestrator's business.
    Kill {
        /// How long the part stays away.
        away_ms: u64,
    },
    /// SIGSTOP, and SIGCONT after so many milliseconds.
    Freeze {
        /// How long it stands still.
        for_ms: u64,
    },
}

/// One strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strike {
    /// How long the system runs undisturbed before it.
    pub after_ms: u64,
    /// Which kind of part.
    pub victim: Victim,
    /// Which one of those there are, counted round.
    pub which: usize,
    /// What is done.
    pub blow: Blow,
}

/// Strikes with so many kills among them; one in five strikes only freezes.
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
            // Mostly at once, as a supervisor does; sometimes so late that heartbeats are missed.
            let longest = if dice.random_range(0..6) == 0 {
                2500
            } else {
                200
            };
            Blow::Kill {
                away_ms: dice.random_range(0..longest),
            }
        };
        // Mostly into the midst of the recovery from the strike before; sometimes into a system at peace.
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
