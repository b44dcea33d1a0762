//! Ranges of sampling settings, the same for tasks and for the executions of workers.

/// A sampling setting and its range.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Name of the setting in requests.
    pub name: &'static str,
    /// Range in words, as in "must be ...".
    pub range: &'static str,
    contains: fn(f64) -> bool,
}

impl Setting {
    /// Returns whether the value is in range. NaN is not, because every comparison with it is false.
    pub fn contains(&self, value: f64) -> bool {
        (self.contains)(value)
    }
}

/// Range of `temperature`.
pub const TEMPERATURE: Setting = Setting {
    name: "temperature",
    range: "from 0 to 2",
    contains: |value| (0.0..=2.0).contains(&value),
};

/// Range of `top_p`.
pub const TOP_P: Setting = Setting {
    name: "top_p",
    range: "above 0 and at most 1",
    contains: |value| value > 0.0 && value <= 1.0,
};

/// Range of `min_p`.
pub const MIN_P: Setting = Setting {
    name: "min_p",
    range: "at least 0 and below 1",
    contains: |value| (0.0..1.0).contains(&value),
};

/// Range of `repetition_penalty`.
pub const REPETITION_PENALTY: Setting = Setting {
    name: "repetition_penalty",
    range: "above 0 and at most 2",
    contains: |value| value > 0.0 && value <= 2.0,
};
