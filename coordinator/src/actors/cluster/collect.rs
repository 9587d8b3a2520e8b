//! Asking a node for what helps to find out what went wrong.

use std::time::Duration;

use futures::future::BoxFuture;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::admin::{AdminReply, CollectedFile, MAX_COLLECTED_BYTES};
use millrace_shared::wire::control::CoordinatorMessage;
use tokio::sync::oneshot;

use super::Cluster;

/// Longest wait for a node.
const LIMIT: Duration = Duration::from_secs(5);
/// Files that a node may hand over.
const MAX_FILES: usize = 64;

/// Nodes that were asked.
#[derive(Debug, Default)]
pub(super) struct Collecting {
    tickets: u64,
    waiting: Vec<(u64, NodeId, oneshot::Sender<Vec<CollectedFile>>)>,
}

impl Cluster {
    /// Asks a node; the answer comes when it does.
    pub(super) fn collect(&mut self, node: &str) -> BoxFuture<'static, Result<AdminReply, Status>> {
        let id = match self.find(node) {
            Ok(id) => id,
            Err(status) => return Box::pin(async move { Err(status) }),
        };
        let (sender, answer) = oneshot::channel();
        let collecting = &mut self.collecting;
        collecting.waiting.retain(|(_, _, sender)| !sender.is_closed());
        collecting.tickets += 1;
        let ticket = collecting.tickets;
        collecting.waiting.push((ticket, id, sender));
        self.say(id, CoordinatorMessage::Collect { ticket });
        let node = node.to_owned();
        Box::pin(async move {
            match tokio::time::timeout(LIMIT, answer).await {
                Ok(Ok(files)) => Ok(AdminReply::Collected(files)),
                _ => Err(Status::new(
                    ErrorCode::DeadlineExceeded,
                    format!("{node} has not answered within {LIMIT:?}"),
                )),
            }
        })
    }

    /// A node hands over what it knows. Names become parts of paths at the one who asked.
    pub(super) fn collected(&mut self, id: NodeId, ticket: u64, files: Vec<CollectedFile>) {
        let waiting = &mut self.collecting.waiting;
        let Some(at) = waiting.iter().position(|(t, node, _)| (*t, *node) == (ticket, id)) else {
            return;
        };
        let (_, _, sender) = waiting.swap_remove(at);
        let plain = |c: char| c.is_ascii_alphanumeric() || ['.', '-', '_'].contains(&c);
        let sound = |f: &CollectedFile| {
            (1..=64).contains(&f.name.len())
                && f.name.chars().all(plain)
                && !f.name.starts_with('.')
        };
        let bytes: usize = files.iter().map(|f| f.bytes.len()).sum();
        if files.len() > MAX_FILES || bytes > MAX_COLLECTED_BYTES || !files.iter().all(sound) {
            return tracing::warn!(node = %id, "what it hands over is too much, or has odd names");
        }
        let _ = sender.send(files);
    }
}
