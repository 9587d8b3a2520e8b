//! What goes in and comes out.

use std::time::Duration;

use crate::id::{MicroBatchId, SequenceId};
use crate::options::PrefixCache;
use crate::pooling::Pooling;
use crate::wire::data::{Failure, StepMeta};
use crate::wire::rpc::{PositionScore, TokenLogprobs};

/// Limits; the same for the life of a pipeline's epoch. Zero counts as one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// KV blocks that every stage can hold.
    pub num_blocks: u32,
    /// Positions per block.
    pub block_size: u32,
    /// Sequences with blocks at once.
    pub max_num_seqs: u32,
    /// Sequences that may wait for admission.
    pub max_waiting: u32,
    /// Most micro-batches in flight.
    pub max_in_flight: u32,
    /// Prompt tokens per micro-batch.
    pub prefill_chunk: u32,
    /// Tokens per micro-batch, decodes included.
    pub max_batch_tokens: u32,
    /// Longest sequence, prompt and answer.
    pub max_model_len: u32,
    /// How time is shared.
    pub policy: Policy,
}

/// How the scheduler shares the pipeline's time; the parts can be turned off one by one, to measure
/// what each is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Where given, the number of micro-batches in flight follows measurements, begins with this
    /// one, and `max_in_flight` is its limit; else it is `max_in_flight`.
    pub measured_from: Option<u32>,
    /// While anything decodes, a micro-batch with prompts may take this many times as long as an
    /// even share of the decodes alone: bounds what prompts cost those who read along.
    pub itl_factor: f64,
    /// Prompt tokens for which a micro-batch may take a little longer than that.
    pub min_prefill: u32,
    /// Whether decodes are spread evenly over the micro-batches; else every one that is ready goes.
    pub cohorts: bool,
    /// Whether chunks of prompts are as long as their predicted time allows; else they are of
    /// `prefill_chunk`.
    pub timed_chunks: bool,
    /// Whose computed beginnings sequences take from the KV cache.
    pub prefix_cache: PrefixCache,
    /// Whether decodes carry drafts where the pipeline has time for them.
    pub speculate: bool,
    /// Whether of one client's prompts the shortest goes first every other time; else always the
    /// one that came first.
    pub short_turns: bool,
}

impl Policy {
    /// What serving uses, with a fixed number of micro-batches in flight.
    pub const DEFAULT: Self = Self {
        measured_from: None,
        itl_factor: 1.35,
        min_prefill: 4,
        cohorts: true,
        timed_chunks: true,
        prefix_cache: PrefixCache::On,
        speculate: true,
        short_turns: true,
    };
}

impl Default for Policy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl SchedulerConfig {
    pub(super) fn at_least_one(self) -> Self {
        Self {
            num_blocks: self.num_blocks.max(1),
            block_size: self.block_size.max(1),
            max_num_seqs: self.max_num_seqs.max(1),
            max_waiting: self.max_waiting.max(1),
            max_in_flight: self.max_in_flight.max(1),
            prefill_chunk: self.prefill_chunk.max(1),
            max_batch_tokens: self.max_batch_tokens.max(1),
            max_model_len: self.max_model_len.max(1),
            policy: Policy {
                itl_factor: self.policy.itl_factor.max(1.0),
                min_prefill: self.policy.min_prefill.max(1),
                ..self.policy
            },
        }
    }
}

/// What a sequence is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Continue the prompt.
    Generate,
    /// Continue the prompt by tokens of a grammar: which may come is known only after the one before
    /// them, so nothing is guessed.
    Constrained,
    /// Score every position of the prompt.
    Score {
        /// Largest logits to return per position, at most 64.
        top_k: u8,
    },
    /// Make a vector of the prompt.
    Embed {
        /// Of which hidden states.
        pooling: Pooling,
    },
}

impl Kind {
    /// Whether tokens follow the prompt.
    pub fn generates(self) -> bool {
        matches!(self, Self::Generate | Self::Constrained)
    }
}

/// The class of a request. A client in a higher one gets four times the service of one in the next
/// lower class while both wait; none starves.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
pub enum Priority {
    /// Somebody waits for it.
    High,
    /// As most are.
    #[default]
    Normal,
    /// Whenever there is time.
    Low,
}

impl Priority {
    pub(super) const MAX_WEIGHT: u64 = 16;

    pub(super) fn weight(self) -> u64 {
        match self {
            Self::High => Self::MAX_WEIGHT,
            Self::Normal => 4,
            Self::Low => 1,
        }
    }
}

impl std::str::FromStr for Priority {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "high" => Ok(Self::High),
            "normal" => Ok(Self::Normal),
            "low" => Ok(Self::Low),
            _ => Err(format!("unknown priority '{s}': use high, normal or low")),
        }
    }
}

/// A sequence to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// Its name; never used again for another one.
    pub id: SequenceId,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate, at least 1; ignored where nothing is generated.
    pub max_new_tokens: u32,
    /// What for.
    pub kind: Kind,
    /// When the client asked.
    pub submitted: Duration,
    /// When the answer is of no use any more, on the same clock.
    pub deadline: Option<Duration>,
    /// Who asked: clients share the pipeline fairly.
    pub client: u64,
    /// How urgent.
    pub priority: Priority,
}

