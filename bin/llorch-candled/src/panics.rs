//! Panic reports without the panic's message. The message may quote a prompt, as that of a slice that splits a character does,
//! so only the place is printed, which shows a developer where to look.

use std::any::Any;
use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};

/// A panic, as reported to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("internal error in the worker; its log says where")]
pub struct Panicked;

/// Runs `work` and turns a panic in it into an error without a message. The caller judges the state that `work` leaves behind.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_: Box<dyn Any + Send>| Panicked)
}

/// Sets a panic hook that prints only the place of a panic.
pub fn report_place_only() {
    std::panic::set_hook(Box::new(|info| {
        // A panic in here would end the process, and standard error may be a file on a full disk.
        let _ = writeln!(io::stderr(), "{}", place(info));
    }));
}

fn place(info: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    match info.location() {
        Some(location) => format!("thread {name} panicked at {location}"),
        None => format!("thread {name} panicked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test] // [CAND-064]
    fn a_panic_is_reported_by_its_place_and_never_by_its_message() {
        let printed = Arc::new(Mutex::new(String::new()));
        let hook = Arc::clone(&printed);
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| *hook.lock().unwrap() = place(info)));
        let prompt = "my secret: \u{e9}";
        let outcome = caught(|| prompt[..prompt.len() - 1].len());
        std::panic::set_hook(usual);

        let printed = printed.lock().unwrap();
        assert!(
            printed.contains("panics.rs") && printed.starts_with("thread "),
            "{printed}"
        );
        let message = outcome.unwrap_err().to_string();
        for text in [printed.as_str(), message.as_str()] {
            assert!(!text.contains("secret"), "{text}");
        }
        assert!(message.contains("internal error"), "{message}");
    }
}
