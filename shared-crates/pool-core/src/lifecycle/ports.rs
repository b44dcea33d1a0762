//! Which port a worker gets.

use std::collections::HashSet;
use std::ops::RangeInclusive;

/// The lowest port of `range` that no live worker has and that this worker has not found taken; `None` when there is
/// none left.
pub fn choose_port(
    range: RangeInclusive<u16>,
    in_use: &HashSet<u16>,
    tried: &[u16],
) -> Option<u16> {
    range
        .into_iter()
        .find(|port| !in_use.contains(port) && !tried.contains(port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-012]
    fn the_lowest_port_nobody_has_or_found_taken() {
        let in_use = HashSet::from([8001, 8003]);
        assert_eq!(choose_port(8001..=8999, &HashSet::new(), &[]), Some(8001));
        assert_eq!(choose_port(8001..=8999, &in_use, &[8002]), Some(8004));
        assert_eq!(choose_port(8001..=8003, &in_use, &[8002]), None);
        assert_eq!(
            choose_port(65535..=65535, &HashSet::new(), &[]),
            Some(65535)
        );
    }
}
