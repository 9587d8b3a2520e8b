//! Stage edges: credits hold the sender back, over QUIC and inside one process alike.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use millrace_net::pump::{pump_in, pump_out};
use millrace_net::{
    EdgeReceiver, EdgeSender, FramePool, FrameSender, MessageSender, NetError, burst,
    local_stream_pair,
};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId};
use millrace_shared::wire::data::Credit;
use millrace_shared::wire::{Edge, Plane};
use tokio::sync::mpsc;

const CREDITS: u32 = 2;
const MAX_FRAME: usize = 1 << 20;

async fn quic_edge(
    left: &millrace_net::Connection,
    right: &millrace_net::Connection,
) -> (EdgeSender, EdgeReceiver) {
    let name = (PipelineId(1), Epoch(3), Edge::Activations);
    let (sender, (plane, send, recv)) = soon(async {
        tokio::try_join!(EdgeSender::open(left, name, CREDITS, None), right.accept_stream())
            .unwrap()
    })
    .await;
    assert!(matches!(plane, Plane::Stage { edge: Edge::Activations, .. }));
    (sender, EdgeReceiver::new(send, recv, CREDITS, FramePool::new(4), MAX_FRAME))
}

fn local_edge() -> (EdgeSender, EdgeReceiver) {
    let ((send, credits_in), (credits_out, recv)) = local_stream_pair(CREDITS as usize);
    let receiver = EdgeReceiver::new(credits_out, recv, CREDITS, FramePool::new(4), MAX_FRAME);
    (EdgeSender::new(send, credits_in, CREDITS, None), receiver)
}

/// Two frames leave; the third waits for a credit, however long the receiver takes.
async fn holds_back(mut sender: EdgeSender, mut receiver: EdgeReceiver) {
    soon(sender.send(frame(0, 10))).await.unwrap();
    soon(sender.send(frame(1, 10))).await.unwrap();
    assert_eq!(sender.available(), 0);
    for i in 0..2 {
        let got = soon(receiver.recv()).await.unwrap().unwrap();
        assert_eq!(got.header().micro_batch, MicroBatchId(i));
    }
    // Received, not released: still no credit.
    let waited = tokio::time::timeout(Duration::from_millis(50), sender.ready()).await;
    assert!(waited.is_err(), "a third frame needs a credit");
    receiver.release(1).await.unwrap();
    soon(sender.send(frame(2, 10))).await.unwrap();
    assert_eq!(sender.available(), 0);
    assert_eq!(soon(receiver.recv()).await.unwrap().unwrap().header().micro_batch, MicroBatchId(2));
    receiver.release(2).await.unwrap();
    soon(sender.ready()).await.unwrap();
    assert_eq!(sender.available(), 2);
    sender.finish();
    assert!(soon(receiver.recv()).await.unwrap().is_none());
    assert!(receiver.release(1).await.is_err(), "nothing is held");
}

#[tokio::test]
async fn credits_hold_the_sender_back_over_quic() {
    let (left, right, _server) = pair().await;
    let (sender, receiver) = quic_edge(&left, &right).await;
    holds_back(sender, receiver).await;
}

#[tokio::test]
async fn credits_hold_the_sender_back_in_process() {
    let (sender, receiver) = local_edge();
    holds_back(sender, receiver).await;
}

async fn streams(mut sender: EdgeSender, mut receiver: EdgeReceiver) {
    const FRAMES: u64 = 200;
    let sending = async {
        for i in 0..FRAMES {
            sender.send(frame(i, 576)).await.unwrap();
        }
        sender
    };
    let receiving = async {
        for i in 0..FRAMES {
            let got = receiver.recv().await.unwrap().unwrap();
            assert_eq!(got.header().micro_batch, MicroBatchId(i));
            receiver.release(1).await.unwrap();
        }
    };
    soon(async { tokio::join!(sending, receiving) }).await;
}

#[tokio::test]
async fn many_frames_flow() {
    let (left, right, _server) = pair().await;
    let (sender, receiver) = quic_edge(&left, &right).await;
    streams(sender, receiver).await;
    let (sender, receiver) = local_edge();
    streams(sender, receiver).await;
}

