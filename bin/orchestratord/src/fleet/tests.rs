use orchestrator_core::config::OrchestratorConfig;
use pool_core::api::pool::RegisterRequest;

use super::*;

fn registration(pool_id: &str, heartbeat_interval_ms: u64) -> RegisterRequest {
    RegisterRequest {
        pool_id: pool_id.into(),
        instance_id: format!("{pool_id}-1"),
        host_id: None,
        url: "http://127.0.0.1:9200".into(),
        api_version: POOL_API_VERSION,
        heartbeat_interval_ms,
    }
}

// [ORCHD-245] P10
#[test]
fn the_silence_of_a_pool_that_never_reports_is_noticed_in_time() {
    let now = clock::now();
    let fleet = Fleet::new(None, &OrchestratorConfig::default(), now);
    fleet.register(registration("slow", 60_000), now).unwrap();
    fleet.take_changes(now);
    let slow = fleet.next_change(now);
    fleet.register(registration("fast", 1_000), now).unwrap();
    let fast = fleet.next_change(now).unwrap();
    assert!(Some(fast) < slow, "{fast} is not before {slow:?}");
}
