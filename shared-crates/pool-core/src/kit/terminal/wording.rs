//! Translation of the daemons' API terms into commands and options.
//!
//! A daemon's hint addresses callers of its API: `GET /v2/models`, `placement.device`. The command-line programs show
//! the hint to people who know commands and options, so they translate it first.

use std::borrow::Cow;

/// API terms and their command-line equivalents. Longer texts precede those that they contain.
const WORDS: &[(&str, &str)] = &[
    (
        "send `Authorization: Bearer TOKEN`; our command-line programs read it from LLORCH_API_TOKEN or LLORCH_POOL_TOKEN",
        "put the daemon's token into LLORCH_API_TOKEN (orchestratord) or LLORCH_POOL_TOKEN (pool-managerd)",
    ),
    (
        "as `POST /v2/tasks` answers them",
        "as `llorch jobs submit` prints them",
    ),
    ("`POST /v2/tasks`", "`llorch jobs submit`"),
    ("`GET /v2/tasks/{id}`", "`llorch jobs status JOB`"),
    ("`GET /v2/tasks`", "`llorch jobs list`"),
    (
        "`GET /v2/models` shows which models run (`runnable`)",
        "`llorch-pool models catalog` shows which models run",
    ),
    ("`GET /v2/models`", "`llorch-pool models catalog`"),
    ("`GET /v2/pools`", "`llorch pool list`"),
    ("`GET /workers`", "`llorch-pool worker list`"),
    ("`placement.device`", "`--device`"),
    ("`placement.pool`", "`--pool`"),
    ("leave `gpu` out", "leave `--gpu` out"),
    ("leave `slots` out", "leave `--slots` out"),
    ("leave `port` out", "leave `--port` out"),
    ("smaller `context_length`", "smaller `--context-length`"),
    (
        "smaller model or `context_length`",
        "smaller model or `--context-length`",
    ),
];

/// Returns `text` with API terms replaced by commands and options.
pub fn in_commands(text: &str) -> Cow<'_, str> {
    let mut text = Cow::Borrowed(text);
    for (api, command) in WORDS {
        if text.contains(api) {
            text = text.replace(api, command).into();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-096]
    fn words_of_the_api_become_commands_and_options() {
        for (said, shown) in [
            (
                "did you mean `m`? `GET /v2/models` lists all",
                "did you mean `m`? `llorch-pool models catalog` lists all",
            ),
            (
                "ids are `job-` and a UUID, as `POST /v2/tasks` answers them; `GET /v2/tasks` lists the jobs",
                "ids are `job-` and a UUID, as `llorch jobs submit` prints them; `llorch jobs list` lists the jobs",
            ),
            (
                "ask for another device with `placement.device`",
                "ask for another device with `--device`",
            ),
            ("nothing to translate", "nothing to translate"),
        ] {
            assert_eq!(in_commands(said), shown);
        }
    }
}
