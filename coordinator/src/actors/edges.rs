//! The coordinator's own edges: step frames to the first stage, opened sequences to the last one,
//! results back.

use actix::Addr;
use millrace_net::pump::{pump_in, pump_out};
use millrace_net::{Connection, EdgeReceiver, EdgeSender, FramePool, RecvStream, SendStream};
use millrace_shared::id::{Epoch, PipelineId};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::{Edge, MAX_FRAME_META_BYTES};
use tokio::sync::mpsc;

use super::batcher::{Batcher, ResultFrame};
use super::cluster::{Cluster, EdgeFailed, OwnEdgeOpen};

/// Opens an edge on a member's connection and carries `frames` until it is lost or let go.
pub(super) fn carry_out(
    cluster: Addr<Cluster>,
    connection: Connection,
    (pipeline, epoch, edge): (PipelineId, Epoch, Edge),
    credits: u32,
    frames: mpsc::Receiver<Frame>,
) {
    actix_rt::spawn(async move {
        let result =
            match EdgeSender::open(&connection, (pipeline, epoch, edge), credits, None).await {
                Ok(sender) => {
                    let _ = cluster.send(OwnEdgeOpen { epoch, edge }).await;
                    pump_out(sender, frames).await
                }
                Err(e) => Err(e),
            };
        if let Err(e) = result {
            let message = format!("{edge:?} edge from the coordinator: {e}");
            let _ = cluster.send(EdgeFailed { epoch, message }).await;
        }
    });
}

/// Hands the frames of the results edge to the batcher.
pub(super) fn carry_in(
    cluster: Addr<Cluster>,
    batcher: Addr<Batcher>,
    (send, recv): (SendStream, RecvStream),
    epoch: Epoch,
    credits: u32,
) {
    actix_rt::spawn(async move {
        let pool = FramePool::new(credits as usize + 1);
        let edge = EdgeReceiver::new(send, recv, credits, pool, MAX_FRAME_META_BYTES + 4096);
        let deliver = |frame: Frame, ticket| {
            let (batcher, cluster) = (batcher.clone(), cluster.clone());
            async move {
                let answer = batcher.send(ResultFrame(frame)).await;
                drop(ticket);
                match answer {
                    Ok(Ok(())) => true,
                    Ok(Err(message)) => {
                        let message = format!("bad frame from the last stage: {message}");
                        let _ = cluster.send(EdgeFailed { epoch, message }).await;
                        false
                    }
                    Err(_) => false,
                }
            }
        };
        // Also an end in order ends the epoch, if that still lives.
        let message = match pump_in(edge, credits, deliver).await {
            Ok(()) => "results edge: the last stage let go of it".to_owned(),
            Err(e) => format!("results edge: {e}"),
        };
        let _ = cluster.send(EdgeFailed { epoch, message }).await;
    });
}
