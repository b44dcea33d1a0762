//! Server-sent events: one codec for the events of tasks, workers and downloads.
//!
//! On the wire, the field `event:` names the variant and `data:` holds its content as JSON. Source: HTML Living Standard, section
//! 9.2.

/// An event of a stream.
pub trait SseEvent: Sized {
    /// Returns the content of the field `event:`.
    fn name(&self) -> &'static str;

    /// Returns the content of the field `data:`.
    fn data(&self) -> String;

    /// Parses an event from the two fields.
    ///
    /// # Errors
    ///
    /// Fails for a name that this build does not know, and for data that is not of the name's form.
    fn parse(event: &str, data: &str) -> Result<Self, UnreadableEvent>;

    /// Returns whether no event follows this one.
    fn is_last(&self) -> bool;
}

/// An error for an event that this build does not know, or whose data it cannot parse.
#[derive(Debug, thiserror::Error)]
#[error("could not parse `{event}` event")]
pub struct UnreadableEvent {
    event: String,
    source: Option<serde_json::Error>,
}

impl UnreadableEvent {
    /// Returns the error for the event of this name. `source` is absent if the name is unknown.
    pub fn new(event: &str, source: Option<serde_json::Error>) -> Self {
        Self {
            event: event.chars().take(40).collect(),
            source,
        }
    }
}

/// Implements [`SseEvent`] for an enum whose variants each hold the content of one event. The variants after `last` end a stream.
#[macro_export]
macro_rules! sse_events {
    ($events:ident { $($variant:ident: $name:literal,)* } last { $($last:ident: $last_name:literal,)* }) => {
        impl $crate::kit::sse::SseEvent for $events {
            fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                    $(Self::$last(_) => $last_name,)*
                }
            }

            fn data(&self) -> String {
                let json = match self {
                    $(Self::$variant(data) => ::serde_json::to_string(data),)*
                    $(Self::$last(data) => ::serde_json::to_string(data),)*
                };
                json.expect("plain structures of numbers and strings always serialise")
            }

            fn parse(event: &str, data: &str) -> Result<Self, $crate::kit::sse::UnreadableEvent> {
                let parsed = match event {
                    $($name => ::serde_json::from_str(data).map(Self::$variant),)*
                    $($last_name => ::serde_json::from_str(data).map(Self::$last),)*
                    _ => return Err($crate::kit::sse::UnreadableEvent::new(event, None)),
                };
                parsed.map_err(|source| $crate::kit::sse::UnreadableEvent::new(event, Some(source)))
            }

            fn is_last(&self) -> bool {
                matches!(self, $(Self::$last(_))|*)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Event {
        Step(u32),
        End(String),
    }

    sse_events!(Event { Step: "step", } last { End: "end", });

    #[test]
    fn events_are_read_as_they_were_written() {
        for (event, name, data, is_last) in [
            (Event::Step(3), "step", "3", false),
            (Event::End("ok".into()), "end", "\"ok\"", true),
        ] {
            assert_eq!((event.name(), event.data().as_str()), (name, data));
            assert_eq!(Event::parse(name, data).unwrap(), event);
            assert_eq!(event.is_last(), is_last);
        }
        let unknown = Event::parse(&"x".repeat(100), "3").unwrap_err();
        assert_eq!(
            unknown.to_string().len(),
            "could not parse `` event".len() + 40
        );
        let malformed = Event::parse("step", "true").unwrap_err();
        assert!(std::error::Error::source(&malformed).is_some());
    }
}
