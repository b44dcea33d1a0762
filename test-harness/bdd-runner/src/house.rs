//! The state of a scenario: a home of its own, and the processes in it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use orchestrator_core::api::tasks::TaskView;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::leftovers;
use crate::memory::Watch;
use crate::process::{self, Finished};
use crate::soak::Report;
use crate::steps::memory::Asked;
use crate::stream::Received;

/// Time limit of a command.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// Time limit of a condition.
pub const WAIT_LIMIT: Duration = Duration::from_secs(180);

/// A home folder, the last command and its result, and the job of the scenario.
#[derive(Debug, cucumber::World)]
#[world(init = Self::build)]
pub struct House {
    folder: TempDir,
    /// Result of the last command that ended.
    pub finished: Option<Finished>,
    /// Command that is still running.
    pub running: Option<Child>,
    /// Last answer to a plain HTTP request: status and body.
    pub answer: Option<(u16, Value)>,
    /// Id of the scenario's job.
    pub job: Option<String>,
    /// Events of the job, as received.
    pub events: Vec<Received>,
    /// Events of an undisturbed job.
    pub undisturbed: Vec<Received>,
    /// Value of `LLORCH_ORCHESTRATOR_BIND`.
    pub orchestrator_bind: String,
    /// Ids of jobs that were acknowledged with 202.
    pub acknowledged: Vec<String>,
    /// Outcomes of concurrent requests for workers.
    pub asked: Vec<Asked>,
    /// Value of `memory.cpu_limit_bytes`.
    pub memory_limit: u64,
    /// Watch on the memory of the workers.
    pub watch: Option<Watch>,
    /// Report of the long run.
    pub soak: Option<Report>,
    /// Process id of a frozen orchestrator.
    pub frozen: Option<u32>,
}

