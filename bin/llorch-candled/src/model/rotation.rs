//! Rotations of queries and keys by position, from the header of a model.

use pool_core::catalog::gguf::{GgufError, GgufFile, Value};
use pool_core::catalog::support::{self, Architecture};

use super::description::{DescriptionError, positive, size};
use super::places::ROPE_FACTORS;

/// The angles by which positions rotate queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotation {
    /// Base of the frequencies.
    pub base: f64,
    /// Divisor of positions (linear scaling; 1 for most models).
    pub divisor: f64,
    /// Tensor with a divisor for each frequency, if the file has one.
    pub factors: Option<&'static str>,
    /// Factor of cosines and sines (1 for most models).
    pub magnitude: f64,
}

impl Rotation {
    /// Returns the rotation that a header describes, for a model of at most `available` positions of which `context` are
    /// served.
    ///
    /// # Errors
    ///
    /// Fails if a number can't be right, or if the context was stretched in a way that the decoder doesn't compute.
    pub(super) fn from_header(
        header: &GgufFile,
        architecture: &Architecture,
        available: usize,
        context: usize,
    ) -> Result<Self, DescriptionError> {
        let (factors, magnitude) = if support::has_long_rope(header, architecture)? {
            let (factors, magnitude) = long_rope(header, available, context)?;
            (Some(factors), magnitude)
        } else {
            (header.tensor(ROPE_FACTORS).map(|_| ROPE_FACTORS), 1.0)
        };
        Ok(Self {
            base: positive("rope.freq_base", header, 10_000.0)?,
            divisor: divisor(header, architecture)?,
            factors,
            magnitude,
        })
    }
}

/// Returns the divisor of positions for linear scaling, else 1. Other ways of stretching a context change the computation, and
/// a model that needs one would answer nonsense without it, so unsupported ways are refused by name.
fn divisor(header: &GgufFile, architecture: &Architecture) -> Result<f64, DescriptionError> {
    let key = format!("{}.rope.scaling.type", architecture.name);
    match header.metadata().get(&key) {
        None => Ok(1.0),
        Some(Value::String(kind)) if kind == "linear" => {
            positive("rope.scaling.factor", header, 1.0)
        }
        Some(Value::String(kind)) if architecture.has_scaling(kind) => Ok(1.0),
        Some(Value::String(kind)) => Err(DescriptionError::Feature {
            feature: format!("rope scaling of type `{kind}`"),
        }),
        Some(_) => Err(DescriptionError::Header(GgufError::WrongValue {
            key,
            expected: "a text".to_owned(),
            found: "something else".to_owned(),
        })),
    }
}

/// Returns the tensor with the divisors, and the factor of cosines and sines, of a model with LongRoPE.
///
/// Such a model has one set of divisors for the context of its first training, and one for longer contexts (Ding et al. 2024).
/// The cache holds keys after their rotation, so a sequence can't change from one set to the other: the context to serve
/// decides, for as long as the model is loaded.
fn long_rope(
    header: &GgufFile,
    available: usize,
    context: usize,
) -> Result<(&'static str, f64), DescriptionError> {
    let original = match header.get_arch::<u64>("rope.scaling.original_context_length")? {
        Some(original) => size("original context length", original)?,
        None => available,
    };
    if original < 2 {
        return Err(DescriptionError::Size {
            what: "original context length",
            found: original as u64,
            expected: "it must be at least 2".to_owned(),
        });
    }
    let factors = if context > original {
        support::LONG_FACTORS
    } else {
        support::SHORT_FACTORS
    };
    let default = long_magnitude(available, original);
    let magnitude = positive("rope.scaling.attn_factor", header, default)?;
    Ok((factors, magnitude))
}

/// Returns the factor that compensates for the spread of attention over a longer context: √(1 + ln s / ln L), where s is the
/// available context divided by the original one, L > 1. Source: `_compute_longrope_parameters` of the `transformers` library.
fn long_magnitude(available: usize, original: usize) -> f64 {
    if available <= original {
        return 1.0;
    }
    let scale = available as f64 / original as f64;
    libm::sqrt(1.0 + libm::log(scale) / libm::log(original as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [CAND-091]
    fn the_magnitude_of_a_long_context_is_that_of_the_published_models() {
        // Phi-3.5-mini and Phi-4-mini: 128k, extended from 4k.
        assert!((long_magnitude(131_072, 4096) - 1.190_238).abs() < 1e-6);
        assert_eq!(long_magnitude(4096, 4096), 1.0);
    }
}
