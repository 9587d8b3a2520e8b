//! What the tests share: a throw-away cluster, connected pairs, frames, and a deadline for
//! everything. Each test file uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::net::SocketAddr;
use std::time::Duration;

use millrace_net::{ClusterCa, Connection, Endpoint, Identity, NetError, tls};
use millrace_shared::id::{Epoch, MicroBatchId, NodeId, PipelineId, SequenceId};
use millrace_shared::model::Dtype;
use millrace_shared::wire::data::{FrameHeader, FrameKind, Row, StepMeta, Want};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::stamp::Stamp;
use uuid::Uuid;

pub const DEADLINE: Duration = Duration::from_secs(20);

/// Fails the test, instead of hanging it, when something never comes.
pub async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("within the deadline")
}

pub fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub fn node_id() -> NodeId {
    NodeId(Uuid::now_v7())
}

pub struct Cluster {
    pub ca: ClusterCa,
    pub coordinator: Identity,
}

pub fn cluster() -> Cluster {
    let ca = ClusterCa::create().unwrap();
    let coordinator = ca.issue_coordinator().unwrap();
    Cluster { ca, coordinator }
}

/// A cluster endpoint on a free loopback port, and its address.
pub fn cluster_endpoint(identity: &Identity) -> (Endpoint, SocketAddr) {
    let tls = tls::cluster_server(identity).unwrap();
    let endpoint = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let addr = endpoint.local_addr().unwrap();
    (endpoint, addr)
}

/// Dials as `identity`, expecting `name`; both sides' results.
pub async fn dial(
    server: &Endpoint,
    identity: &Identity,
    name: &str,
) -> (Result<Connection, NetError>, Result<Connection, NetError>) {
    let addr = server.local_addr().unwrap();
    let client = Endpoint::client(addr).unwrap();
    let tls = tls::cluster_client(identity).unwrap();
    soon(async {
        tokio::join!(client.connect(addr, name, &tls, DEADLINE), async {
            server.accept().await.unwrap().handshake(DEADLINE).await
        })
    })
    .await
}

/// Two connected members: a node (left) and the coordinator (right). The endpoint keeps listening.
pub async fn pair() -> (Connection, Connection, Endpoint) {
    let cluster = cluster();
    let (server, _) = cluster_endpoint(&cluster.coordinator);
    let node = cluster.ca.issue_node(node_id()).unwrap();
    let (left, right) = dial(&server, &node, millrace_shared::wire::COORDINATOR_NAME).await;
    (left.unwrap(), right.unwrap(), server)
}

/// A sealed activation frame with `floats` floats of payload.
pub fn frame(micro_batch: u64, floats: usize) -> Frame {
    let header = FrameHeader {
        kind: FrameKind::Activations,
        dtype: Dtype::F32,
        pipeline: PipelineId(1),
        epoch: Epoch(3),
        micro_batch: MicroBatchId(micro_batch),
        rows: 1,
        meta_len: 0,
        payload_len: 0,
        crc: 0,
        ready: Stamp::NONE,
    };
    let mut frame = Frame::build(header, &meta(micro_batch), floats * 4).unwrap();
    for (i, four) in frame.payload_mut().chunks_exact_mut(4).enumerate() {
        four.copy_from_slice(&(i as f32).to_le_bytes());
    }
    frame.seal()
}

pub fn meta(sequence: u64) -> StepMeta {
    StepMeta {
        rows: vec![Row {
            sequence: SequenceId(sequence),
            sequence_epoch: 0,
            position: 0,
            count: 1,
            want: Want::Sample,
        }],
        ..StepMeta::default()
    }
}
