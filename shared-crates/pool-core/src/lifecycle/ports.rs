//! The choice of a worker's port.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener};
use std::ops::RangeInclusive;

use super::SpawnError;
use crate::registry::WorkerRecord;

/// Returns the lowest port of `range` that is not in use by a live worker and that this worker has not yet found taken; `None`
/// if no port is left.
pub fn choose_port(
    range: RangeInclusive<u16>,
    in_use: &HashSet<u16>,
    tried: &[u16],
) -> Option<u16> {
    range
        .into_iter()
        .find(|port| !in_use.contains(port) && !tried.contains(port))
}

/// Returns the explicitly requested `port` if it is free. If another program takes it after this check, the worker itself
/// detects that.
pub(super) fn claimable(
    port: u16,
    records: &[WorkerRecord],
    bind: IpAddr,
) -> Result<u16, SpawnError> {
    if port == 0 {
        return Err(SpawnError::PortZero);
    }
    let mut live = records.iter().filter(|record| record.info.status.is_live());
    if let Some(owner) = live.find(|record| record.info.port == port) {
        let holder = owner.info.id.clone();
        return Err(SpawnError::PortTaken { port, holder });
    }
    match TcpListener::bind((bind, port)) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(SpawnError::PortTaken {
            port,
            holder: "another program".to_owned(),
        }),
        // The worker itself reports any other error.
        _ => Ok(port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-012]
    fn a_taken_port_is_refused_with_its_holder() {
        let here = IpAddr::from([127, 0, 0, 1]);
        let worker = crate::lifecycle::tests::record(3);
        let refusal = |port, records: &[WorkerRecord]| {
            claimable(port, records, here).unwrap_err().to_string()
        };
        assert_eq!(refusal(0, &[]), "`port` is 0, but must be 1 to 65535");
        let port = worker.info.port;
        assert_eq!(
            refusal(port, &[worker]),
            format!("port {port} is taken by worker-cpu-3")
        );
        let squatter = TcpListener::bind((here, 0)).unwrap();
        let port = squatter.local_addr().unwrap().port();
        assert_eq!(
            refusal(port, &[]),
            format!("port {port} is taken by another program")
        );
        drop(squatter);
        assert_eq!(claimable(port, &[], here).unwrap(), port);
    }

    #[test] // [POOLD-012]
    fn the_lowest_port_that_is_free_and_was_not_found_taken() {
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
