//! A stage edge in each direction between two members, as the product opens them.

use std::net::SocketAddr;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use harness::frames::activations;
use millrace_net::{ClusterCa, EdgeReceiver, EdgeSender, Endpoint, FramePool, tls};
use millrace_shared::id::{Epoch, NodeId, PipelineId};
use millrace_shared::wire::{Edge, node_name};
use tokio::runtime::{Builder, Runtime};
use uuid::Uuid;

use crate::{FRAMES, WINDOW, ping_pong};

const DEADLINE: Duration = Duration::from_secs(10);
const MAX_FRAME: usize = 1 << 20;
const NAME: (PipelineId, Epoch, Edge) = (PipelineId(1), Epoch(1), Edge::Activations);

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Sorted round trips, and bytes per second one way.
pub(crate) fn measure(rows: usize) -> (Vec<Duration>, f64) {
    let ca = ClusterCa::create().unwrap();
    let (left_id, right_id) = (NodeId(Uuid::now_v7()), NodeId(Uuid::now_v7()));
    let (left, right) = (ca.issue_node(left_id).unwrap(), ca.issue_node(right_id).unwrap());
    let (told, address) = channel();
    let far = std::thread::spawn(move || {
        runtime().block_on(async move {
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let endpoint = Endpoint::bind(any, Some(tls::cluster_server(&right).unwrap())).unwrap();
            told.send(endpoint.local_addr().unwrap()).unwrap();
            let connection = endpoint.accept().await.unwrap().handshake(DEADLINE).await.unwrap();
            let (_, send, recv) = connection.accept_stream().await.unwrap();
            let mut inbound = EdgeReceiver::new(send, recv, WINDOW, FramePool::new(16), MAX_FRAME);
            let mut outbound = EdgeSender::open(&connection, NAME, WINDOW, None).await.unwrap();
            // One row asks for an answer of the same size, others are only taken.
            while let Ok(Some(got)) = inbound.recv().await {
                let id = got.header().micro_batch.0;
                let rows = got.header().rows as usize;
                inbound.release(1).await.unwrap();
                if id > 0 {
                    outbound.send(activations(rows, id)).await.unwrap();
                }
            }
        });
    });
    let to = address.recv().unwrap();
    let runtime = runtime();
    let (mut out, mut back, endpoint) = runtime.block_on(async {
        let endpoint = Endpoint::client(to).unwrap();
        let client = tls::cluster_client(&left).unwrap();
        let connection =
            endpoint.connect(to, &node_name(right_id), &client, DEADLINE).await.unwrap();
        let out = EdgeSender::open(&connection, NAME, WINDOW, None).await.unwrap();
        let (_, send, recv) = connection.accept_stream().await.unwrap();
        let back = EdgeReceiver::new(send, recv, WINDOW, FramePool::new(16), MAX_FRAME);
        (out, back, endpoint)
    });
    let times = ping_pong(|| {
        runtime.block_on(async {
            out.send(activations(rows, 1)).await.unwrap();
            back.recv().await.unwrap().unwrap();
            back.release(1).await.unwrap();
        });
    });
    let bytes = activations(rows, 0).as_bytes().len() * FRAMES;
    let start = Instant::now();
    runtime.block_on(async {
        for i in 0..FRAMES {
            // The last one is answered when all before it have arrived.
            out.send(activations(rows, u64::from(i + 1 == FRAMES))).await.unwrap();
        }
        back.recv().await.unwrap().unwrap();
    });
    let rate = bytes as f64 / start.elapsed().as_secs_f64();
    runtime.block_on(async {
        out.finish();
        endpoint.close("done");
        endpoint.drain().await;
    });
    drop(far);
    (times, rate)
}