/// A micro-batch to send to the first stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number: from 1, increasing, never repeated in the scheduler's lifetime.
    pub id: MicroBatchId,
    /// Rows (one per sequence at most), table updates, ended sequences. Without rows it only
    /// carries `released`, and needs no result.
    pub meta: StepMeta,
    /// Token ids of all positions of all rows, in order.
    pub tokens: Vec<u32>,
    /// Sequences that have their first row here: the last stage must be told about them first.
    pub opens: Vec<SequenceId>,
}

/// What came of a result. After `last` or `Failed` the scheduler has already forgotten the sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The whole prompt has been computed; once per sequence.
    PrefillDone {
        /// Which.
        sequence: SequenceId,
    },
    /// A token of the continuation.
    Token {
        /// Which.
        sequence: SequenceId,
        /// Index in the continuation: 0 first, without gaps.
        index: u32,
        /// The token.
        token: u32,
        /// Where asked for.
        logprobs: Option<TokenLogprobs>,
        /// Whether this was the last one that the limits allow.
        last: bool,
    },
    /// Scores of the next positions, in order and without gaps.
    Scores {
        /// Which.
        sequence: SequenceId,
        /// One per position.
        scores: Vec<PositionScore>,
        /// Whether this was the end of the sequence.
        last: bool,
    },
    /// The embedding, and the end of the sequence.
    Embedding {
        /// Which.
        sequence: SequenceId,
        /// As wide as the model, with a length of 1.
        vector: Vec<f32>,
    },
    /// It waited, and cannot be served before its deadline; it never ran.
    Shed {
        /// Which.
        sequence: SequenceId,
        /// How long the queue is predicted to take: when to try again.
        retry_after: Duration,
    },
    /// The sequence cannot go on.
    Failed {
        /// Which.
        sequence: SequenceId,
        /// Why, and where.
        failure: Failure,
        /// Whether its micro-batch held rows of nobody else: also ones that nobody waits for any
        /// more could be the cause.
        alone: bool,
    },
}

/// Why a sequence is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Try again later.
    #[error("{limit} requests are waiting already, which is the limit; try again later")]
    QueueFull {
        /// Most that may wait.
        limit: u32,
    },
    /// Try again later, or with more time.
    #[error(
        "the queue needs about {} ms until the answer could begin, which is after the request's \
         deadline; try again later or allow more time",
        .wait.as_millis()
    )]
    DeadlineTooShort {
        /// Predicted.
        wait: Duration,
    },
    /// Nothing to start from.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// Longer than the model serves.
    #[error("the prompt has {len} tokens, at most {max} are possible; shorten it")]
    PromptTooLong {
        /// Tokens of the prompt.
        len: u32,
        /// Most possible.
        max: u32,
    },
    /// `max_new_tokens` is zero.
    #[error("no tokens are to be generated: ask for at least one")]
    NothingToGenerate,
    /// Over the wire format's limit.
    #[error("{top_k} logits per position were asked for, at most 64 are possible")]
    TooManyTopLogits {
        /// Asked for.
        top_k: u8,
    },
    /// Prompt and answer together do not fit the KV cache, even alone.
    #[error(
        "prompt and answer need {needed} KV blocks, the cache has {exist}; ask for fewer tokens or raise --kv-cache-tokens"
    )]
    NeedsMoreBlocksThanExist {
        /// Blocks needed at the end.
        needed: u32,
        /// Blocks in all.
        exist: u32,
    },
    /// The id is in use.
    #[error("sequence {id} exists already")]
    Duplicate {
        /// Which.
        id: SequenceId,
    },
}

/// Gauges and counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences with blocks.
    pub running: u32,
    /// Sequences without.
    pub waiting: u32,
    /// Micro-batches not answered yet.
    pub in_flight: u32,
    /// KV blocks in use.
    pub blocks_used: u32,
    /// KV blocks in all.
    pub blocks: u32,
    /// Sequences whose blocks were taken, so far.
    pub preemptions: u64,
    /// Rows dropped because their sequence had ended or been preempted, so far.
    pub stale_dropped: u64,
    /// Prompt tokens computed, so far; recomputation is not counted.
    pub prompt_tokens: u64,
    /// Tokens generated, so far.
    pub generated_tokens: u64,
    /// From issue to result of the micro-batch answered last.
    pub round_trip: Duration,
    /// Positions of sequences that began, so far: what the prefix cache was asked for.
    pub prefix_query_tokens: u64,
    /// Those of them that the prefix cache had.
    pub prefix_hit_tokens: u64,
    /// Tokens that were guessed, so far.
    pub draft_tokens: u64,
    /// Those of them that were right.
    pub draft_tokens_accepted: u64,
    /// Sequences rejected because their deadline could not be met, so far.
    pub shed: u64,
    /// Micro-batches that may be in flight now.
    pub window: u32,
    /// Of a round trip, what no stage spends; zero until measured.
    pub link: Duration,
}
