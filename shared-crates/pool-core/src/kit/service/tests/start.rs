//! Addresses and state folders of a starting daemon.

use super::*;

#[tokio::test] // [POOLCORE-067]
async fn binding_needs_a_token_off_loopback_and_a_free_port() {
    let any = "0.0.0.0:0".parse().unwrap();
    let error = Service::bind(any, options()).await.unwrap_err();
    assert!(matches!(error, BindError::Exposed { .. }) && error.hint().unwrap().contains("token"));
    let open = Service::bind(
        any,
        ServiceOptions {
            token: Some(Secret::new("t")),
            ..options()
        },
    )
    .await
    .unwrap();
    assert_eq!(
        open.url(),
        format!("http://127.0.0.1:{}", open.local_addr().port())
    );

    let taken = Service::bind("127.0.0.1:0".parse().unwrap(), options())
        .await
        .unwrap();
    let error = Service::bind(taken.local_addr(), options())
        .await
        .unwrap_err();
    assert!(matches!(error, BindError::InUse { addr } if addr == taken.local_addr()));
}

#[test] // [POOLCORE-068] [P13]
fn a_state_folder_has_one_daemon() {
    use crate::kit::run_files::{self, PidRecord};
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let files = RunFiles::claim(&state, "testd", "1.2.3").unwrap();
    files.write_addr("0.0.0.0:8080".parse().unwrap()).unwrap();
    assert_eq!(
        run_files::local_url(&state).unwrap(),
        "http://127.0.0.1:8080"
    );
    assert_eq!(PidRecord::read(&state).unwrap().version, "1.2.3");

    let error = RunFiles::claim(&state, "testd", "1.2.3").unwrap_err();
    assert!(
        matches!(error, ClaimError::Held { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains(&format!("(pid {})", std::process::id()))
            && error.hint().is_some()
    );

    drop(files);
    assert_eq!(run_files::local_url(&state), None);
    assert!(PidRecord::read(&state).is_none() && state.join("lock").exists());
    // A killed daemon leaves its files behind. The next daemon must ignore them.
    std::fs::write(state.join("addr"), "http://127.0.0.1:1").unwrap();
    let files = RunFiles::claim(&state, "testd", "1.2.4").unwrap();
    assert_eq!(run_files::local_url(&state), None);

    // After a takeover, the old daemon's end leaves the new daemon's files alone, and a third daemon is refused.
    let taken = RunFiles::take_over(&state, "1.2.5").unwrap();
    taken.write_addr("127.0.0.1:9".parse().unwrap()).unwrap();
    drop(files);
    assert_eq!(run_files::local_url(&state).unwrap(), "http://127.0.0.1:9");
    assert_eq!(PidRecord::read(&state).unwrap().version, "1.2.5");
    assert!(RunFiles::claim(&state, "testd", "1.2.6").is_err());
    drop(taken);
    RunFiles::claim(&state, "testd", "1.2.6").unwrap();
}
