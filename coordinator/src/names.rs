//! What people call requests: `x-request-id`, which every response, refusal and log line carries.
//!
//! An index from that name to the request's id and back, where they differ, and what was said to
//! those that were turned away, which have no place anywhere else. The newest 8,192 are kept.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;

/// Names that are kept.
const LENGTH: usize = 8192;

/// What a name stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// The request.
    pub request: Option<RequestId>,
    /// Why it was turned away, where it was.
    pub refused: Option<String>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Names(Mutex<Index>);

#[derive(Debug, Default)]
struct Index {
    named: HashMap<String, Named>,
    labels: HashMap<RequestId, String>,
    order: VecDeque<String>,
}

impl Index {
    fn entry(&mut self, name: &str) -> &mut Named {
        if !self.named.contains_key(name) {
            self.order.push_back(name.to_owned());
            if self.order.len() > LENGTH
                && let Some(oldest) = self.order.pop_front()
                && let Some(id) = self.named.remove(&oldest).and_then(|n| n.request)
                && self.labels.get(&id) == Some(&oldest)
            {
                self.labels.remove(&id);
            }
        }
        self.named.entry(name.to_owned()).or_default()
    }
}

impl Names {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is called so. Where it is sent again, it keeps the name that came first for logs.
    pub fn note(&self, name: &str, id: RequestId) {
        let mut index = self.index();
        index.entry(name).request = Some(id);
        index.labels.entry(id).or_insert_with(|| name.to_owned());
    }

    /// A request was turned away.
    pub fn refused(&self, name: &str, why: String) {
        self.index().entry(name).refused = Some(why);
    }

    /// The same, where only its id is known.
    pub fn refused_id(&self, id: RequestId, status: &Status) {
        let name = self.label(id);
        self.refused(&name, status.to_string());
    }

    /// What a name stands for; ids stand for themselves.
    pub fn find(&self, name: &str) -> Named {
        let known = self.index().named.get(name).cloned().unwrap_or_default();
        Named { request: known.request.or_else(|| name.parse().ok()), ..known }
    }

    /// What a request is called.
    pub fn label(&self, id: RequestId) -> String {
        self.index().labels.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }
}

#[cfg(test)]
mod tests {
    use millrace_shared::error::ErrorCode;
    use uuid::Uuid;

    use super::*;

    fn id(n: u128) -> RequestId {
        RequestId(Uuid::from_u128(n))
    }

    #[test]
    fn names_stand_for_requests_and_refusals() {
        let names = Names::default();
        assert_eq!(names.find("a"), Named::default());
        assert_eq!(names.label(id(1)), id(1).to_string());
        names.note("a", id(1));
        names.note("b", id(1));
        assert_eq!(names.find("b").request, Some(id(1)));
        assert_eq!(names.label(id(1)), "a", "the first name stays");
        assert_eq!(names.find(&id(7).to_string()).request, Some(id(7)), "an id is a name");
        names.refused_id(id(1), &Status::new(ErrorCode::ResourceExhausted, "the queue is full"));
        let refused = names.find("a").refused.unwrap();
        assert!(refused.ends_with("the queue is full"), "{refused}");
        names.refused("c", "wrong".to_owned());
        assert_eq!(names.find("c"), Named { request: None, refused: Some("wrong".to_owned()) });
    }

    #[test]
    fn old_names_go() {
        let names = Names::default();
        (0..LENGTH as u128 + 5).for_each(|n| names.note(&format!("n{n}"), id(n)));
        assert_eq!(names.find("n0"), Named::default());
        assert_eq!(names.label(id(0)), id(0).to_string());
        assert_eq!(names.label(id(5)), "n5");
        assert_eq!(names.index().named.len(), LENGTH);
    }
}
