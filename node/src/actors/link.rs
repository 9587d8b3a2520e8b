//! The link task: keeps the control stream to the coordinator up.
//!
//! Connect → hello → welcome → carry messages both ways and accept the coordinator's edges, until
//! something ends; then wait a little and again. A refusal ends the node: what was refused (wire
//! version, numerics) does not change by trying again.

use std::time::Duration;

use actix::Addr;
use millrace_net::{
    ClientTls, Connection, Endpoint, MessageReceiver, MessageSender, NetError, PeerName, burst,
    timing,
};
use millrace_shared::wire::control::{CoordinatorMessage, Hello, NodeMessage};
use millrace_shared::wire::{COORDINATOR_NAME, MAX_CONTROL_BYTES, Plane};
use tokio::sync::mpsc;

use super::node::{Control, EdgeOffered, LinkDown, LinkUp, Node};

/// First wait before trying again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(250);
/// Longest wait: an operator who restarts a coordinator does not want to wait longer.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Messages that may wait for the writer: heartbeats and answers, a few a second.
const OUT_CAPACITY: usize = 64;

/// How a link ended.
#[derive(Debug)]
pub enum LinkEnd {
    /// Try again.
    Lost(String),
    /// The coordinator will not have this node.
    Refused(String),
}

/// What the link task needs.
#[derive(Debug)]
pub struct LinkParts {
    /// The node's endpoint.
    pub endpoint: Endpoint,
    /// The node's identity.
    pub tls: ClientTls,
    /// `host:port` of the coordinator's cluster endpoint.
    pub coordinator: String,
    /// How the node introduces itself.
    pub hello: Hello,
}

/// Runs until the coordinator refuses the node; returns its reason.
pub async fn run(parts: LinkParts, node: Addr<Node>) -> String {
    let mut wait = RETRY_MIN;
    loop {
        match session(&parts, &node, &mut wait).await {
            LinkEnd::Refused(message) => return message,
            LinkEnd::Lost(message) => {
                // The node's actor ends with the node; nobody needs the link then.
                if node.send(LinkDown).await.is_err() || !node.connected() {
                    return "the node is shutting down".to_owned();
                }
                tracing::warn!("no link to the coordinator: {message}; trying again in {wait:?}");
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

async fn session(parts: &LinkParts, node: &Addr<Node>, wait: &mut Duration) -> LinkEnd {
    let result = async {
        let connection = parts
            .endpoint
            .connect_host(&parts.coordinator, COORDINATOR_NAME, &parts.tls, timing::HANDSHAKE)
            .await?;
        let (send, recv) = connection.open_stream(&Plane::Control).await?;
        let (mut sender, mut receiver) = (MessageSender::new(send), MessageReceiver::new(recv));
        sender.send(&NodeMessage::Hello(Box::new(parts.hello.clone()))).await?;
        let answer = tokio::time::timeout(
            timing::FIRST_MESSAGE,
            receiver.recv_one::<CoordinatorMessage>(MAX_CONTROL_BYTES),
        )
        .await
        .map_err(|_| NetError::Lost("no answer to the hello".into()))??;
        Ok((connection, sender, receiver, answer))
    }
    .await;
    let (connection, sender, receiver, answer) = match result {
        Ok(parts) => parts,
        Err(e) => return lost(e),
    };
    if let CoordinatorMessage::Refused { message } = answer {
        return LinkEnd::Refused(message);
    }
    *wait = RETRY_MIN;
    tracing::info!(coordinator = %parts.coordinator, "linked to the coordinator");
    let (out, messages) = mpsc::channel(OUT_CAPACITY);
    if node.send(LinkUp { connection: connection.clone(), out }).await.is_err()
        || node.send(Control(answer)).await.is_err()
    {
        return LinkEnd::Refused("the node is shutting down".into());
    }
    let ended = tokio::select! {
        e = write(sender, messages) => e,
        e = read(receiver, node) => e,
        e = accept_edges(&connection, node) => e,
        e = connection.closed() => e,
    };
    connection.close("the control link ended");
    lost(ended)
}

#[expect(clippy::needless_pass_by_value, reason = "an error is used up where it ends a session")]
fn lost(e: NetError) -> LinkEnd {
    if e.is_revocation() {
        return LinkEnd::Refused(format!(
            "{e}: to enrol the machine as a new node, remove its folder and start it with --token"
        ));
    }
    LinkEnd::Lost(e.to_string())
}

async fn write(mut sender: MessageSender, mut messages: mpsc::Receiver<NodeMessage>) -> NetError {
    while let Some(message) = messages.recv().await {
        if let Err(e) = sender.send(&message).await {
            return e;
        }
    }
    NetError::Ended("the node dropped the link")
}

async fn read(mut receiver: MessageReceiver, node: &Addr<Node>) -> NetError {
    loop {
        match receiver.recv_one(MAX_CONTROL_BYTES).await {
            Ok(CoordinatorMessage::Refused { message }) => return NetError::Lost(message),
            Ok(message) => {
                if node.send(Control(message)).await.is_err() {
                    return NetError::Ended("the node is shutting down");
                }
            }
            Err(e) => return e,
        }
    }
}

/// Offers every stream that the peer of `connection` opens to the node.
pub async fn accept_edges(connection: &Connection, node: &Addr<Node>) -> NetError {
    let peer: PeerName = match connection.peer_name() {
        Ok(peer) => peer,
        Err(e) => return e,
    };
    loop {
        let incoming = match connection.accept_incoming().await {
            Ok(incoming) => incoming,
            Err(e) => return e,
        };
        let node = node.clone();
        // Apart, so that a silent stream keeps nobody waiting; QUIC bounds their number.
        actix_rt::spawn(async move {
            match incoming.plane(timing::FIRST_MESSAGE).await {
                Ok((Plane::Burst, send, recv)) if matches!(peer, PeerName::Node(_)) => {
                    if let Err(e) = burst::answer(send, recv).await {
                        tracing::debug!(?peer, "a burst: {e}");
                    }
                }
                Ok((plane, send, recv)) => {
                    let _ = node.send(EdgeOffered { peer, plane, send, recv }).await;
                }
                Err(e) => tracing::warn!(?peer, "a stream was refused: {e}"),
            }
        });
    }
}
