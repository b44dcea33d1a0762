//! Sampling: drawing the next token from logits.
//!
//! The steps, in this order, each according to its definition:
//!
//! 1. **repetition penalty** θ (Keskar et al. 2019): the logit of every token in the prompt or the text so far is divided by θ
//!    if it is positive, and multiplied by θ if it is negative;
//! 2. **temperature** T: 0 takes the largest logit (of equal ones the lowest id) and ends here, else logits are divided by T. A
//!    penalty so small that the largest logit is no longer finite has the effect of 0, because no probabilities are left;
//! 3. **top_k**: the k largest logits remain;
//! 4. **top_p** (Holtzman et al. 2020): of the remaining probabilities, the fewest largest whose sum is at least p remain;
//! 5. **min_p** (Nguyen et al. 2024): tokens at least p times as likely as the likeliest remain;
//! 6. one of the remaining tokens is **drawn** by its probability.
//!
//! Of equal logits, the lower id counts as larger everywhere. The random number of a token depends only on the seed and on the
//! token's position in the answer, so a resumed job draws the tokens that it would have drawn without interruption.

use std::cell::RefCell;
use std::cmp::Ordering;

use pool_core::api::worker::Sampling;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

use crate::backend::cpu::lanes::{Kernel, Lanes, Tier};

/// Number of likeliest candidates that are sorted first when only the likeliest part is wanted.
const FIRST_PART: usize = 64;

/// Reason why no token can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SamplingError {
    /// A logit is not a number.
    #[error("the logit of token {id} is not a number")]
    NotANumber {
        /// Id of the token.
        id: usize,
    },
    /// The vocabulary is empty.
    #[error("there are no logits")]
    NoLogits,
}

/// A candidate: its id, and its logit after penalty and temperature, relative to the largest logit, which becomes 0.
type Candidate = (u32, f32);

/// Draws the token at `position` of the answer, from 0. `seen` are all tokens of the prompt and the answer so far, in any
/// order. Fails if a logit is not a number, or if `logits` is empty.
pub fn sample(
    logits: &mut [f32],
    seen: impl IntoIterator<Item = u32>,
    sampling: &Sampling,
    seed: u64,
    position: u64,
) -> Result<u32, SamplingError> {
    if let Some(id) = logits.iter().position(|logit| logit.is_nan()) {
        return Err(SamplingError::NotANumber { id });
    }
    penalise(logits, seen, sampling.repetition_penalty);
    let Some(likeliest) = argmax(logits) else {
        return Err(SamplingError::NoLogits);
    };
    let largest = logits[likeliest as usize];
    if sampling.temperature == 0.0 || !largest.is_finite() {
        return Ok(likeliest);
    }
    let random = uniform(seed, position);
    let nothing_filtered = sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p <= 0.0;
    if nothing_filtered {
        let id = draw_any(logits, largest, sampling.temperature, random);
        return Ok(id.unwrap_or(likeliest));
    }
    let scaled = logits
        .iter()
        .map(|logit| scale(*logit, largest, sampling.temperature));
    let mut candidates: Vec<Candidate> = (0u32..).zip(scaled).collect();
    keep_top_k(&mut candidates, sampling.top_k as usize);
    keep_top_p(&mut candidates, f64::from(sampling.top_p));
    keep_min_p(&mut candidates, f64::from(sampling.min_p));
    // Drawing in order of ids, as without filters, so that a filter that removes nothing changes nothing.
    candidates.sort_unstable_by_key(|(id, _)| *id);
    Ok(draw(&candidates, random).unwrap_or(likeliest))
}

/// Returns the logit minus the largest one, divided by the temperature. However small the temperature, the largest logit
/// becomes 0 and smaller ones negative, at worst minus infinity.
#[inline(always)]
fn scale(logit: f32, largest: f32, temperature: f32) -> f32 {
    (logit - largest) / temperature
}

/// Returns a number in [0, 1) that depends only on the seed and the position.
fn uniform(seed: u64, position: u64) -> f64 {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(position);
    // The 53 highest bits: as many as a double represents exactly.
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn penalise(logits: &mut [f32], seen: impl IntoIterator<Item = u32>, penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut done = vec![false; logits.len()];
    for id in seen {
        let index = id as usize;
        // Each token counts once, however often it appeared.
        if done.get(index).is_none_or(|done| *done) {
            continue;
        }
        done[index] = true;
        let logit = &mut logits[index];
        *logit = if *logit > 0.0 {
            *logit / penalty
        } else {
            *logit * penalty
        };
    }
}

fn argmax(logits: &[f32]) -> Option<u32> {
    let best = (0u32..)
        .zip(logits)
        .min_by(|a, b| larger_first(&(a.0, *a.1), &(b.0, *b.1)));
    best.map(|(id, _)| id)
}

/// Orders larger logits first, and equal ones by ascending id.
fn larger_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.partial_cmp(&a.1)
        .unwrap_or(Ordering::Equal)
        .then(a.0.cmp(&b.0))
}

fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    candidates.select_nth_unstable_by(k - 1, larger_first);
    candidates.truncate(k);
}

/// Returns the weight of a candidate: the exponential of its logit, which is 1 for the likeliest token.
///
/// A vocabulary has up to 262,144 candidates for each token of an answer. The code has no branch, so that the compiler computes
/// several at once. It consists only of sums and products, each rounded as IEEE 754 requires, so that every system computes the
/// same bits, which the standard library's function does not guarantee.
#[inline(always)]
fn weight(logit: f32) -> f64 {
    /// ln 2 in two parts: one with so few digits that its products with whole numbers are exact, and the rest.
    const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10];
    /// Constant that rounds to a whole number when added and subtracted. In between, the lowest bits are that number.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    /// Lower bound of exponents: exp(-708) is near the least number of full precision.
    const LEAST: f64 = -708.0;
    // 1/n! for n from 13 down to 0: enough terms for the range of `rest`.
    const TERMS: [f64; 14] = [
        1.605_904_383_682_161_3e-10,
        2.087_675_698_786_81e-9,
        2.505_210_838_544_172e-8,
        2.755_731_922_398_589_3e-7,
        2.755_731_922_398_589e-6,
        2.480_158_730_158_73e-5,
        1.984_126_984_126_984e-4,
        1.388_888_888_888_889e-3,
        8.333_333_333_333_333e-3,
        4.166_666_666_666_666_4e-2,
        0.166_666_666_666_666_66,
        0.5,
        1.0,
        1.0,
    ];
    let x = f64::from(logit);
    let bounded = if x > LEAST { x } else { LEAST };
    let rounded = bounded * std::f64::consts::LOG2_E + ROUND;
    let whole = rounded - ROUND;
    let rest = bounded - whole * LN_2[0] - whole * LN_2[1];
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum * rest + term;
    }
    // Shifted into the place of the exponent, the whole number with its bias becomes a power of two.
    let power = f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52);
    let result = sum * power;
    if x > LEAST { result } else { 0.0 }
}

/// Returns the weights of all candidates.
fn weights(candidates: &[Candidate]) -> Vec<f64> {
    candidates.iter().map(|(_, logit)| weight(*logit)).collect()
}

fn keep_top_p(candidates: &mut Vec<Candidate>, p: f64) {
    if p >= 1.0 {
        return;
    }
    // Sum in order of ids, so that the sum doesn't depend on how the candidates were selected.
    candidates.sort_unstable_by_key(|(id, _)| *id);
    let goal = p * weights(candidates).iter().sum::<f64>();
    let mut sum = 0.0;
    let mut ordered = 0;
    let mut part = FIRST_PART;
    // The likeliest few usually reach the sum, so only as many as needed are sorted.
    while ordered < candidates.len() {
        let end = candidates.len().min(ordered + part);
        let rest = &mut candidates[ordered..];
        if end - ordered < rest.len() {
            rest.select_nth_unstable_by(end - ordered - 1, larger_first);
        }
        rest[..end - ordered].sort_unstable_by(larger_first);
        for index in ordered..end {
            sum += weight(candidates[index].1);
            if sum >= goal {
                candidates.truncate(index + 1);
                return;
            }
        }
        ordered = end;
        part *= 4;
    }
}

fn keep_min_p(candidates: &mut Vec<Candidate>, p: f64) {
    if p > 0.0 {
        candidates.retain(|(_, logit)| weight(*logit) >= p);
    }
}

fn draw(candidates: &[Candidate], uniform: f64) -> Option<u32> {
    let index = draw_weight(&weights(candidates), uniform)?;
    candidates.get(index).map(|(id, _)| *id)
}

/// Draws from all tokens, as [`draw`] does if every token is a candidate.
fn draw_any(logits: &[f32], largest: f32, temperature: f32, uniform: f64) -> Option<u32> {
    thread_local! {
        /// Buffer of megabytes, kept because a request to the system for every token would be slow.
        static WEIGHTS: RefCell<Vec<f64>> = const { RefCell::new(Vec::new()) };
    }
    WEIGHTS.with_borrow_mut(|weights| {
        weights.resize(logits.len(), 0.0);
        // Every tier computes the same bits.
        Tier::best().run(Weigh {
            logits,
            largest,
            temperature,
            weights,
        });
        draw_weight(weights, uniform).and_then(|index| u32::try_from(index).ok())
    })
}