impl House {
    /// Creates a new, empty home.
    pub fn build() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("llorch-bdd-")
            .tempdir()
            .expect("a temporary folder can be made");
        leftovers::register(folder.path());
        Self {
            folder,
            finished: None,
            running: None,
            answer: None,
            job: None,
            events: Vec::new(),
            undisturbed: Vec::new(),
            orchestrator_bind: "127.0.0.1:0".to_owned(),
            acknowledged: Vec::new(),
            asked: Vec::new(),
            memory_limit: 0,
            watch: None,
            soak: None,
            frozen: None,
        }
    }

    /// Makes the orchestrator keep its port across restarts, so that pools find it again.
    pub fn keep_port(&mut self) {
        let port = process::lasting_port().expect("a free port");
        self.orchestrator_bind = format!("127.0.0.1:{port}");
    }

    /// Returns the home folder, which is `LLORCH_HOME` for all commands.
    pub fn home(&self) -> &Path {
        self.folder.path()
    }

    /// Places the real model where `llorch-pool models` keeps it.
    pub fn place_model(&self) {
        let source = test_model();
        let name = source.file_name().expect("a file has a name");
        self.place_file(
            "smollm2-135m",
            name.to_str().expect("a plain name"),
            |target| {
                // A hard link if possible: the file has 98 MB.
                std::fs::hard_link(&source, target)
                    .or_else(|_| std::fs::copy(&source, target).map(drop))
            },
        );
    }

    /// Places a file in the models folder.
    pub fn place_file(
        &self,
        id: &str,
        name: &str,
        make: impl FnOnce(&Path) -> std::io::Result<()>,
    ) {
        let folder = self.home().join("models").join(id);
        std::fs::create_dir_all(&folder).expect("the models folder can be made");
        make(&folder.join(name)).expect("the model can be placed");
    }

    /// Returns a command that runs in this home.
    pub fn command(&self, line: &str) -> Command {
        let words = process::split(line);
        let (name, arguments) = words.split_first().expect("a command line names a program");
        let mut command = process::clean(process::program(name));
        command.args(arguments);
        command.env("LLORCH_HOME", self.home());
        command
            .env("LLORCH_ORCHESTRATOR_BIND", &self.orchestrator_bind)
            .env("LLORCH_POOL_BIND", "127.0.0.1:0");
        command.env("LLORCH_POOL_ID", "bdd");
        // A pool finds the orchestrator of its home. Without one, the pool must not contact an orchestrator at the standard
        // port.
        if name == "llorch-pool" && self.address("orchestratord").is_none() {
            command.env("LLORCH_ORCHESTRATOR_URL", "none");
        }
        command
    }

    /// Runs a command to its end and keeps its output.
    pub async fn run(&mut self, line: &str) -> &Finished {
        let line = self.fill(line);
        let finished = process::run(self.command(&line), COMMAND_LIMIT).await;
        self.finished.insert(finished)
    }

    /// Runs a command that must succeed.
    pub async fn succeed(&mut self, line: &str) -> &Finished {
        let finished = self.run(line).await;
        assert!(
            finished.status.success(),
            "{line}: {}\n{}{}",
            finished.status,
            finished.stdout,
            finished.stderr
        );
        finished
    }

    /// Replaces `HOME` with the home folder, and `JOB` with the id of the scenario's job.
    pub fn fill(&self, text: &str) -> String {
        let text = text.replace("HOME", &self.home().to_string_lossy());
        match &self.job {
            Some(job) => text.replace("JOB", job),
            None => text,
        }
    }

    /// Returns the address that a daemon has written; `None` if it has written none.
    pub fn address(&self, daemon: &str) -> Option<String> {
        let folder = if daemon == "orchestratord" {
            "orchestratord"
        } else {
            "pool"
        };
        let text =
            std::fs::read_to_string(self.home().join("state").join(folder).join("addr")).ok()?;
        Some(text.trim().to_owned())
    }

    /// Returns the URL of a path of the orchestrator's API.
    pub fn url(&self, path: &str) -> String {
        let base = self
            .address("orchestratord")
            .expect("the orchestrator wrote its address");
        format!("{base}{}", self.fill(path))
    }

    /// Returns the job as the API shows it.
    pub async fn task(&self) -> TaskView {
        let job = self.job.as_deref().expect("the scenario has a job");
        let response = reqwest::get(self.url(&format!("/v2/tasks/{job}")))
            .await
            .expect("the orchestrator answers");
        response.json().await.expect("a job of the contract")
    }

    /// Returns the last command's result.
    pub fn last(&self) -> &Finished {
        self.finished.as_ref().expect("a command ran before")
    }

    /// Returns the home of a demo that ran with `--keep`: a folder in this home.
    pub fn demo_home(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.home()).expect("the home is there");
        let mut folders = entries.flatten().map(|entry| entry.path());
        folders
            .find(|folder| folder.join("state/orchestratord/jobs.db").exists())
            .expect("the demo made a home in the scenario's folder")
    }

    /// Stops everything that runs in `home`.
    pub async fn stop_all(&self, home: &Path) {
        for line in [
            "llorch-pool worker stop --all --force",
            "llorch-pool daemon stop --workers",
            "llorch orchestrator stop",
        ] {
            let mut command = self.command(line);
            command.env("LLORCH_HOME", home);
            // Errors don't matter, because some of these may not run: the caller checks what is left.
            process::run(command, COMMAND_LIMIT).await;
        }
    }

    /// Stops everything that runs in this home. Panics if a process is left.
    pub async fn close(&mut self) {
        if let Some(mut child) = self.running.take() {
            child.kill().await.ok();
        }
        self.stop_all(self.home()).await;
        let home = self.home().to_owned();
        let gone = until(WAIT_LIMIT, || process::left_running(&home).is_empty()).await;
        let left = process::left_running(&home);
        for (pid, _) in &left {
            let mut kill = Command::new("kill");
            process::run(
                {
                    kill.args(["-KILL", &pid.to_string()]);
                    kill
                },
                COMMAND_LIMIT,
            )
            .await;
        }
        assert!(gone, "left running: {left:?}");
    }
}

impl Drop for House {
    fn drop(&mut self) {
        leftovers::close(self.folder.path());
    }
}

/// Returns the path of the real model's file.
pub fn test_model() -> PathBuf {
    let path = std::env::var_os("LLORCH_TEST_MODEL").expect(
        "LLORCH_TEST_MODEL must name the file of `smollm2-135m`: run `scripts/test`, or `llorch-pool models download smollm2-135m` and set it",
    );
    PathBuf::from(path)
}

/// Waits until `condition` holds. Returns false if it does not hold within `limit`.
pub async fn until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > limit {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}
