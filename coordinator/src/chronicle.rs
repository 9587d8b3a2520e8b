//! What happened to the cluster, for people: nodes that came and went, epochs, cuts; and the plan that
//! serves, with what would help most. The newest 256 events are kept; the log has all of them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::Serialize;

use crate::journal::unix_ms;

/// Events that are kept.
const LENGTH: usize = 256;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Event {
    /// Counts from 1.
    pub number: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `joined`, `lost`, `ready`, `stopped`, `cut`, `quarantine` or `leaving`.
    pub kind: &'static str,
    /// In words.
    pub text: String,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Chronicle(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    seen: u64,
    events: VecDeque<Event>,
    plan: String,
}

impl Chronicle {
    /// Something happened.
    pub fn note(&self, kind: &'static str, text: impl Into<String>) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.seen += 1;
        let event = Event { number: pages.seen, at_ms: unix_ms(), kind, text: text.into() };
        pages.events.push_back(event);
        if pages.events.len() > LENGTH {
            pages.events.pop_front();
        }
    }

    /// Another plan serves.
    pub fn set_plan(&self, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).plan = text;
    }

    /// The number of the last event, those after number `after`, and the plan. Where fewer than that
    /// were ever seen, the reader has another life of the coordinator in mind, and gets everything.
    pub fn after(&self, after: u64) -> (u64, Vec<Event>, String) {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let after = if after > pages.seen { 0 } else { after };
        let new = pages.events.iter().filter(|e| e.number > after).cloned().collect();
        (pages.seen, new, pages.plan.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_get_what_is_new_and_old_events_go() {
        let chronicle = Chronicle::default();
        assert_eq!(chronicle.after(0), (0, Vec::new(), String::new()));
        chronicle.note("joined", "gpu-a");
        chronicle.note("lost", "gpu-a");
        chronicle.set_plan("all on gpu-b".to_owned());
        let (last, events, plan) = chronicle.after(1);
        assert_eq!((last, events.len(), plan.as_str()), (2, 1, "all on gpu-b"));
        assert_eq!((events[0].kind, events[0].number), ("lost", 2));
        assert_eq!(chronicle.after(9).1.len(), 2, "the reader comes from another life");
        (0..LENGTH).for_each(|n| chronicle.note("cut", n.to_string()));
        assert_eq!(chronicle.after(0).1.len(), LENGTH);
    }
}
