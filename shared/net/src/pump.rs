//! The tasks at the two ends of an edge: between a bounded channel and the stream.
//!
//! Both run until the edge is lost or its owner lets go of the channel, and return why. They
//! neither look into frames nor decide what a loss means. While frames pass, they keep the machine's
//! processors [`awake`](crate::awake).

use millrace_shared::wire::frame::Frame;
use tokio::sync::mpsc;

use crate::awake::Awake;
use crate::{EdgeReceiver, EdgeSender, NetError};

/// Sends what comes out of `frames`, each as soon as there is a credit. `Ok` when the owner dropped
/// the channel.
///
/// # Errors
/// If the edge is lost.
pub async fn pump_out(
    mut edge: EdgeSender,
    mut frames: mpsc::Receiver<Frame>,
) -> Result<(), NetError> {
    let mut awake = Awake::default();
    loop {
        tokio::select! {
            lost = edge.lost() => return Err(lost),
            () = awake.rest() => {}
            frame = frames.recv() => match frame {
                Some(frame) => {
                    edge.send(frame).await?;
                    awake.touch();
                }
                None => {
                    edge.finish();
                    return Ok(());
                }
            },
        }
    }
}

/// A frame with the duty to give its credit back: dropping it returns the credit.
#[derive(Debug)]
pub struct Ticket(mpsc::Sender<()>);

impl Drop for Ticket {
    fn drop(&mut self) {
        // The channel has room for every credit of the edge; closed means the edge is gone.
        let _ = self.0.try_send(());
    }
}

/// Hands every frame of the edge, with its ticket, to `deliver`. `Ok` when the sender ended the
/// edge in order, or `deliver` declined (its owner is gone).
///
/// # Errors
/// If the edge is lost or the peer broke its rules.
pub async fn pump_in<F>(
    mut edge: EdgeReceiver,
    credits: u32,
    mut deliver: impl FnMut(Frame, Ticket) -> F,
) -> Result<(), NetError>
where
    F: Future<Output = bool>,
{
    let (returned, mut returns) = mpsc::channel(credits.max(1) as usize);
    let mut awake = Awake::default();
    loop {
        tokio::select! {
            () = awake.rest() => {}
            frame = edge.recv() => match frame? {
                Some(frame) => {
                    if !deliver(frame, Ticket(returned.clone())).await {
                        return Ok(());
                    }
                    awake.touch();
                }
                None => return Ok(()),
            },
            Some(()) = returns.recv() => {
                let mut n = 1;
                while returns.try_recv().is_ok() {
                    n += 1;
                }
                edge.release(n).await?;
            }
        }
    }
}
