//! Sampling settings of a job, as requested by the client.

use pool_core::api::sampling::{MIN_P, REPETITION_PENALTY, Setting, TEMPERATURE, TOP_P};
use pool_core::api::worker;
use serde::{Deserialize, Serialize};

/// Sampling settings. Clients read back the exact numbers they sent; workers get them rounded to their own precision.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Sampling {
    /// Sampling temperature, 0 to 2; 0 always takes the most likely token.
    pub temperature: f64,
    /// Nucleus size, (0, 1]: keep the most likely tokens whose probabilities add up to this; 1 keeps all.
    pub top_p: f64,
    /// Number of most likely tokens to keep; 0 keeps all.
    pub top_k: u32,
    /// Lowest probability to keep, relative to the most likely token, [0, 1); 0 keeps all.
    pub min_p: f64,
    /// Penalty on tokens seen before, (0, 2]: positive logits are divided by it, negative ones multiplied; 1 changes nothing.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.7,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

impl Sampling {
    /// Returns the same settings for a worker, which computes in 32-bit floats.
    pub fn for_worker(&self) -> worker::Sampling {
        worker::Sampling {
            temperature: narrow(self.temperature, TEMPERATURE),
            top_p: narrow(self.top_p, TOP_P),
            top_k: self.top_k,
            min_p: narrow(self.min_p, MIN_P),
            repetition_penalty: narrow(self.repetition_penalty, REPETITION_PENALTY),
        }
    }
}

/// Returns the 32-bit float nearest to `value` that is in the setting's range: rounding must not turn a value close to an open end
/// into the end itself.
fn narrow(value: f64, setting: Setting) -> f32 {
    #[allow(clippy::cast_possible_truncation)] // Rounding is the purpose.
    let near = value as f32;
    let inside = [near, near.next_up(), near.next_down()];
    let fits = |near: &f32| setting.contains(f64::from(*near));
    inside.into_iter().find(fits).unwrap_or(near)
}

#[cfg(test)]
mod tests {
    use super::*;

    // [ORCHCORE-014]
    #[test]
    fn workers_get_the_nearest_number_that_is_in_range() {
        let asked = Sampling {
            temperature: 0.123_456_789,
            top_p: 1e-60,
            top_k: 3,
            min_p: 0.999_999_999_9,
            repetition_penalty: 1.1,
        };
        let given = asked.for_worker();
        assert_eq!(
            (given.temperature, given.top_k, given.repetition_penalty),
            (0.123_456_79, 3, 1.1)
        );
        assert!(given.top_p > 0.0 && given.top_p < 1e-40, "{}", given.top_p);
        assert!(
            given.min_p < 1.0 && given.min_p > 0.999_999,
            "{}",
            given.min_p
        );
        assert_eq!(
            Sampling::default().for_worker(),
            worker::Sampling::default()
        );
    }
}
