//! Texts that become vectors: which of them the pipeline computes, which are there.
//!
//! Each text is a sequence of its own. A call has only some of them with the scheduler at a time, so
//! that a long list leaves room in the queue for others. Nothing of it is in the journal: it is a
//! unary call, and is sent again where the coordinator dies.

use millrace_shared::error::Status;
use millrace_shared::pooling::{Pooling, shortened};
use tokio::sync::oneshot;

use crate::service::Caller;

/// The vectors of all texts of a call, in order; or why there are none.
pub type Vectors = Result<Vec<Vec<f32>>, Status>;

/// Texts of one call with the scheduler at once: as many as fill the micro-batches of a long pipeline.
const AT_ONCE: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub struct Embedding {
    /// Which hidden states.
    pub pooling: Pooling,
    /// Who asks.
    pub caller: Caller,
    /// Ids of each text.
    texts: Vec<Vec<u32>>,
    /// Those that the scheduler has heard of.
    begun: usize,
    dimensions: Option<u32>,
    /// By text; empty until it is there.
    vectors: Vec<Vec<f32>>,
    missing: usize,
    reply: Option<oneshot::Sender<Vectors>>,
}

impl Embedding {
    /// Collects the vectors of `texts` for `reply`, each with so many numbers.
    pub fn new(
        texts: Vec<Vec<u32>>,
        (pooling, dimensions): (Pooling, Option<u32>),
        caller: Caller,
        reply: oneshot::Sender<Vectors>,
    ) -> Self {
        let missing = texts.len();
        Self {
            pooling,
            caller,
            begun: 0,
            dimensions,
            vectors: vec![Vec::new(); missing],
            missing,
            texts,
            reply: Some(reply),
        }
    }

    /// The ids of a text.
    pub fn text(&self, index: u32) -> &[u32] {
        self.texts.get(index as usize).map_or(&[], Vec::as_slice)
    }

    /// The text to begin with next, where fewer than may be are under way.
    pub fn next(&self, under_way: usize) -> Option<u32> {
        let more = self.begun < self.texts.len() && under_way < AT_ONCE;
        more.then_some(self.begun as u32)
    }

    /// The scheduler has heard of one more.
    pub fn begin(&mut self) {
        self.begun += 1;
    }

    /// Takes the vector of a text. Whether it was the last.
    ///
    /// # Errors
    /// Where nothing is left of the vector at the length that was asked for.
    pub fn take(&mut self, index: u32, vector: Vec<f32>) -> Result<bool, Status> {
        let dimensions = self.dimensions.map_or(vector.len(), |d| d as usize);
        let short = shortened(&vector, dimensions).ok_or_else(|| {
            let message = format!("the first {dimensions} numbers of an embedding are zero");
            Status::invalid("dimensions", message)
        })?;
        if let Some(slot) = self.vectors.get_mut(index as usize).filter(|v| v.is_empty()) {
            *slot = short;
            self.missing -= 1;
        }
        Ok(self.missing == 0)
    }

    /// Hands everything to whoever asked.
    pub fn complete(&mut self) {
        let vectors = std::mem::take(&mut self.vectors);
        self.answer(Ok(vectors));
    }

    /// Ends it with an error.
    pub fn fail(&mut self, status: Status) {
        self.answer(Err(status));
    }

    fn answer(&mut self, vectors: Vectors) {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(vectors);
        }
    }

    /// Whether nobody waits for it any more.
    pub fn is_abandoned(&self) -> bool {
        self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}
