//! Plain HTTP requests, as an agent sends them.

use cucumber::gherkin::Step;
use cucumber::{then, when};
use serde_json::Value;

use crate::house::House;

async fn keep(house: &mut House, request: reqwest::RequestBuilder) {
    let response = request.send().await.expect("the orchestrator answers");
    let status = response.status().as_u16();
    let body = response.json().await.expect("every answer is JSON");
    house.answer = Some((status, body));
}

async fn post(house: &mut House, path: &str, body: String) {
    let url = house.url(path);
    keep(
        house,
        reqwest::Client::new()
            .post(url)
            .header("Content-Type", "application/json")
            .body(body),
    )
    .await;
}

#[when(expr = "an agent posts to {string}:")]
async fn post_docstring(house: &mut House, path: String, step: &Step) {
    let body = step.docstring.clone().expect("the step has a body");
    post(house, &path, body).await;
    let (_, answer) = house.answer.as_ref().expect("an answer was just kept");
    if let Some(job) = answer["job_id"].as_str() {
        house.job = Some(job.to_owned());
    }
}

#[then(expr = "the answer is {int}")]
fn answer_is(house: &mut House, status: u16) {
    let (got, body) = house.answer.as_ref().expect("a request was sent");
    assert_eq!(*got, status, "{body:#}");
}

#[then(expr = "its error code is {string} with a hint")]
fn error_code(house: &mut House, code: String) {
    let (_, body) = house.answer.as_ref().expect("a request was sent");
    assert_eq!(body["error"]["code"], code.as_str(), "{body:#}");
    assert!(body["error"]["hint"].is_string(), "{body:#}");
    assert!(body["error"]["correlation_id"].is_string(), "{body:#}");
}

#[when("an agent posts each of these bodies to \"/v2/tasks\", it is refused with the error:")]
async fn refused(house: &mut House, step: &Step) {
    let table = step.table.as_ref().expect("the step has a table");
    for row in &table.rows[1..] {
        let [body, status, code] = &row[..] else {
            panic!("three columns: body, status, code")
        };
        let body = match body.as_str() {
            "(10 MB)" => format!(
                r#"{{"model": "smollm2-135m", "prompt": "{}"}}"#,
                "a".repeat(10 << 20)
            ),
            body => body.to_owned(),
        };
        post(house, "/v2/tasks", body.clone()).await;
        let (got, answer) = house.answer.as_ref().expect("a request was sent");
        let shown: String = body.chars().take(80).collect();
        assert_eq!(got.to_string(), *status, "{shown}: {answer:#}");
        assert_eq!(
            answer["error"]["code"],
            code.as_str(),
            "{shown}: {answer:#}"
        );
        assert!(answer["error"]["hint"].is_string(), "{shown}: {answer:#}");
    }
}

#[then("no job is stored")]
async fn nothing_stored(house: &mut House) {
    let url = house.url("/v2/tasks");
    let list: Value = reqwest::get(url)
        .await
        .expect("the orchestrator answers")
        .json()
        .await
        .expect("JSON");
    assert_eq!(list["jobs"], serde_json::json!([]), "{list:#}");
}

#[when(expr = "an agent gets {string}")]
async fn get(house: &mut House, path: String) {
    let url = house.url(&path);
    keep(house, reqwest::Client::new().get(url)).await;
}
