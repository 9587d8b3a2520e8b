//! What operators ask of a running cluster: its nodes, who may be used, new cuts, edges, API keys,
//! join tokens, requests.
//! Part of the client API; a call needs the key of an administrator.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{NodeId, RequestId};
use crate::membership::CordonReason;

/// A question or an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminRequest {
    /// The nodes: answer `Nodes`.
    Nodes,
    /// Use a node no more, and move its layers away: answer `Recut`, or `Nodes` where it had none.
    Cordon {
        /// Its name, or its id.
        node: String,
    },
    /// A cordoned node may be used again: answer `Nodes`.
    Uncordon {
        /// Its name, or its id.
        node: String,
    },
    /// What a new cut would bring: answer `Recut`.
    Recut {
        /// Also do it.
        apply: bool,
    },
    /// Try the ways between all members: answer `Edges`.
    Doctor,
    /// The members as plans see them: answer `Description`.
    Describe,
    /// Never let a node in again, and close its connection: answer `Nodes`.
    RevokeNode {
        /// Its name where it is there, or its id.
        node: String,
    },
    /// API keys: answer `Keys`, or `NewKey` where one was made.
    Keys(KeyRequest),
    /// Hand a node's layers over and end its process: answer `Nodes`.
    Drain {
        /// Its name or id.
        node: String,
    },
    /// What requests wait for: answer `Requests`.
    Requests(RequestQuery),
    /// What helps to find out what went wrong, without prompts, tokens and secrets: answer
    /// `Collected`.
    Collect {
        /// What this node knows, by its name or id; of the coordinator itself where none is named.
        node: Option<String>,
    },
    /// Join tokens: answer `Tokens`, or `NewToken` where one was made.
    Tokens(TokenRequest),
}

/// What is asked about join tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenRequest {
    /// All that have not expired.
    List,
    /// Make one.
    Create {
        /// Nodes that may join with it, 1 to 1000.
        uses: u32,
        /// How long it is valid.
        seconds: u64,
    },
    /// Nobody joins with it any more; nodes that did stay.
    Revoke {
        /// As `List` shows it.
        id: String,
    },
}

/// What is known of a join token; never its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// Name of the token for `revoke`.
    pub id: String,
    /// Nodes that may still join with it.
    pub left: u32,
    /// Nodes that have.
    pub nodes: Vec<NodeId>,
    /// Unix seconds from which on it is not valid.
    pub expires: u64,
}

/// Most bytes of what one member hands over.
pub const MAX_COLLECTED_BYTES: usize = 8 << 20;

/// A file of what a member knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectedFile {
    /// Its name, without folders.
    pub name: String,
    /// What is in it: text.
    pub bytes: Vec<u8>,
}

/// What is asked about requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestQuery {
    /// Those that run or wait, oldest first.
    List {
        /// Only those that have not moved for long.
        stuck: bool,
    },
    /// One, also one that has ended and is kept.
    Show {
        /// Which: as `x-request-id` says, or as `x-millrace-request-id` does.
        id: String,
    },
    /// End one, and show it.
    Cancel {
        /// Which, as above.
        id: String,
    },
}

/// Where a request is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestReport {
    /// Its name, as `x-request-id` says.
    pub id: String,
    /// What it is attached to by; of one that was turned away there is none.
    pub request: Option<RequestId>,
    /// What it waits for, in words.
    pub state: String,
    /// The node that it waits for, where one is known.
    pub node: Option<String>,
    /// Seconds in this state.
    pub for_seconds: f64,
    /// Seconds since it was submitted.
    pub age_seconds: f64,
    /// Seconds in each state so far, to within a tenth of one, in the order of a request's life.
    pub spent: Vec<(String, f64)>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub generated_tokens: u32,
    /// Events that the client has not taken yet.
    pub unread: u32,
    /// Times that it was computed anew.
    pub restarts: u32,
    /// Whether it has not moved for long.
    pub stuck: bool,
}

/// What is asked about API keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyRequest {
    /// All of them.
    List,
    /// Make one.
    Create(NewKey),
    /// Make one invalid, from the next call on.
    Revoke {
        /// As `List` shows it.
        id: String,
    },
}

/// What the holder of an API key may do; each includes those before it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Read what is served and how it fares: models, state, metrics; text to ids and back.
    Read,
    /// Run the model.
    #[default]
    Generate,
    /// Change the cluster, and make keys.
    Admin,
}

impl Scope {
    /// Its name on command lines and in files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Generate => "generate",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Self::Read, Self::Generate, Self::Admin]
            .into_iter()
            .find(|scope| scope.as_str() == s)
            .ok_or_else(|| format!("'{s}' is no scope: it must be read, generate or admin"))
    }
}

