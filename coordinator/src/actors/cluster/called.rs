//! What nodes are called: the machines of `millrace_shared::membership` know them by their ids alone, and
//! people by their names.

use std::collections::BTreeMap;

use millrace_shared::id::NodeId;

/// The names of all nodes that were ever there, under which they were last known.
#[derive(Debug, Default)]
pub(super) struct Called(BTreeMap<NodeId, String>);

impl Called {
    /// A node says what it is called.
    pub(super) fn note(&mut self, node: NodeId, name: &str) {
        self.0.insert(node, name.to_owned());
    }

    /// The name of a node.
    pub(super) fn of(&self, node: NodeId) -> Option<&str> {
        self.0.get(&node).map(String::as_str)
    }

    /// The name of the node whose id is in the text.
    pub(super) fn mentioned(&self, text: &str) -> Option<&str> {
        let named = self.0.iter().find(|(node, _)| text.contains(&node.to_string()));
        named.map(|(_, name)| name.as_str())
    }

    /// The text with names in place of ids. An id that is nobody's stays.
    pub(super) fn in_names(&self, text: &str) -> String {
        self.0
            .iter()
            .fold(text.to_owned(), |text, (node, name)| text.replace(&node.to_string(), name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_become_names_and_strangers_stay() {
        let [a, b, stranger] = [1, 2, 3].map(|n| NodeId(uuid::Uuid::from_u128(n)));
        let mut called = Called::default();
        called.note(a, "gpu-a");
        called.note(b, "old");
        called.note(b, "gpu-b");
        let text =
            format!("node {b} was lost: no heartbeat; {a}, {stranger} are there, {b} is not");
        let named =
            format!("node gpu-b was lost: no heartbeat; gpu-a, {stranger} are there, gpu-b is not");
        assert_eq!(called.in_names(&text), named);
        assert_eq!((called.of(b), called.of(stranger)), (Some("gpu-b"), None));
        assert_eq!(called.mentioned(&format!("no answer of {b}")), Some("gpu-b"));
        assert_eq!(called.mentioned(&format!("no answer of {stranger}")), None);
    }
}
