//! Errors together with their causes.

use std::error::Error;

/// Returns the causes of an error, nearest first.
pub fn causes(error: &dyn Error) -> impl Iterator<Item = String> {
    std::iter::successors(error.source(), |cause| (*cause).source()).map(ToString::to_string)
}

/// Returns an error and its causes in one line.
pub fn with_causes(error: &dyn Error) -> String {
    causes(error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<Layer>>);

    #[test]
    fn the_nearest_cause_comes_first() {
        let error = Layer(
            "no model",
            Some(Box::new(Layer(
                "no file",
                Some(Box::new(Layer("no disk", None))),
            ))),
        );
        assert_eq!(causes(&error).collect::<Vec<_>>(), ["no file", "no disk"]);
        assert_eq!(with_causes(&error), "no model: no file: no disk");
    }
}
