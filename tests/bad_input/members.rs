//! Bytes from members with proper papers: from one that the plan names nowhere they harm nothing,
//! from the assigned neighbour a bad frame ends the epoch.

use std::time::Duration;

use harness::{ask, hostile};
use millrace_net::{Connection, Endpoint, MessageReceiver, MessageSender};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId};
use millrace_shared::model::Dtype;
use millrace_shared::wire::control::{BlobRequest, BlobResponse};
use millrace_shared::wire::data::{FrameHeader, FrameKind, HEADER_BYTES, StepMeta};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::rpc::Prompt;
use millrace_shared::wire::stamp::Stamp;
use millrace_shared::wire::{COORDINATOR_NAME, Edge, MAX_FRAME_PAYLOAD_BYTES, Plane, node_name};

use crate::cluster::{Cluster, under_attack};

const PIPELINE: PipelineId = PipelineId(1);

fn edge(epoch: u64, edge: Edge) -> Plane {
    Plane::Stage { pipeline: PIPELINE, epoch: Epoch(epoch), edge }
}

/// Opens a stream of a plane and sends bytes on it; ends when the peer wants no more.
async fn send(connection: &Connection, plane: &Plane, bytes: &[u8]) {
    let (send, recv) = connection.open_stream(plane).await.unwrap();
    let mut out = MessageSender::new(send);
    // The peer may refuse before it has read everything.
    let _ = out.send_bytes(bytes.to_vec().into()).await;
    let stopped = out.stream().stopped();
    harness::soon(stopped).await;
    drop(recv);
}

fn garbage(len: usize) -> Vec<u8> {
    let seed = 0x9e37_79b9_u32;
    eprintln!("garbage of {len} bytes, seed {seed:#x}");
    let mut state = seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// The header of a frame with more payload than any frame may have.
fn announced() -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Activations,
        dtype: Dtype::F32,
        pipeline: PIPELINE,
        epoch: Epoch(1),
        micro_batch: MicroBatchId(1),
        rows: 1,
        meta_len: 0,
        payload_len: MAX_FRAME_PAYLOAD_BYTES as u64 + 1,
        crc: 0,
        ready: Stamp::NONE,
    }
}

fn too_long() -> Vec<u8> {
    announced().encode().to_vec()
}

/// A frame as it was sent once before: sound in itself, and of the epoch that serves.
fn replayed(epoch: u64) -> Vec<u8> {
    let header = FrameHeader { payload_len: 0, rows: 0, epoch: Epoch(epoch), ..announced() };
    let frame = Frame::build(header, &StepMeta::default(), 0).unwrap().seal();
    frame.as_bytes().to_vec()
}

/// A valid member that the plan names nowhere can shout what it likes.
#[test]
fn bytes_from_a_member_without_a_part() {
    under_attack(async |cluster| {
        let (ca, to) = (cluster.ca(), cluster.coordinator.cluster);
        let epoch = cluster.epoch().await;
        let guest = ca.issue_node(hostile::new_id()).unwrap();
        let stages = cluster.stages().await;
        for bytes in [garbage(4096), too_long()] {
            for (node, _, address) in &stages {
                for kind in [Edge::Steps, Edge::Activations, Edge::Sequences, Edge::Results] {
                    let (_endpoint, connection) =
                        hostile::connect(&guest, *address, &node_name(*node)).await.unwrap();
                    send(&connection, &edge(epoch, kind), &bytes).await;
                    cluster.is_unharmed("a guest's edge to a node").await;
                }
            }
            let (_endpoint, connection) =
                hostile::connect(&guest, to, COORDINATOR_NAME).await.unwrap();
            send(&connection, &edge(epoch, Edge::Results), &bytes).await;
            cluster.is_unharmed("a guest's edge to the coordinator").await;
            send(&connection, &Plane::Control, &bytes).await;
            // No hello: the connection is closed, with a reason.
            harness::soon(connection.closed()).await;
            cluster.is_unharmed("a guest's control stream").await;
        }
        assert_eq!(cluster.epoch().await, epoch);
    });
}

#[test]
fn blobs_that_nobody_has() {
    under_attack(async |cluster| {
        let guest = cluster.ca().issue_node(hostile::new_id()).unwrap();
        let to = cluster.coordinator.cluster;
        let (_endpoint, connection) = hostile::connect(&guest, to, COORDINATOR_NAME).await.unwrap();
        let (send, recv) = connection.open_stream(&Plane::Blob).await.unwrap();
        let mut out = MessageSender::new(send);
        out.send(&BlobRequest { hash: [7; 32], offset: u64::MAX, len: u64::MAX }).await.unwrap();
        let answer = MessageReceiver::new(recv).recv_one(4096).await.unwrap();
        assert!(matches!(&answer, BlobResponse::Refused(m) if m.contains("0707")), "{answer:?}");
        cluster.is_unharmed("an unknown blob").await;
    });
}

/// From the neighbour that the plan names, a bad frame ends the epoch, and only that: requests go on
/// in the next one.
#[test]
fn bad_frames_from_the_assigned_neighbour() {
    under_attack(async |cluster| {
        let mut spoilt = too_long();
        spoilt[0] ^= 1;
        let frames = [
            (Some(too_long()), "exceeds the limit"),
            (Some(spoilt), "bad magic"),
            (Some(garbage(HEADER_BYTES)), "bad magic"),
            (None, "micro-batch 1 came after"),
        ];
        let story = || Prompt::Text("A long story".to_owned());
        let expected = ask::generate(&cluster.client, story(), ask::greedy(1500)).await.unwrap();
        for (bytes, message) in frames {
            let before = cluster.epoch().await;
            let stages = cluster.stages().await;
            let [(_, first, _), (second, _, address)] = &stages[..] else { panic!("two stages") };
            let asked = ask::begin(&cluster.client, story(), ask::greedy(1500)).await;
            let mut running = asked.unwrap();
            let begun = ask::take_tokens(&mut running, 1).await.unwrap();

            let (endpoint, connection) =
                hostile::connect(first, *address, &node_name(*second)).await.unwrap();
            let plane = edge(before, Edge::Activations);
            let sound = bytes.is_none();
            let bytes = bytes.unwrap_or_else(|| replayed(before));
            if sound {
                // What only the stage finds out does not end the edge.
                let (send, _recv) = connection.open_stream(&plane).await.unwrap();
                let mut out = MessageSender::new(send);
                out.send_bytes(bytes.into()).await.unwrap();
                said(cluster, message).await;
            } else {
                send(&connection, &plane, &bytes).await;
            }
            close(&endpoint).await;
            said(cluster, message).await;
            assert_eq!(ask::finish_from(running, begun).await.unwrap(), expected, "{message}");
            ask::until(&cluster.client, "at a higher epoch", |s| s.ready && s.epoch > before).await;
            cluster.is_unharmed(message).await;
        }
    });
}

/// Waits, without blocking what is being sent, until the coordinator says this.
async fn said(cluster: &Cluster, message: &str) {
    while !cluster.coordinator.process.log().contains(message) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn close(endpoint: &Endpoint) {
    endpoint.close("done");
    endpoint.drain().await;
}
