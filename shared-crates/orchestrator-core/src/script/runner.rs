//! The thread that scripts run on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rhai::{CallFnOptions, Dynamic, Engine, Scope};

use super::views::{Act, Ctx, ScriptInput};
use super::{STACK, Script, ScriptError, ScriptErrorKind, engine, from_rhai};

/// Outcome of a run.
#[derive(Debug)]
pub struct Ran {
    /// Actions of the script, or the error that ended the run.
    pub result: Result<Vec<Act>, ScriptError>,
    /// Lines that the script printed; empty unless they were requested.
    pub printed: Vec<String>,
}

type Done = Box<dyn FnOnce(Ran) + Send>;

struct Work {
    script: Script,
    pass: Arc<ScriptInput>,
    limit: Duration,
    keep_prints: bool,
    done: Done,
}

/// A thread that runs scripts one at a time. Callers wait at most for the limit of their run. A run that can't be interrupted
/// continues alone, and its late result is dropped; until it ends, all other runs are refused.
#[derive(Debug)]
pub struct Runner {
    work: mpsc::SyncSender<Work>,
    busy: Arc<AtomicBool>,
}

impl Runner {
    /// Starts the thread, which ends once the runner is dropped and its last run has ended.
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
                    // Slightly shorter than the caller's wait, so that usually the script is stopped before the caller gives
                    // up.
                    let deadline = Instant::now() + limit * 9 / 10;
                    let (result, printed) = engine::with_deadline(deadline, keep_prints, || {
                        catch_unwind(AssertUnwindSafe(|| run(&engine, &script, pass)))
                    });
                    let result = result.unwrap_or_else(|_| {
                        Err(ScriptError::new(
                            ScriptErrorKind::Runtime,
                            "the interpreter failed on the script",
                        ))
                    });
                    // Released before `done`, so that a caller that has the result can submit the next run.
                    running.store(false, Ordering::Release);
                    done(Ran { result, printed });
                }
            })?;
        Ok(Self { work, busy })
    }

    /// Runs a script on the runner's thread, which passes the outcome to `done`. Fails while another run is in progress.
    pub fn submit(
        &self,
        script: &Script,
        pass: Arc<ScriptInput>,
        limit: Duration,
        keep_prints: bool,
        done: impl FnOnce(Ran) + Send + 'static,
    ) -> Result<(), ScriptError> {
        let busy = || {
            ScriptError::new(
                ScriptErrorKind::Busy,
                "the previous run took too long and has not ended yet",
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

    /// Runs a script and waits for its outcome, at most for `limit`.
    pub fn run(
        &self,
        script: &Script,
        pass: Arc<ScriptInput>,
        limit: Duration,
        keep_prints: bool,
    ) -> Ran {
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

/// Returns the error of a run that exceeded its limit.
pub fn too_long(limit: Duration) -> ScriptError {
    ScriptError::new(
        ScriptErrorKind::Timeout,
        format!(
            "the script took longer than {}",
            pool_core::kit::units::human_duration(limit)
        ),
    )
}

fn run(engine: &Engine, script: &Script, pass: Arc<ScriptInput>) -> Result<Vec<Act>, ScriptError> {
    // Statements outside of functions are not run, because functions can't see the variables that they set.
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
            "`schedule` returned {}, not a list of actions",
            named(&type_name)
        )));
    };
    let mut acts = Vec::with_capacity(actions.len());
    for (index, action) in actions.into_iter().enumerate() {
        let type_name = engine.map_type_name(action.type_name()).to_owned();
        let Some(act) = action.try_cast::<Act>() else {
            return Err(wrong(&format!(
                "element {index} of the list that `schedule` returned is {}, not an action",
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
