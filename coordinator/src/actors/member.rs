//! Tasks of the cluster endpoint: one per connected node, one per stream it opens. They translate
//! streams into messages to [`Cluster`] and serve blobs.

use std::sync::Arc;

use actix::Addr;
use millrace_net::revoked::Revocations;
use millrace_net::{
    Connection, Endpoint, MessageReceiver, MessageSender, NetError, PeerName, RecvStream,
    SendStream, timing,
};
use millrace_shared::id::NodeId;
use millrace_shared::membership::Session;
use millrace_shared::wire::control::{CoordinatorMessage, NodeMessage};
use millrace_shared::wire::{MAX_CONTROL_BYTES, Plane};
use tokio::sync::mpsc;

use super::cluster::{Cluster, EdgeOffered, FromNode, NodeGone, NodeHello};
use crate::blobs::Blobs;

/// Messages that may wait for a node: an assignment and a few orders.
const OUT_CAPACITY: usize = 64;

/// Accepts members until the endpoint closes.
pub async fn accept_members(
    endpoint: Endpoint,
    cluster: Addr<Cluster>,
    blobs: Arc<Blobs>,
    revoked: Arc<Revocations>,
) {
    while let Some(incoming) = endpoint.accept().await {
        let (cluster, blobs) = (cluster.clone(), Arc::clone(&blobs));
        let revoked = Arc::clone(&revoked);
        actix_rt::spawn(async move {
            match incoming.handshake(timing::HANDSHAKE).await {
                Ok(connection) => match connection.peer_name() {
                    Ok(PeerName::Node(id)) => {
                        tokio::select! {
                            () = serve(id, connection.clone(), cluster, blobs) => {}
                            () = revoked.until(id) => {
                                connection.close("this node's certificate was revoked");
                            }
                        }
                    }
                    _ => connection.close("only nodes connect here"),
                },
                Err(e) => tracing::warn!("refused on the cluster endpoint: {e}"),
            }
        });
    }
}

async fn serve(id: NodeId, connection: Connection, cluster: Addr<Cluster>, blobs: Arc<Blobs>) {
    let reason = loop {
        let incoming = match connection.accept_incoming().await {
            Ok(incoming) => incoming,
            Err(e) => break e,
        };
        let (connection, cluster) = (connection.clone(), cluster.clone());
        let blobs = Arc::clone(&blobs);
        // Apart, so that a silent stream keeps nobody waiting; QUIC bounds their number.
        actix_rt::spawn(async move {
            let result = match incoming.plane(timing::FIRST_MESSAGE).await {
                Ok((Plane::Control, send, recv)) => {
                    control(id, &connection, &cluster, send, recv).await
                }
                Ok((Plane::Blob, send, recv)) => blobs.serve(send, recv).await,
                Ok((plane @ Plane::Stage { .. }, send, recv)) => {
                    let _ = cluster.send(EdgeOffered { node: id, plane, send, recv }).await;
                    Ok(())
                }
                Ok((Plane::Burst, ..)) => Err(NetError::Protocol("bursts go between nodes".into())),
                Err(e) => Err(e),
            };
            if let Err(e) = result {
                tracing::debug!(node = %id, "a stream ended: {e}");
                if e.is_violation() {
                    tracing::warn!(node = %id, "connection closed: {e}");
                    connection.close(&e.to_string());
                }
            }
        });
    };
    tracing::debug!(node = %id, "connection ended: {reason}");
}

async fn control(
    id: NodeId,
    connection: &Connection,
    cluster: &Addr<Cluster>,
    send: SendStream,
    recv: RecvStream,
) -> Result<(), NetError> {
    let (mut sender, mut receiver) = (MessageSender::new(send), MessageReceiver::new(recv));
    let hello = tokio::time::timeout(timing::FIRST_MESSAGE, receiver.recv_one(MAX_CONTROL_BYTES));
    let hello = match hello.await {
        Ok(Ok(NodeMessage::Hello(hello))) => hello,
        Ok(Ok(_)) => return Err(NetError::Protocol("the first message is not a hello".into())),
        Ok(Err(e)) => return Err(e),
        Err(_) => return Err(NetError::Protocol("no hello".into())),
    };
    let (out, mut messages) = mpsc::channel(OUT_CAPACITY);
    let introduction = NodeHello { id, hello: *hello, connection: connection.clone(), out };
    let session = match cluster.send(introduction).await {
        Ok(Ok(session)) => session,
        Ok(Err(message)) => {
            sender.send(&CoordinatorMessage::Refused { message: message.clone() }).await?;
            sender.finish();
            // The peer closes once it has read why.
            let _ = tokio::time::timeout(timing::DRAIN, connection.closed()).await;
            connection.close(&message);
            return Ok(());
        }
        Err(_) => return Ok(()),
    };
    let write = async {
        while let Some(message) = messages.recv().await {
            sender.send(&message).await?;
        }
        // The cluster let go of this node: replaced, or shutting down.
        Ok(())
    };
    let read = async {
        loop {
            let message = receiver.recv_one::<NodeMessage>(MAX_CONTROL_BYTES).await?;
            if cluster.send(FromNode { id, session, message }).await.is_err() {
                return Ok(());
            }
        }
    };
    let result = tokio::select! { r = write => r, r = read => r };
    gone(cluster, id, session).await;
    connection.close("the control stream ended");
    result
}

async fn gone(cluster: &Addr<Cluster>, id: NodeId, session: Session) {
    let _ = cluster.send(NodeGone { id, session }).await;
}