/// Frames pass through both pumps; a frame's credit returns when its ticket is dropped.
#[tokio::test]
async fn pumps_join_channels_to_edges() {
    let (left, right, _server) = pair().await;
    let (sender, receiver) = quic_edge(&left, &right).await;
    let (feed, frames) = mpsc::channel(1);
    let (deliver, mut delivered) = mpsc::channel(CREDITS as usize);
    let out = pump_out(sender, frames);
    let into = pump_in(receiver, CREDITS, |frame, ticket| {
        let deliver = deliver.clone();
        async move { deliver.send((frame, ticket)).await.is_ok() }
    });
    let feeding = async {
        for i in 0..20 {
            feed.send(frame(i, 10)).await.unwrap();
        }
        drop(feed);
    };
    let taking = async {
        for i in 0..20 {
            let (frame, ticket) = delivered.recv().await.unwrap();
            assert_eq!(frame.header().micro_batch, MicroBatchId(i));
            drop(ticket);
        }
    };
    let (sent, received, (), ()) = soon(async { tokio::join!(out, into, feeding, taking) }).await;
    sent.unwrap();
    received.unwrap();
}

#[tokio::test]
async fn loss_is_reported_to_both_ends() {
    let (left, right, _server) = pair().await;
    let (mut sender, receiver) = quic_edge(&left, &right).await;
    drop(receiver);
    assert!(matches!(soon(sender.lost()).await, NetError::Ended(_)));

    let (mut sender, mut receiver) = quic_edge(&left, &right).await;
    left.close("gone");
    let lost = soon(receiver.recv()).await.unwrap_err();
    assert!(lost.to_string().contains("gone"), "{lost}");
    assert!(matches!(soon(sender.lost()).await, NetError::Lost(_)));

    let (mut sender, receiver) = local_edge();
    drop(receiver);
    assert!(matches!(soon(sender.lost()).await, NetError::Ended(_)));
}

#[tokio::test]
async fn cheats_are_found() {
    // More frames than credits.
    let ((send, _credits), (credits, recv)) = local_stream_pair(8);
    let mut receiver = EdgeReceiver::new(credits, recv, CREDITS, FramePool::new(1), MAX_FRAME);
    let mut cheat = FrameSender::new(send, None);
    for i in 0..=u64::from(CREDITS) {
        cheat.send(frame(i, 1)).await.unwrap();
    }
    for _ in 0..CREDITS {
        soon(receiver.recv()).await.unwrap().unwrap();
    }
    assert!(matches!(soon(receiver.recv()).await, Err(NetError::Protocol(_))));

    // More credits than frames.
    let ((send, recv), (cheat, _frames)) = local_stream_pair(8);
    let mut sender = EdgeSender::new(send, recv, CREDITS, None);
    soon(sender.send(frame(0, 1))).await.unwrap();
    MessageSender::new(cheat).send(&Credit(2)).await.unwrap();
    assert!(matches!(soon(sender.lost()).await, NetError::Protocol(_)));
}

#[tokio::test]
async fn a_burst_measures_a_way() {
    let (left, right, _endpoint) = pair().await;
    let answering = tokio::spawn(async move {
        while let Ok((plane, send, recv)) = right.accept_stream().await {
            assert_eq!(plane, Plane::Burst);
            burst::answer(send, recv).await.unwrap();
        }
    });
    let rate = soon(burst::measure(&left)).await.unwrap();
    // A machine that is held up for long looks like a long way.
    assert!(rate.is_none_or(|r| r.is_finite() && r > 0.0), "{rate:?}");
    left.close("measured");
    soon(answering).await.unwrap();
}

#[tokio::test]
async fn a_burst_has_an_end() {
    let ((send, _back), (answers, recv)) = local_stream_pair(4);
    let answering = tokio::spawn(burst::answer(answers, recv));
    let mut messages = MessageSender::new(send);
    let sent = messages.send_bytes(vec![0; (1 << 20) + 1].into());
    let _ = soon(sent).await;
    let error = soon(answering).await.unwrap().unwrap_err();
    assert!(error.is_violation(), "{error}");
}
