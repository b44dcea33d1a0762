//! Cosines and sines of the rotary position embedding (Su et al. 2021).

use super::description::Description;
use super::places::VectorPlace;

/// Angles of the rotated pairs per step of position, and the factor of their cosines and sines, for each rotation of a model.
#[derive(Debug, Clone)]
pub struct Angles {
    rotations: Vec<(Vec<f64>, f64)>,
}

impl Angles {
    /// Prepares the rotations of a model. `read` returns the vector at a place, which has one number for each pair.
    ///
    /// # Errors
    ///
    /// Fails if `read` does.
    pub fn new<E>(
        description: &Description,
        mut read: impl FnMut(&VectorPlace) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let width = description.rope_dim;
        let rotations = description.rotations.iter().map(|rotation| {
            let place = rotation.factors.map(|name| VectorPlace {
                name: name.to_owned(),
                length: width / 2,
            });
            let factors = place.as_ref().map(&mut read).transpose()?;
            let step = |pair: usize| {
                let exponent = (2 * pair) as f64 / width as f64;
                let factor = factors.as_ref().and_then(|factors| factors.get(pair));
                let factor = factor.copied().map_or(1.0, f64::from);
                // The standard library's functions differ between systems in the last place.
                1.0 / (libm::pow(rotation.base, exponent) * factor * rotation.divisor)
            };
            Ok(((0..width / 2).map(step).collect(), rotation.magnitude))
        });
        Ok(Self {
            rotations: rotations.collect::<Result<_, _>>()?,
        })
    }

    /// Returns the number of rotations.
    pub fn rotations(&self) -> usize {
        self.rotations.len()
    }

    /// Returns the cosine and sine of each pair's angle at a position, multiplied by the rotation's factor.
    pub fn at(&self, rotation: usize, position: usize) -> impl Iterator<Item = (f32, f32)> + '_ {
        let (steps, magnitude) = &self.rotations[rotation];
        steps.iter().map(move |step| {
            let (sine, cosine) = libm::sincos(position as f64 * step);
            ((cosine * magnitude) as f32, (sine * magnitude) as f32)
        })
    }
}
