//! Lists, ids, cancels, waits and texts of jobs.

use super::*;

const OTHER: &str = "job-01900000-0000-7000-8000-000000000002";
const THIRD: &str = "job-01900001-0000-7000-8000-000000000003";

fn ids(json: &str) -> Vec<String> {
    let jobs: Vec<Value> = serde_json::from_str(json).unwrap();
    jobs.iter()
        .map(|job| job["id"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test] // [LLORCH-030]
async fn a_list_is_an_array_of_jobs_with_ids() {
    use JobStatus::{Completed, Queued, Running};
    let fake = Fake {
        jobs: vec![
            (THIRD, vec![Completed]),
            (OTHER, vec![Running]),
            (JOB, vec![Queued]),
        ],
        ..Fake::default()
    };
    let fake = fake.start().await;
    let run = fake.run(&["jobs", "list", "--format", "json"]).await;
    assert_eq!(
        (run.code, ids(&run.out)),
        (0, vec![OTHER.into(), JOB.into(), THIRD.into()])
    );
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        fake.asked().lists[0],
        [
            pair("status", "queued,dispatched,running"),
            pair("limit", "500")
        ]
    );

    let run = fake
        .run(&["jobs", "list", "--format", "json", "--limit", "1"])
        .await;
    assert_eq!((run.code, ids(&run.out)), (0, vec![OTHER.into()]));
    let run = fake
        .run(&["jobs", "list", "--status", "expired", "--format", "json"])
        .await;
    assert_eq!((run.code, run.out.as_str()), (0, "[]\n"));

    let run = fake
        .run(&[
            "jobs",
            "list",
            "--status",
            "queued,completed",
            "--limit",
            "1",
        ])
        .await;
    assert_eq!(run.code, 0);
    let lines: Vec<&str> = run.out.lines().collect();
    assert!(
        lines[0].starts_with("AGE ") && lines[1].contains("01900000-0000"),
        "{}",
        run.out
    );
    assert_eq!(
        lines[2..],
        ["… 1 more: --limit N lists up to N jobs, --all lists all"]
    );
    let run = fake.run(&["jobs", "list"]).await;
    assert!(
        run.out.lines().count() == 4 && !run.out.contains('…'),
        "{}",
        run.out
    );
}

// [LLORCH-030] A job that ends between two pages is listed once, whichever page would contain it.
#[tokio::test]
async fn a_job_that_ends_while_it_is_listed_is_listed_once() {
    use JobStatus::{Completed, Running};
    for life in [
        vec![Running, Completed],
        vec![Completed],
        vec![Running, Running, Completed],
    ] {
        let fake = Fake {
            jobs: vec![(OTHER, life.clone()), (JOB, vec![Running])],
            ..Fake::default()
        };
        let run = fake
            .start()
            .await
            .run(&["jobs", "list", "--format", "json"])
            .await;
        let mut listed = ids(&run.out);
        listed.sort_unstable();
        assert_eq!(
            (run.code, listed),
            (0, vec![JOB.into(), OTHER.into()]),
            "{life:?}"
        );
    }
}

// [LLORCH-038]
#[tokio::test]
async fn the_beginning_of_an_id_names_its_job() {
    let fake = || Fake {
        jobs: vec![
            (THIRD, vec![JobStatus::Completed]),
            (OTHER, vec![JobStatus::Running]),
            (JOB, vec![JobStatus::Queued]),
        ],
        streams: vec![vec![Step::Send("1.1", started()), Step::Send("1.2", end())]],
        text: Some("the text"),
        ..Fake::default()
    };
    let listens = fake().start().await;
    let run = listens
        .run(&["jobs", "cancel", "job-01900001", "01900001-0000-7"])
        .await;
    assert_eq!(
        (run.code, run.out),
        (0, format!("{THIRD} cancelled\n").repeat(2)),
        "{}",
        run.err
    );
    let run = listens.run(&["jobs", "wait", "01900001"]).await;
    assert_eq!(
        (run.code, run.out),
        (0, format!("{THIRD} completed\n")),
        "{}",
        run.err
    );
    let run = listens.run(&["jobs", "events", "01900001"]).await;
    assert_eq!(run.code, 0, "{}", run.err);
    for command in ["status", "output", "explain"] {
        let run = listens.run(&["jobs", command, "01900000"]).await;
        assert_eq!(run.code, 2, "{command}");
        for part in [
            "more than one job id begins with job-01900000",
            "give more of the id: 01900000-0000 (running), ",
        ] {
            assert!(run.err.contains(part), "{part}: {}", run.err);
        }
        let run = listens.run(&["jobs", command, "ffff"]).await;
        assert_eq!(run.code, 3, "{command}: {}", run.err);
        let run = listens.run(&["jobs", command, "worker-cpu-0"]).await;
        assert_eq!(run.code, 2, "{command}: {}", run.err);
    }
    // A whole id is not looked up.
    let listens = fake().start().await;
    let run = listens.run(&["jobs", "output", JOB]).await;
    assert_eq!(
        (run.code, run.out.as_str(), listens.asked().lists.len()),
        (0, "the text\n", 0)
    );
}

#[tokio::test] // [LLORCH-032]
async fn a_cancel_that_came_too_late_says_which_state_won() {
    let late = Fake {
        cancel_answers: Some(JobStatus::Completed),
        ..Fake::default()
    }
    .start()
    .await;
    let run = late.run(&["jobs", "cancel", JOB]).await;
    assert_eq!((run.code, run.out), (0, format!("{JOB} completed\n")));
    let fake = Fake::default().start().await;
    let run = fake.run(&["jobs", "cancel", JOB, JOB]).await;
    assert_eq!(
        (run.code, run.out),
        (0, format!("{JOB} cancelled\n").repeat(2))
    );
}

#[tokio::test] // [LLORCH-033]
async fn a_wait_that_times_out_exits_with_124() {
    let fake = fake(vec![vec![Step::Hang]]).start().await;
    let run = fake.run(&["jobs", "wait", JOB, "--timeout", "1"]).await;
    assert_eq!((run.code, run.out.as_str()), (124, ""));
}

#[tokio::test] // [LLORCH-034]
async fn the_text_of_a_job_is_printed_when_it_is_whole() {
    let running = Fake::default().start().await;
    let run = running.run(&["jobs", "output", JOB]).await;
    assert_eq!((run.code, run.out.as_str()), (4, ""));
    assert!(run.err.contains("is running"), "{}", run.err);
    let done = Fake {
        text: Some("one two"),
        ..Fake::default()
    }
    .start()
    .await;
    assert_eq!(done.run(&["jobs", "output", JOB]).await.out, "one two\n");
    let missing = done
        .run(&["jobs", "status", "job-01900000-0000-7000-8000-000000000099"])
        .await;
    assert_eq!((missing.code, missing.out.as_str()), (3, ""));
}