/// A kernel that computes the weights of all logits.
struct Weigh<'a> {
    logits: &'a [f32],
    largest: f32,
    temperature: f32,
    weights: &'a mut [f64],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for (to, logit) in self.weights.iter_mut().zip(self.logits) {
            *to = weight(scale(*logit, self.largest, self.temperature));
        }
    }
}

/// Draws an index by its weight. Returns `None` if `weights` is empty.
fn draw_weight(weights: &[f64], uniform: f64) -> Option<usize> {
    let goal = uniform * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    for (index, weight) in weights.iter().enumerate() {
        sum += weight;
        if sum > goal {
            return Some(index);
        }
    }
    // Rounding kept the sum from exceeding the goal, so the last index is drawn.
    weights.len().checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test] // [CAND-040]
    fn weights_are_exponentials() {
        let logits = (0..200_000).map(|i| -(i as f32) * 0.0036);
        for logit in logits.chain([-0.0, 1e-30, -707.9, -f32::MIN_POSITIVE]) {
            let exact = f64::from(logit).exp();
            let error = (weight(logit) - exact).abs() / exact;
            assert!(error < 5e-16 || exact < 1e-307, "{logit}: {error}");
        }
        for logit in [-709.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(weight(logit), 0.0);
        }
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, -1.0, 2.0, 0.0];

    fn plain() -> Sampling {
        Sampling {
            temperature: 1.0,
            ..Sampling::default()
        }
    }

    fn draw_with(
        logits: &[f32],
        seen: &[u32],
        sampling: &Sampling,
        seed: u64,
        position: u64,
    ) -> u32 {
        sample(
            &mut logits.to_vec(),
            seen.iter().copied(),
            sampling,
            seed,
            position,
        )
        .unwrap()
    }

    /// Returns the share of each token in the draws of many positions.
    fn shares(logits: &[f32], seen: &[u32], sampling: &Sampling) -> BTreeMap<u32, f64> {
        const DRAWS: u64 = 20_000;
        let mut counts = BTreeMap::new();
        for position in 0..DRAWS {
            *counts
                .entry(draw_with(logits, seen, sampling, 7, position))
                .or_insert(0.0) += 1.0 / DRAWS as f64;
        }
        counts
    }

    fn expected(logits: &[f32], keep: &[u32]) -> BTreeMap<u32, f64> {
        let total: f64 = keep
            .iter()
            .map(|id| f64::from(logits[*id as usize]).exp())
            .sum();
        keep.iter()
            .map(|id| (*id, f64::from(logits[*id as usize]).exp() / total))
            .collect()
    }

    fn assert_close(found: &BTreeMap<u32, f64>, expected: &BTreeMap<u32, f64>) {
        assert!(
            found.keys().eq(expected.keys()),
            "{found:?} instead of {expected:?}"
        );
        for (id, share) in expected {
            assert!(
                (found[id] - share).abs() < 0.015,
                "{found:?} instead of {expected:?}"
            );
        }
    }

    // [CAND-040]
    #[test]
    fn tokens_are_drawn_by_their_probability() {
        assert_close(
            &shares(&LOGITS, &[], &plain()),
            &expected(&LOGITS, &[0, 1, 2, 3, 4]),
        );
    }

    // [CAND-041]
    #[test]
    fn temperature_divides_logits_and_0_takes_the_largest() {
        let half = Sampling {
            temperature: 0.5,
            ..plain()
        };
        let doubled = LOGITS.map(|l| l * 2.0);
        assert_close(
            &shares(&LOGITS, &[], &half),
            &expected(&doubled, &[0, 1, 2, 3, 4]),
        );
        let greedy = Sampling {
            temperature: 0.0,
            ..plain()
        };
        assert_eq!(draw_with(&LOGITS, &[], &greedy, 1, 1), 1);
        assert_eq!(
            draw_with(&[0.0, 5.0, 5.0], &[], &greedy, 1, 1),
            1,
            "the lowest id wins a tie"
        );
    }

    // [CAND-041]
    #[test]
    fn a_tiny_temperature_acts_like_0() {
        for temperature in [f32::MIN_POSITIVE, 1e-38, 1e-45, 1e-20] {
            for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (2, 0.9, 0.1)] {
                let cold = Sampling {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    ..plain()
                };
                for logits in [LOGITS, LOGITS.map(|l| l - 5.0), LOGITS.map(|l| l * 1e30)] {
                    for position in 0..20 {
                        let drawn = draw_with(&logits, &[], &cold, 7, position);
                        assert_eq!(drawn, 1, "{cold:?} {logits:?}");
                    }
                }
            }
        }
    }

    // [CAND-045]
    #[test]
    fn a_penalty_that_leaves_no_finite_number_takes_the_largest() {
        let tiny = Sampling {
            repetition_penalty: f32::MIN_POSITIVE,
            ..plain()
        };
        let logits = [1.0, 30.0, -1.0, 2.0, 0.0];
        for position in 0..20 {
            assert_eq!(draw_with(&logits, &[1, 2], &tiny, 7, position), 1);
        }
        let nothing_left = [f32::NEG_INFINITY; 3];
        assert_eq!(draw_with(&nothing_left, &[], &plain(), 7, 0), 0);
    }

    // [CAND-042]
    #[test]
    fn top_k_keeps_exactly_k() {
        let two = Sampling {
            top_k: 2,
            ..plain()
        };
        assert_close(&shares(&LOGITS, &[], &two), &expected(&LOGITS, &[1, 3]));
        assert_close(
            &shares(&[1.0, 1.0, 1.0], &[], &two),
            &BTreeMap::from([(0, 0.5), (1, 0.5)]),
        );
    }

    // [CAND-043]
    #[test]
    fn top_p_keeps_the_fewest_that_reach_the_sum() {
        // The logits 3, 2 and 1 have probabilities 0.64, 0.23 and 0.09.
        for (p, keep) in [(0.6, &[1][..]), (0.7, &[1, 3]), (0.9, &[0, 1, 3])] {
            let sampling = Sampling {
                top_p: p,
                ..plain()
            };
            assert_close(&shares(&LOGITS, &[], &sampling), &expected(&LOGITS, keep));
        }
    }

    // [CAND-043]
    #[test]
    fn top_p_over_a_flat_vocabulary_keeps_its_share() {
        let mut candidates: Vec<Candidate> = (0..1000).map(|id| (id, 0.0)).collect();
        keep_top_p(&mut candidates, 0.5);
        let mut ids: Vec<u32> = candidates.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..500).collect::<Vec<_>>());
    }

    // [CAND-044]
    #[test]
    fn min_p_compares_with_the_likeliest() {
        // Relative to the logit 3, the logit 2 has e^-1 = 0.37 and the logit 1 has 0.14.
        for (p, keep) in [(0.4, &[1][..]), (0.3, &[1, 3]), (0.1, &[0, 1, 3])] {
            let sampling = Sampling {
                min_p: p,
                ..plain()
            };
            assert_close(&shares(&LOGITS, &[], &sampling), &expected(&LOGITS, keep));
        }
    }

    // [CAND-045]
    #[test]
    fn the_penalty_divides_positive_and_multiplies_negative_logits_once() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            ..plain()
        };
        let penalised = [1.0, 1.5, -2.0, 2.0, 0.0];
        assert_close(
            &shares(&LOGITS, &[1, 2, 1, 4, 1], &sampling),
            &expected(&penalised, &[0, 1, 2, 3, 4]),
        );
        let greedy = Sampling {
            temperature: 0.0,
            ..sampling
        };
        assert_eq!(
            draw_with(&LOGITS, &[1], &greedy, 1, 1),
            3,
            "the penalty also applies at temperature 0"
        );
        assert_eq!(
            draw_with(&LOGITS, &[99], &greedy, 1, 1),
            1,
            "ids beyond the vocabulary change nothing"
        );
    }

    // [CAND-046]
    #[test]
    fn the_draw_depends_on_seed_and_position_alone() {
        let flat = [0.0; 50];
        let draws = |seed: u64| {
            (0..64)
                .map(|p| draw_with(&flat, &[], &plain(), seed, p))
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        assert!(draws(1).windows(2).any(|pair| pair[0] != pair[1]));
    }

    // [CAND-047]
    #[test]
    fn filters_that_remove_nothing_change_nothing() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let nothing = Sampling {
            top_k: 300,
            top_p: 0.999_999_94,
            min_p: 1e-9,
            ..plain()
        };
        for position in 0..200 {
            assert_eq!(
                draw_with(&logits, &[], &plain(), 3, position),
                draw_with(&logits, &[], &nothing, 3, position)
            );
        }
    }

    #[test]
    fn nan_or_missing_logits_are_an_error() {
        assert!(sample(&mut [0.0, f32::NAN], [], &plain(), 1, 1).is_err());
        assert!(sample(&mut [], [], &plain(), 1, 1).is_err());
    }
}
