//! The requests that run or wait, by their names: that of the request, and those of its choices in
//! the pipeline.
//!
//! Invariant: a sequence is known exactly as long as its choice goes on.

use std::collections::HashMap;

use millrace_shared::id::{RequestId, SequenceId};

use crate::request::Request;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Requests {
    by_id: HashMap<RequestId, Request>,
    sequences: HashMap<SequenceId, (RequestId, u32)>,
}

impl Requests {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The request of a sequence, and which choice it is.
    pub(super) fn of(&self, sequence: SequenceId) -> Option<(&Request, u32)> {
        let (id, choice) = self.sequences.get(&sequence)?;
        Some((self.by_id.get(id)?, *choice))
    }

    /// The same, to change it.
    pub(super) fn of_mut(&mut self, sequence: SequenceId) -> Option<(&mut Request, u32)> {
        let (id, choice) = self.sequences.get(&sequence)?;
        Some((self.by_id.get_mut(id)?, *choice))
    }

    /// The request of this name.
    pub(super) fn named(&self, id: RequestId) -> Option<&Request> {
        self.by_id.get(&id)
    }

    /// The same, to change it.
    pub(super) fn named_mut(&mut self, id: RequestId) -> Option<&mut Request> {
        self.by_id.get_mut(&id)
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.by_id.values()
    }

    /// All of them, to change them.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Request> {
        self.by_id.values_mut()
    }

    pub(super) fn insert(&mut self, request: Request) {
        for &(sequence, choice) in &request.sequences {
            self.sequences.insert(sequence, (request.id, choice));
        }
        self.by_id.insert(request.id, request);
    }

    /// A choice of a request begins.
    pub(super) fn add(&mut self, id: RequestId, sequence: SequenceId, choice: u32) {
        if let Some(request) = self.by_id.get_mut(&id) {
            request.sequences.push((sequence, choice));
            self.sequences.insert(sequence, (id, choice));
        }
    }

    /// Takes a request out, with all its sequences.
    pub(super) fn remove(&mut self, id: RequestId) -> Option<Request> {
        let request = self.by_id.remove(&id)?;
        for (sequence, _) in &request.sequences {
            self.sequences.remove(sequence);
        }
        Some(request)
    }

    /// A choice has ended; its request may go on.
    pub(super) fn end(&mut self, sequence: SequenceId) {
        let Some((id, _)) = self.sequences.remove(&sequence) else { return };
        if let Some(request) = self.by_id.get_mut(&id) {
            request.sequences.retain(|(s, _)| *s != sequence);
        }
    }

    /// Gives a sequence another name; `false` where there is none of the old one.
    pub(super) fn rename(&mut self, old: SequenceId, new: SequenceId) -> bool {
        let Some((id, choice)) = self.sequences.remove(&old) else { return false };
        self.sequences.insert(new, (id, choice));
        if let Some(request) = self.by_id.get_mut(&id) {
            let named = request.sequences.iter_mut().filter(|(s, _)| *s == old);
            named.for_each(|(s, _)| *s = new);
        }
        true
    }
}
