//! How fast a way between two members is: a burst of bytes on a connection that carries nothing else.
//!
//! First a little, so that a slow way is not held up for long, then, where that was quick, a mebibyte.
//! The peer counts and says so; what the answer takes beside the round trip is the burst's. Longer
//! round trips than 20 ms say more about windows than about bandwidth and are not measured.

use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_shared::wire::Plane;

use crate::error::within;
use crate::{Connection, MessageReceiver, MessageSender, NetError, RecvStream, SendStream, timing};

/// The first burst.
const LITTLE: usize = 64 << 10;
/// The second: what a member's first window takes.
const MUCH: usize = 1 << 20;
/// Where the first takes longer than this, it is enough.
const ENOUGH: Duration = Duration::from_millis(50);
/// Longest round trip for which a burst says something.
const FAR: Duration = Duration::from_millis(20);
/// An answer is a number.
const MAX_ANSWER_BYTES: usize = 16;

/// Bytes a second to the peer of `connection`; `None` where the way is too long to tell.
///
/// # Errors
/// If the connection is gone or the peer does not answer in time.
pub async fn measure(connection: &Connection) -> Result<Option<f64>, NetError> {
    if connection.rtt() > FAR {
        return Ok(None);
    }
    let (mut rate, took) = one(connection, LITTLE).await?;
    if took < ENOUGH {
        (rate, _) = one(connection, MUCH).await?;
    }
    Ok(Some(rate))
}

/// One burst: bytes a second, and how long it took.
async fn one(connection: &Connection, bytes: usize) -> Result<(f64, Duration), NetError> {
    within(timing::BURST, "measuring a way", async {
        let (mut send, recv) = connection.open_stream(&Plane::Burst).await?;
        let start = Instant::now();
        send.write(&mut Bytes::from(vec![0; bytes])).await?;
        send.finish();
        let counted: u64 = MessageReceiver::new(recv).recv_one(MAX_ANSWER_BYTES).await?;
        let took = start.elapsed();
        if counted != bytes as u64 {
            return Err(NetError::Protocol(format!("{counted} of {bytes} bytes were counted")));
        }
        let moving = took.saturating_sub(connection.rtt()).max(took / 10);
        Ok((bytes as f64 / moving.as_secs_f64().max(1e-9), took))
    })
    .await
}

/// Counts a peer's burst and tells how much it was; nothing is kept.
///
/// # Errors
/// If it is longer than bursts are, or takes too long.
pub async fn answer(send: SendStream, mut recv: RecvStream) -> Result<(), NetError> {
    within(timing::BURST, "a burst", async {
        let mut buffer = vec![0; LITTLE];
        let mut counted = 0;
        while let Some(n) = recv.read(&mut buffer).await? {
            counted += n;
            if counted > MUCH {
                return Err(NetError::Protocol("a burst without an end".into()));
            }
        }
        let mut messages = MessageSender::new(send);
        messages.send(&(counted as u64)).await?;
        messages.finish();
        Ok(())
    })
    .await
}
