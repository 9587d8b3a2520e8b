//! Messages and stage frames over QUIC: whole ones, long ones, garbage.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::*;
use millrace_net::{
    Connection, FramePool, FrameReceiver, FrameSender, MessageReceiver, MessageSender, NetError,
    RecvStream, SendStream,
};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId};
use millrace_shared::wire::codec::CodecError;
use millrace_shared::wire::data::{FrameError, FrameHeader, StepMeta};
use millrace_shared::wire::{Edge, Plane};

type Halves = (SendStream, RecvStream);

fn stage() -> Plane {
    Plane::Stage { pipeline: PipelineId(1), epoch: Epoch(3), edge: Edge::Activations }
}

async fn stream(left: &Connection, right: &Connection) -> (Halves, Halves) {
    let asked = stage();
    let (opened, (plane, send, recv)) =
        soon(async { tokio::try_join!(left.open_stream(&asked), right.accept_stream()).unwrap() })
            .await;
    assert_eq!(plane, asked);
    (opened, (send, recv))
}

#[tokio::test]
async fn frames_arrive_whole_and_in_order() {
    let (left, right, _server) = pair().await;
    let ((send, _a), (_b, recv)) = stream(&left, &right).await;
    let pool = FramePool::new(4);
    let mut sender = FrameSender::new(send, Some(pool.clone()));
    let mut receiver = FrameReceiver::new(recv, pool.clone(), 64 << 20);
    // From nothing to several times the stream window's worth of one packet.
    let sizes = [0usize, 1, 576, 16 * 576, 1 << 20, 3];
    let sending = async {
        for (i, &floats) in sizes.iter().enumerate() {
            sender.send(frame(i as u64, floats)).await.unwrap();
        }
        sender.stream().finish();
    };
    let receiving = async {
        for (i, &floats) in sizes.iter().enumerate() {
            let got = receiver.recv().await.unwrap().unwrap();
            assert_eq!(got.header().micro_batch, MicroBatchId(i as u64));
            assert_eq!(got.meta::<StepMeta>().unwrap(), meta(i as u64));
            let payload = got.payload_f32().unwrap();
            assert_eq!(payload.len(), floats);
            assert!(payload.iter().enumerate().all(|(i, &x)| x == i as f32));
            pool.recycle(got);
        }
        assert!(receiver.recv().await.unwrap().is_none());
    };
    soon(async { tokio::join!(sending, receiving) }).await;
}

/// Sends raw bytes as if they were frames; returns what the receiver says.
async fn receive(bytes: Vec<u8>, limit: usize) -> NetError {
    let (left, right, _server) = pair().await;
    let ((send, _a), (_b, recv)) = stream(&left, &right).await;
    let mut sender = MessageSender::new(send);
    let mut receiver = FrameReceiver::new(recv, FramePool::new(1), limit);
    sender.send_bytes(Bytes::from(bytes)).await.unwrap();
    sender.finish();
    soon(receiver.recv()).await.unwrap_err()
}

#[tokio::test]
async fn garbage_is_refused() {
    let error = receive(vec![0xA5; 4096], 1 << 20).await;
    assert!(matches!(error, NetError::Frame(FrameError::Magic(_))), "{error}");
    assert!(error.is_violation());
}

#[tokio::test]
async fn damage_is_refused() {
    let mut bytes = frame(1, 100).as_bytes().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let error = receive(bytes, 1 << 20).await;
    assert!(matches!(error, NetError::Frame(FrameError::Checksum { .. })), "{error}");
}

#[tokio::test]
async fn truncation_is_refused() {
    let bytes = frame(1, 100).as_bytes().to_vec();
    for len in [1, 63, 64, bytes.len() - 1] {
        let error = receive(bytes[..len].to_vec(), 1 << 20).await;
        assert!(matches!(error, NetError::Ended(_)), "{len}: {error}");
    }
}

/// A length over the edge's limit is refused from the header alone.
#[tokio::test]
async fn long_frames_are_refused_before_allocation() {
    let header = FrameHeader { payload_len: 255 << 20, ..*frame(1, 0).header() };
    let error = receive(header.encode().to_vec(), 1 << 20).await;
    assert!(matches!(error, NetError::Frame(FrameError::TooLong { .. })), "{error}");
    let header = FrameHeader { payload_len: u64::MAX, ..header };
    let error = receive(header.encode().to_vec(), usize::MAX).await;
    assert!(matches!(error, NetError::Frame(FrameError::TooLong { .. })), "{error}");
}

#[tokio::test]
async fn messages_have_a_limit() {
    let (left, right, _server) = pair().await;
    let ((send, _a), (_b, recv)) = stream(&left, &right).await;
    let mut sender = MessageSender::new(send);
    let mut receiver = MessageReceiver::new(recv);
    sender.send(&vec![7u8; 300_000]).await.unwrap();
    let got: Vec<u8> = soon(receiver.recv_one(1 << 20)).await.unwrap();
    assert_eq!(got, vec![7u8; 300_000]);
    sender.send(&vec![7u8; 3000]).await.unwrap();
    let error = soon(receiver.recv::<Vec<u8>>(1000)).await.unwrap_err();
    assert!(matches!(error, NetError::Codec(CodecError::TooLong { len: 3002.., limit: 1000 })));
}

#[tokio::test]
async fn malformed_messages_are_errors() {
    let (left, right, _server) = pair().await;
    for bytes in [&b"\x03\0\0\0\xff\xff\xff"[..], &b"\x01\0\0\0"[..], &b"\x01\0"[..]] {
        let ((send, _a), (_b, recv)) = stream(&left, &right).await;
        let mut sender = MessageSender::new(send);
        sender.send_bytes(Bytes::copy_from_slice(bytes)).await.unwrap();
        sender.finish();
        let mut receiver = MessageReceiver::new(recv);
        assert!(soon(receiver.recv::<(u64, String)>(100)).await.is_err(), "{bytes:?}");
    }
}

/// A `recv` that loses a `select!` loses no byte.
#[tokio::test]
async fn receiving_is_cancel_safe() {
    let (left, right, _server) = pair().await;
    let ((send, _a), (_b, recv)) = stream(&left, &right).await;
    let mut sender = MessageSender::new(send);
    let pool = FramePool::new(1);
    let mut receiver = FrameReceiver::new(recv, pool, 1 << 20);
    let bytes = Bytes::copy_from_slice(frame(9, 2000).as_bytes());
    for piece in 0..bytes.len().div_ceil(50) {
        let piece = bytes.slice(piece * 50..bytes.len().min((piece + 1) * 50));
        sender.send_bytes(piece).await.unwrap();
        // Poll once, then drop the future.
        let polled = tokio::time::timeout(std::time::Duration::ZERO, receiver.recv()).await;
        if let Ok(got) = polled {
            assert_eq!(got.unwrap().unwrap().header().micro_batch, MicroBatchId(9));
            return;
        }
    }
    let got = soon(receiver.recv()).await.unwrap().unwrap();
    assert_eq!(got.header().micro_batch, MicroBatchId(9));
    assert_eq!(got.payload_f32().unwrap().len(), 2000);
}

#[test]
fn pools_reuse_buffers() {
    let pool = FramePool::new(1);
    let buffer = pool.take(4096);
    let at = buffer.as_ptr();
    assert_eq!(at as usize % 64, 0);
    pool.put(buffer);
    pool.put(millrace_net_buffer(100));
    let again = pool.take(128);
    assert_eq!((again.as_ptr(), again.len()), (at, 128));
}

fn millrace_net_buffer(len: usize) -> millrace_shared::wire::frame::FrameBuffer {
    FramePool::new(0).take(len)
}
