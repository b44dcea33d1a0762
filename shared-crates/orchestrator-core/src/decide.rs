//! The decision of one pass: that of a script if there is one and its answer is valid, otherwise that of the built-in policy.
//!
//! The daemon, the simulator and `scheduler check` all use this module. They differ only in how they run the script: the daemon
//! does not block on it, the others do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::adopt;
use crate::api::scheduler::{ScriptError, ScriptErrorKind};
use crate::scheduler::{Plan, Policy, Snapshot, schedule};
use crate::script::{Act, Runner, Script, ScriptInput};
use crate::trace::By;

/// Cost of each pool, by name.
pub type Costs = Arc<BTreeMap<String, f64>>;

/// Outcome of a pass, with its origin.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Actions to take, and explanations for the jobs that wait.
    pub plan: Plan,
    /// Origin of the plan.
    pub by: By,
    /// SHA-256 of the script in force, even if the built-in policy decided; `None` without a script.
    pub script: Option<String>,
    /// Error of the script, if the built-in policy had to replace it.
    pub error: Option<ScriptError>,
}

impl Decision {
    /// Returns a decision of the built-in policy, without a script.
    pub fn built_in(plan: Plan) -> Self {
        Self {
            plan,
            by: By::BuiltIn,
            script: None,
            error: None,
        }
    }

    /// Records the script that was in force.
    pub fn with(mut self, script: &Script) -> Self {
        self.script = Some(script.sha256().to_owned());
        self
    }
}

/// Returns the input of a script; `None` if no waiting job could be helped by any action.
pub fn offer(snapshot: &Arc<Snapshot>, built_in: &Plan, costs: &Costs) -> Option<Arc<ScriptInput>> {
    let candidates = adopt::candidates(snapshot, built_in);
    (!candidates.is_empty()).then(|| {
        Arc::new(ScriptInput {
            snapshot: Arc::clone(snapshot),
            candidates,
            costs: Arc::clone(costs),
        })
    })
}

/// Adopts a script's answer, or the built-in plan if the answer is an error or breaks a rule.
pub fn settle(
    policy: &dyn Policy,
    built_in: Plan,
    pass: &ScriptInput,
    answer: Result<Vec<Act>, ScriptError>,
) -> Decision {
    let adopted = answer.and_then(|acts| {
        let proposals: Vec<_> = acts.iter().map(|act| act.proposal.clone()).collect();
        adopt::adopt(
            &pass.snapshot,
            policy,
            &built_in,
            &pass.candidates,
            &proposals,
        )
        .map_err(|refused| {
            let error = ScriptError::new(ScriptErrorKind::Action, refused.why.to_string());
            match acts.get(refused.index) {
                Some(act) => error.at(act.position),
                None => error,
            }
        })
    });
    match adopted {
        Ok(plan) => Decision {
            plan,
            by: By::Script,
            script: None,
            error: None,
        },
        Err(error) => Decision {
            plan: built_in,
            by: By::Fallback(error.kind),
            script: None,
            error: Some(error),
        },
    }
}

/// A synchronous decision maker, for the simulator and `scheduler check`.
pub struct Decider {
    policy: &'static dyn Policy,
    script: Option<(Script, Runner)>,
    costs: Costs,
    limit: Duration,
}

impl Decider {
    /// Returns a decider that uses a built-in policy only.
    pub fn built_in(policy: &'static dyn Policy) -> Self {
        Self {
            policy,
            script: None,
            costs: Costs::default(),
            limit: Duration::ZERO,
        }
    }

    /// Returns a decider that runs a script for up to `limit` per pass, and falls back to `policy`.
    pub fn script(
        policy: &'static dyn Policy,
        script: Script,
        costs: Costs,
        limit: Duration,
    ) -> std::io::Result<Self> {
        Ok(Self {
            policy,
            script: Some((script, Runner::start()?)),
            costs,
            limit,
        })
    }

    /// Returns the script; `None` if the built-in policy always decides.
    pub fn source(&self) -> Option<&Script> {
        self.script.as_ref().map(|(script, _)| script)
    }

    /// Decides a pass, blocking until the script has answered or its time is up.
    pub fn decide(&self, snapshot: &Arc<Snapshot>) -> Decision {
        let built_in = schedule(snapshot, self.policy);
        let Some((script, runner)) = &self.script else {
            return Decision::built_in(built_in);
        };
        let Some(pass) = offer(snapshot, &built_in, &self.costs) else {
            return Decision::built_in(built_in).with(script);
        };
        let ran = runner.run(script, Arc::clone(&pass), self.limit, false);
        settle(self.policy, built_in, &pass, ran.result).with(script)
    }
}
