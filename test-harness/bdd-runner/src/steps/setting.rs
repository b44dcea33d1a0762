//! Steps that set up a scenario.

use std::time::Duration;

use cucumber::given;

use crate::house::{House, test_model};

#[given("the default model is on disk")]
fn default_model(house: &mut House) {
    house.place_model();
}

#[given("a running orchestrator and a running pool")]
pub(super) async fn both_daemons(house: &mut House) {
    house.succeed("llorch orchestrator start").await;
    house.succeed("llorch-pool daemon start").await;
    pool_online(house).await;
}

/// Starts both daemons: the orchestrator with a port that it keeps across restarts, the pool with this heartbeat interval.
pub(super) async fn both_daemons_with_interval(house: &mut House, interval: Duration) {
    house.keep_port();
    let folder = house.home().join("config");
    std::fs::create_dir_all(&folder).expect("the configuration folder can be made");
    let setting = format!("heartbeat_interval_ms = {}\n", interval.as_millis());
    std::fs::write(folder.join("pool-managerd.toml"), setting).expect("it can be written");
    both_daemons(house).await;
}

#[given("a running pool")]
async fn pool_alone(house: &mut House) {
    house.succeed("llorch-pool daemon start").await;
}

#[given(expr = "a model {string} whose file is cut off after {int} bytes")]
async fn truncated_model(house: &mut House, id: String, bytes: usize) {
    let whole = std::fs::read(test_model()).expect("the test model can be read");
    house.place_file(&id, "cut.gguf", |target| {
        std::fs::write(target, &whole[..bytes])
    });
    let entry = format!(
        "[[models]]\nid = \"{id}\"\nname = \"Cut off\"\n[[models.sources]]\nkind = \"hf\"\nrepo = \"nobody/nothing\"\nfile = \"cut.gguf\"\n"
    );
    let folder = house.home().join("config");
    std::fs::create_dir_all(&folder).expect("the configuration folder can be made");
    std::fs::write(folder.join("catalog.toml"), entry)
        .expect("the user's catalogue can be written");
}

/// Waits until the orchestrator has received the pool's status.
async fn pool_online(house: &mut House) {
    let client = reqwest::Client::new();
    let url = house.url("/v2/pools/bdd");
    let heard = async {
        loop {
            let pool = client
                .get(&url)
                .send()
                .await
                .expect("the orchestrator answers");
            let pool: serde_json::Value = pool.json().await.expect("JSON");
            if !pool["status"].is_null() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(crate::house::WAIT_LIMIT, heard)
        .await
        .expect("the pool registers");
}
