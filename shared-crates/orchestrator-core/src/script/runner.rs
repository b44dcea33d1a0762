//! The thread that scripts run on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rhai::{CallFnOptions, Dynamic, Engine, Scope};

use super::views::{Act, Ctx, Pass};
use super::{STACK, Script, ScriptError, ScriptErrorKind, engine, from_rhai};

/// What a run came to.
#[derive(Debug)]
pub struct Ran {
    /// The actions, or why there are none.
    pub result: Result<Vec<Act>, ScriptError>,
    /// What the script printed, where that was asked for.
    pub printed: Vec<String>,
}

type Done = Box<dyn FnOnce(Ran) + Send>;

struct Work {
    script: Script,
    pass: Arc<Pass>,
    limit: Duration,
    keep_prints: bool,
    done: Done,
}

/// A thread on which scripts run, one run at a time. Whoever waits for a run does so for its limit and no longer: a run
/// that can't be interrupted goes on alone, its late result is dropped, and until it has ended every other run is refused.
#[derive(Debug)]
pub struct Runner {
    work: mpsc::SyncSender<Work>,
    busy: Arc<AtomicBool>,
}

impl Runner {
    /// Starts the thread. It ends when the runner is dropped and its last run is over.
    pub fn start() -> std::io::Result<Self> {
        let (work, incoming) = mpsc::sync_channel::<Work>(1);
        let busy = Arc::new(AtomicBool::new(false));
        let running = Arc::clone(&busy);
        std::thread::Builder::new()
            .name("scheduler-script".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let engine = engine::new();
                while let Ok(work) = incoming.recv() {
                    let Work {
                        script,
                        pass,
                        limit,
                        keep_prints,
                        done,
                    } = work;
                    // A little less than whoever waits: it is the script that is told that its time is over, mostly.
                    let deadline = Instant::now() + limit * 9 / 10;
                    let (result, printed) = engine::with_deadline(deadline, keep_prints, || {
                        catch_unwind(AssertUnwindSafe(|| run(&engine, &script, pass)))
                    });
                    let result = result.unwrap_or_else(|_| {
                        Err(ScriptError::new(
                            ScriptErrorKind::Runtime,
                            "the interpreter gave up on it",
                        ))
                    });
                    running.store(false, Ordering::Release);
                    done(Ran { result, printed });
                }
            })?;
        Ok(Self { work, busy })
    }

    /// Runs a script and hands what came of it to `done`, on the runner's thread. Refused while a run is under way.
    pub fn submit(
        &self,
        script: &Script,
        pass: Arc<Pass>,
        limit: Duration,
        keep_prints: bool,
        done: impl FnOnce(Ran) + Send + 'static,
    ) -> Result<(), ScriptError> {
        let busy = || {
            ScriptError::new(
                ScriptErrorKind::Busy,
                "the run before took too long and has not ended yet",
            )
        };
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(busy());
        }
        let work = Work {
            script: script.clone(),
            pass,
            limit,
            keep_prints,
            done: Box::new(done),
        };
        self.work.try_send(work).map_err(|_| busy())
    }

    /// Runs a script to its end, or to the end of its time.
    pub fn run(&self, script: &Script, pass: Arc<Pass>, limit: Duration, keep_prints: bool) -> Ran {
        let failed = |error| Ran {
            result: Err(error),
            printed: Vec::new(),
        };
        let (done, came) = mpsc::sync_channel(1);
        let submitted = self.submit(script, pass, limit, keep_prints, move |ran| {
            let _ = done.send(ran);
        });
        match submitted {
            Ok(()) => came
                .recv_timeout(limit)
                .unwrap_or_else(|_| failed(too_long(limit))),
            Err(error) => failed(error),
        }
    }
}

/// The error of a run that nobody waits for any more.
pub fn too_long(limit: Duration) -> ScriptError {
    ScriptError::new(
        ScriptErrorKind::Timeout,
        format!(
            "it took longer than {}",
            pool_core::units::human_duration(limit)
        ),
    )
}

fn run(engine: &Engine, script: &Script, pass: Arc<Pass>) -> Result<Vec<Act>, ScriptError> {
    // Statements outside of functions are not run: what they would set, functions can't see.
    let options = CallFnOptions::new().eval_ast(false);
    let returned: Dynamic = engine
        .call_fn_with_options(
            options,
            &mut Scope::new(),
            &script.ast,
            "schedule",
            (Ctx::new(pass),),
        )
        .map_err(|error| from_rhai(*error))?;
    let wrong = |what: &str| ScriptError::new(ScriptErrorKind::Result, what);
    let type_name = engine.map_type_name(returned.type_name()).to_owned();
    let Some(actions) = returned.try_cast::<rhai::Array>() else {
        return Err(wrong(&format!(
            "`schedule` returned {} where a list of actions was expected",
            named(&type_name)
        )));
    };
    let mut acts = Vec::with_capacity(actions.len());
    for (index, action) in actions.into_iter().enumerate() {
        let type_name = engine.map_type_name(action.type_name()).to_owned();
        let Some(act) = action.try_cast::<Act>() else {
            return Err(wrong(&format!(
                "element {index} of what `schedule` returned is {}, not an action",
                named(&type_name)
            )));
        };
        acts.push(act);
    }
    Ok(acts)
}

fn named(type_name: &str) -> String {
    match type_name {
        "()" => "nothing".to_owned(),
        other => format!("`{other}`"),
    }
}
