//! The script engine: its packages, disabled features and limits.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use rhai::packages::{
    ArithmeticPackage, BasicArrayPackage, BasicIteratorPackage, BasicMapPackage, BasicMathPackage,
    BasicStringPackage, LogicPackage, MoreStringPackage, Package as _,
};
use rhai::{Dynamic, Engine, OptimizationLevel};

use super::{
    MAX_ARRAY, MAX_CALLS, MAX_EXPRESSION, MAX_FUNCTION_EXPRESSION, MAX_MAP, MAX_OPERATIONS,
    MAX_STRING, bounded, views,
};

/// Number of operations between two checks of the clock. An operation takes microseconds, because its data is bounded; only
/// operations that search a large fleet take longer.
const LOOK_EVERY: u64 = 8;
/// Most lines that `print` keeps.
const PRINTED_LINES: usize = 100;
/// Most characters of such a line.
const PRINTED_CHARS: usize = 200;

thread_local! {
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
    static PRINTS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Runs `work` on this thread, stopping scripts at `deadline`. Keeps the output of `print` if `keep_prints` is set.
pub(super) fn with_deadline<T>(
    deadline: Instant,
    keep_prints: bool,
    work: impl FnOnce() -> T,
) -> (T, Vec<String>) {
    DEADLINE.set(Some(deadline));
    PRINTS.set(keep_prints.then(Vec::new));
    let result = work();
    DEADLINE.set(None);
    (result, PRINTS.take().unwrap_or_default())
}

fn print(text: &str) {
    PRINTS.with_borrow_mut(|prints| {
        if let Some(lines) = prints.as_mut().filter(|lines| lines.len() < PRINTED_LINES) {
            lines.push(text.chars().take(PRINTED_CHARS).collect());
        }
    });
}

/// Returns a sandboxed engine.
pub(super) fn new() -> Engine {
    // Without packages, an engine has no functions at all. The language-core package is left out because it has `sleep`.
    let mut engine = Engine::new_raw();
    ArithmeticPackage::new().register_into_engine(&mut engine);
    LogicPackage::new().register_into_engine(&mut engine);
    BasicStringPackage::new().register_into_engine(&mut engine);
    MoreStringPackage::new().register_into_engine(&mut engine);
    BasicIteratorPackage::new().register_into_engine(&mut engine);
    BasicMathPackage::new().register_into_engine(&mut engine);
    BasicArrayPackage::new().register_into_engine(&mut engine);
    BasicMapPackage::new().register_into_engine(&mut engine);
    // `eval` would compile unchecked code. Curried values are not counted by any size limit, and can grow exponentially.
    for symbol in ["eval", "curry"] {
        engine.disable_symbol(symbol);
    }
    engine
        .set_max_operations(MAX_OPERATIONS)
        .set_max_call_levels(MAX_CALLS)
        .set_max_expr_depths(MAX_EXPRESSION, MAX_FUNCTION_EXPRESSION)
        .set_max_string_size(MAX_STRING)
        .set_max_array_size(MAX_ARRAY)
        .set_max_map_size(MAX_MAP)
        .set_max_variables(128)
        .set_max_functions(128)
        .set_max_strings_interned(256)
        // The optimizer would run parts of a script before its limits apply.
        .set_optimization_level(OptimizationLevel::None)
        .set_fail_on_invalid_map_property(true);
    engine.on_progress(|operations| {
        let over = operations % LOOK_EVERY == 0
            && DEADLINE
                .get()
                .is_some_and(|deadline| Instant::now() >= deadline);
        over.then_some(Dynamic::UNIT)
    });
    engine.on_print(print);
    engine.on_debug(|text, _, _| print(text));
    bounded::register(&mut engine);
    views::register(&mut engine);
    engine
}
