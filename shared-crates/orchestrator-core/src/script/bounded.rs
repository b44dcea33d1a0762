//! Replacements for Rhai functions that escape the limits. Rhai's `sort` and `dedup` continue after their comparer was stopped,
//! so that a sort within a sort runs for hours after its time is up. Its `replace` builds a text before the limit on its length
//! is checked.

use rhai::{
    Array, Dynamic, Engine, EvalAltResult, FnPtr, INT, ImmutableString, NativeCallContext, Position,
};

use super::MAX_STRING;

type Result<T> = std::result::Result<T, Box<EvalAltResult>>;

pub(super) fn register(engine: &mut Engine) {
    engine
        .register_fn("sort", sort_by)
        .register_fn("sort_by", sort_by)
        .register_fn("dedup", dedup_by)
        .register_fn("replace", replace)
        .register_fn(
            "replace",
            |context: NativeCallContext<'_>, text: &mut ImmutableString, find: char, with: &str| {
                replace(context, text, find.encode_utf8(&mut [0; 4]), with)
            },
        );
}

/// Sorts by a comparer of the script, and stops at the comparer's first error. Equal elements keep their order.
fn sort_by(context: NativeCallContext<'_>, array: &mut Array, comparer: FnPtr) -> Result<()> {
    let mut sorted = Array::with_capacity(array.len());
    for item in array.iter() {
        let (mut low, mut high) = (0, sorted.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            if goes_before(&context, &comparer, item, &sorted[middle])? {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        sorted.insert(low, item.clone());
    }
    *array = sorted;
    Ok(())
}

/// Calls a comparer, which returns either a negative number or `true` if the first element goes before the second.
fn goes_before(
    context: &NativeCallContext<'_>,
    comparer: &FnPtr,
    first: &Dynamic,
    second: &Dynamic,
) -> Result<bool> {
    let said: Dynamic = comparer.call_within_context(context, (first.clone(), second.clone()))?;
    if let Ok(number) = said.as_int() {
        return Ok(number < 0);
    }
    said.as_bool().map_err(|found| {
        let expected = std::any::type_name::<INT>().to_owned();
        let error = EvalAltResult::ErrorMismatchDataType(expected, found.into(), Position::NONE);
        Box::new(error)
    })
}

/// Removes each element that equals the one before it, according to a comparer of the script.
fn dedup_by(context: NativeCallContext<'_>, array: &mut Array, comparer: FnPtr) -> Result<()> {
    let mut kept = Array::with_capacity(array.len());
    for item in array.iter() {
        let equal = match kept.last() {
            None => false,
            Some(last) => {
                let pair = (Dynamic::clone(last), item.clone());
                let said: Dynamic = comparer.call_within_context(&context, pair)?;
                said.as_bool().unwrap_or(false)
            }
        };
        if !equal {
            kept.push(item.clone());
        }
    }
    *array = kept;
    Ok(())
}

/// Replaces all occurrences of a text, unless the result would exceed the limit on strings.
fn replace(
    _: NativeCallContext<'_>,
    text: &mut ImmutableString,
    find: &str,
    with: &str,
) -> Result<()> {
    let found = text.matches(find).count();
    let grown = (text.len() - found * find.len()).saturating_add(found.saturating_mul(with.len()));
    if grown > MAX_STRING {
        let what = "Length of string".to_owned();
        return Err(EvalAltResult::ErrorDataTooLarge(what, Position::NONE).into());
    }
    *text = text.replace(find, with).into();
    Ok(())
}
