//! The decision of one pass: the built-in policy's, or a script's where there is one and it is of use.
//!
//! The daemon, the simulator and `scheduler check` all decide here. What differs is only who waits for the script: the
//! daemon without blocking, the others on the spot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::adopt;
use crate::api::scheduler::{ScriptError, ScriptErrorKind};
use crate::scheduler::{Plan, Policy, Snapshot, schedule};
use crate::script::{Act, Pass, Runner, Script};
use crate::trace::By;

/// What pools cost, by name.
pub type Costs = Arc<BTreeMap<String, f64>>;

/// What a pass decided, and who.
#[derive(Debug, Clone)]
pub struct Decision {
    /// What to do.
    pub plan: Plan,
    /// Who decided.
    pub by: By,
    /// SHA-256 of the script in force, where there is one, whoever decided.
    pub script: Option<String>,
    /// What was wrong with the script, where the built-in policy had to decide in its place.
    pub error: Option<ScriptError>,
}

impl Decision {
    /// The built-in policy's own.
    pub fn built_in(plan: Plan) -> Self {
        Self {
            plan,
            by: By::BuiltIn,
            script: None,
            error: None,
        }
    }

    /// Notes which script was in force.
    pub fn with(mut self, script: &Script) -> Self {
        self.script = Some(script.sha256().to_owned());
        self
    }
}

/// What a script is asked, or `None` where there is nothing to ask: no job waits for which anything could be done.
pub fn offer(snapshot: &Arc<Snapshot>, built_in: &Plan, costs: &Costs) -> Option<Arc<Pass>> {
    let candidates = adopt::candidates(snapshot, built_in);
    (!candidates.is_empty()).then(|| {
        Arc::new(Pass {
            snapshot: Arc::clone(snapshot),
            candidates,
            costs: Arc::clone(costs),
        })
    })
}

/// Takes what a script answered, or the built-in plan where that is of no use.
pub fn settle(
    policy: &dyn Policy,
    built_in: Plan,
    pass: &Pass,
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

/// Decides on the spot.
pub struct Decider {
    policy: &'static dyn Policy,
    script: Option<(Script, Runner)>,
    costs: Costs,
    limit: Duration,
}

impl Decider {
    /// Decides with a built-in policy.
    pub fn built_in(policy: &'static dyn Policy) -> Self {
        Self {
            policy,
            script: None,
            costs: Costs::default(),
            limit: Duration::ZERO,
        }
    }

    /// Decides with a script, which may take `limit` for a pass, and with `policy` where the script is of no use.
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

    /// The script, where there is one.
    pub fn source(&self) -> Option<&Script> {
        self.script.as_ref().map(|(script, _)| script)
    }

    /// Decides.
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