/// What a key may use up; `None` is as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyLimits {
    /// Continuations, scorings, vectors, texts to tokens and back, a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers a minute.
    pub tokens_per_minute: Option<u32>,
    /// Of these, at once.
    pub concurrent: Option<u32>,
}

/// A key to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKey {
    /// What people call it.
    pub name: String,
    /// What its holder may do.
    pub scope: Scope,
    /// What its holder may use up.
    pub limits: KeyLimits,
    /// Unix seconds from which on it is not valid.
    pub expires: Option<u64>,
}

impl NewKey {
    /// A key without limits or end.
    pub fn new(name: impl Into<String>, scope: Scope) -> Self {
        Self { name: name.into(), scope, ..Self::default() }
    }
}

/// What is known of a key; never its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Name of the key for `revoke`, logs and metrics.
    pub id: String,
    /// What was asked for when it was made.
    pub key: NewKey,
    /// Unix seconds at which it was made.
    pub created: u64,
    /// Unix seconds at which it was used last, to within a minute.
    pub last_used: Option<u64>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AdminReply {
    /// All nodes that are there.
    Nodes(Vec<NodeStatus>),
    /// A new cut.
    Recut(Box<RecutReport>),
    /// The ways between members.
    Edges(Vec<EdgeStatus>),
    /// A `cluster_file` in TOML; empty before any member was measured.
    Description(String),
    /// Requests.
    Requests(Vec<RequestReport>),
    /// What a member knows, at most [`MAX_COLLECTED_BYTES`].
    Collected(Vec<CollectedFile>),
    /// All API keys, oldest first.
    Keys(Vec<KeyInfo>),
    /// A key was made; its secret is shown this once.
    NewKey {
        /// What is known of it.
        info: KeyInfo,
        /// What its holder sends.
        secret: String,
    },
    /// All join tokens that have not expired, the one that expires first before others.
    Tokens(Vec<TokenInfo>),
    /// A join token was made; it is shown this once.
    NewToken {
        /// What is known of it.
        info: TokenInfo,
        /// What a node joins with.
        token: String,
    },
}

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeRole {
    /// It computes a stage.
    Stage {
        /// First layer.
        first_layer: u32,
        /// One past the last layer.
        end_layer: u32,
        /// Whether it holds the head.
        head: bool,
    },
    /// It is there, and not needed.
    StandBy,
    /// It is out of use: [`NodeStatus::cordons`] says why.
    Cordoned,
    /// It is silent.
    Suspect,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// From its certificate.
    pub id: NodeId,
    /// Name for people.
    pub name: String,
    /// Its machine: several nodes may be on one.
    pub host: String,
    /// Where neighbours reach it.
    pub address: String,
    /// Processor and instruction set.
    pub hardware: String,
    /// Compute threads.
    pub threads: u32,
    /// Bytes it may use.
    pub memory_bytes: u64,
    /// What it does.
    pub role: NodeRole,
    /// Why it gets no layers: one that has some keeps them until the next cut.
    pub cordons: Vec<CordonReason>,
}

/// A stage of a cut, and how long it takes for a micro-batch of the planning size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CutStage {
    /// The node's name.
    pub node: String,
    /// First layer.
    pub first_layer: u32,
    /// One past the last layer.
    pub end_layer: u32,
    /// Whether it holds the head.
    pub head: bool,
    /// Predicted seconds.
    pub seconds: f64,
}

/// What a new cut brings and costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecutReport {
    /// Why now.
    pub reason: String,
    /// The cut that serves.
    pub current: Vec<CutStage>,
    /// The best one.
    pub proposed: Vec<CutStage>,
    /// Throughput of the new one over that of the present one, predicted: 1.25 is a quarter more.
    pub gain: f64,
    /// Bytes of weights that nodes must have and had no part of so far.
    pub bytes_to_move: u64,
    /// Seconds without a token, about: requests are computed anew from their tokens.
    pub pause_seconds: f64,
    /// Whether memory suffices to make it ready beside the present one; else loading is part of
    /// the pause, which `pause_seconds` does not count.
    pub beside: bool,
    /// Whether it is being done.
    pub applied: bool,
}

/// A way from one member to another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EdgeStatus {
    /// The node's name.
    pub from: String,
    /// The node's name.
    pub to: String,
    /// Where it was tried.
    pub address: String,
    /// Whether the pipeline uses it.
    pub used: bool,
    /// Round trip in seconds where a handshake came about, else what to do.
    pub outcome: Result<f64, String>,
    /// Bytes a second, where they were measured.
    pub bytes_per_second: Option<f64>,
}
