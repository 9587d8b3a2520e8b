//! Room for what clients send. The bytes of all requests that are received, decoded or not yet
//! tokenised are bounded over the whole process, whichever way they come: memory belongs to it.

use millrace_shared::error::Status;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::timing;

/// What there is room for at once, bytes. A decoded request takes at most some four times its bytes.
const BUDGET: usize = 64 << 20;
static LEFT: Semaphore = Semaphore::const_new(BUDGET);
/// When to try again, told to clients whose request found no room.
const RETRY_MS: u32 = 1000;

/// The room that a request takes up; keep it until its text and ids are used up.
#[derive(Debug)]
pub struct Room {
    _taken: SemaphorePermit<'static>,
}

impl Room {
    /// For a request of so many bytes; waits [`timing::BODY_ROOM`] for it.
    ///
    /// # Errors
    /// `ResourceExhausted` if others take it all that long.
    pub async fn of(bytes: usize) -> Result<Self, Status> {
        let units = u32::try_from(bytes).unwrap_or(u32::MAX);
        match tokio::time::timeout(timing::BODY_ROOM, LEFT.acquire_many(units)).await {
            Ok(Ok(taken)) => Ok(Self { _taken: taken }),
            _ => Err(Status::exhausted("too many large requests at once: try again", RETRY_MS)),
        }
    }
}
