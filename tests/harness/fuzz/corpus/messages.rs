//! Sound messages of the control, client and join planes.

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{Epoch, NodeId, PipelineId, RequestId, SequenceId};
use millrace_shared::membership::CordonReason;
use millrace_shared::options::{TorchDtype, TorchKept};
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{
    AdminReply, AdminRequest, CollectedFile, KeyInfo, KeyLimits, KeyRequest, NewKey, NodeRole,
    NodeStatus, RequestQuery, Scope,
};
use millrace_shared::wire::codec::encode;
use millrace_shared::wire::control::{
    BlobRequest, CoordinatorMessage, Heartbeat, Hello, LoadReport, NodeMessage, Peer, StageProfile,
    VoidRows, WayMeasured,
};
use millrace_shared::wire::join::{JoinProof, JoinRequest, JoinResponse};
use millrace_shared::wire::rpc::{
    AttachRequest, CallHeader, CallPiece, Choices, ClusterStatus, EmbedRequest, Embedded,
    FinishReason, GenerateEvent, GenerateRequest, Method, ModelCard, PositionScore, Prompt, Reply,
    ScoreRequest, Timings, TokenLogprobs, TokenizeRequest, Usage,
};
use millrace_shared::wire::{Edge, Plane};
use serde::Serialize;

const PIPELINE: PipelineId = PipelineId(1);
const EPOCH: Epoch = Epoch(3);

fn encoded<M: Serialize>(messages: impl IntoIterator<Item = M>) -> Vec<Vec<u8>> {
    messages.into_iter().map(|m| encode(&m)).collect()
}

fn node_id() -> NodeId {
    NodeId(uuid::Uuid::nil())
}

fn hello() -> Hello {
    Hello {
        wire_version: 5,
        numerics_revision: "3".into(),
        version: "0.1.0".into(),
        name: "a".into(),
        advertise: "127.0.0.1:7000".into(),
        host: "h".into(),
        engine: "cpu".into(),
        threads: 2,
        memory_bytes: 1 << 30,
        hardware: "x86".into(),
        torch: Some(TorchKept { dtype: TorchDtype::Int4, gpu: true }),
        drains: true,
    }
}

pub(in crate::fuzz) fn of_nodes() -> Vec<Vec<u8>> {
    let (pipeline, epoch) = (PIPELINE, EPOCH);
    let message = String::from("out of memory");
    let way = WayMeasured { round_trip: 0.001, bytes_per_second: Some(1e9) };
    encoded([
        NodeMessage::Hello(Box::new(hello())),
        NodeMessage::Heartbeat(Heartbeat::default()),
        NodeMessage::Profiled { profile: StageProfile::default() },
        NodeMessage::Ready { pipeline, epoch, report: LoadReport::default() },
        NodeMessage::Started { pipeline, epoch },
        NodeMessage::LoadFailed { pipeline, epoch, message: message.clone() },
        NodeMessage::EdgeLost { pipeline, epoch, message: message.clone() },
        NodeMessage::EdgeTried { to: node_id(), outcome: Ok(way) },
        NodeMessage::EdgeTried { to: node_id(), outcome: Err(message) },
        NodeMessage::Leaving,
        NodeMessage::Draining,
        NodeMessage::Collected {
            ticket: 7,
            files: vec![CollectedFile { name: "ring.csv".into(), bytes: b"1,2\n".to_vec() }],
        },
    ])
}

pub(in crate::fuzz) fn of_coordinators() -> Vec<Vec<u8>> {
    let (pipeline, epoch) = (PIPELINE, EPOCH);
    let rows = vec![VoidRows { sequence: SequenceId(7), epoch: 2 }; 3];
    let peer = Peer { node_id: node_id(), address: "127.0.0.1:7001".into() };
    encoded([
        CoordinatorMessage::Welcome { node_id: node_id(), heartbeat_ms: 250, lease_ms: 1500 },
        CoordinatorMessage::Refused { message: "no".into() },
        CoordinatorMessage::TryEdge { peer, burst: true },
        CoordinatorMessage::Start { pipeline, epoch },
        CoordinatorMessage::Abandon { pipeline, epoch },
        CoordinatorMessage::Release { pipeline, epoch },
        CoordinatorMessage::Paced { profile: StageProfile::default() },
        CoordinatorMessage::Void { pipeline, epoch, rows },
        CoordinatorMessage::Ping(9),
        CoordinatorMessage::Shutdown,
        CoordinatorMessage::Drain,
        CoordinatorMessage::Collect { ticket: 7 },
        CoordinatorMessage::Drained { trouble: Some("alone".into()) },
    ])
}

pub(in crate::fuzz) fn methods() -> Vec<Vec<u8>> {
    let request = |prompt| GenerateRequest {
        model: "m".into(),
        prompt,
        params: SamplingParams { stop: vec!["end".into()], ..SamplingParams::greedy() },
        choices: Choices { n: 2, best_of: 3 },
    };
    let request_id = RequestId(uuid::Uuid::nil());
    let mut found = encoded([
        Method::Generate(request(Prompt::Chat(super::conversation()))),
        Method::Generate(request(Prompt::Tokens(vec![1, 2, 300]))),
        Method::Generate(request(Prompt::Text("once".into()))),
        Method::Score(ScoreRequest { model: "m".into(), tokens: vec![1; 40], top_k: 5 }),
        Method::Tokenize(TokenizeRequest { model: "m".into(), prompt: Prompt::Text("a".into()) }),
        Method::Detokenize { ids: vec![1, 70_000] },
        Method::Models,
        Method::Cancel { request_id },
        Method::Status,
        Method::Attach(AttachRequest { request_id, next: vec![4, 0] }),
        Method::Embed(EmbedRequest {
            model: "m".into(),
            inputs: vec![Prompt::Text("a".into()), Prompt::Tokens(vec![1, 300])],
            pooling: Pooling::Last,
            dimensions: Some(5),
        }),
    ]);
    found.extend(encoded(admin_requests().into_iter().map(Method::Admin)));
    found
}

fn admin_requests() -> Vec<AdminRequest> {
    let limits = KeyLimits { requests_per_minute: Some(5), ..KeyLimits::default() };
    let key = NewKey { limits, expires: Some(9), ..NewKey::new("k", Scope::Read) };
    let node = || String::from("a");
    vec![
        AdminRequest::Nodes,
        AdminRequest::Cordon { node: node() },
        AdminRequest::Recut { apply: true },
        AdminRequest::RevokeNode { node: node() },
        AdminRequest::Keys(KeyRequest::List),
        AdminRequest::Keys(KeyRequest::Create(key)),
        AdminRequest::Keys(KeyRequest::Revoke { id: "k".into() }),
        AdminRequest::Drain { node: node() },
        AdminRequest::Requests(RequestQuery::List { stuck: true }),
        AdminRequest::Requests(RequestQuery::Show { id: "r".into() }),
        AdminRequest::Collect { node: Some(node()) },
    ]
}

pub(in crate::fuzz) fn admin() -> Vec<Vec<u8>> {
    encoded(admin_requests())
}

pub(in crate::fuzz) fn admin_replies() -> Vec<Vec<u8>> {
    let node = NodeStatus {
        id: node_id(),
        name: "a".into(),
        host: "h".into(),
        address: "127.0.0.1:1".into(),
        hardware: "x".into(),
        threads: 2,
        memory_bytes: 5,
        role: NodeRole::Stage { first_layer: 0, end_layer: 9, head: true },
        cordons: CordonReason::ALL.to_vec(),
    };
    let key = NewKey::new("k", Scope::Admin);
    let info = KeyInfo { id: "k".into(), key, created: 5, last_used: Some(6) };
    encoded([
        AdminReply::Nodes(vec![NodeStatus { role: NodeRole::Suspect, ..node.clone() }, node]),
        AdminReply::Description("[cluster]".into()),
        AdminReply::Keys(vec![info.clone()]),
        AdminReply::NewKey { info, secret: "s".into() },
    ])
}

pub(in crate::fuzz) fn replies() -> Vec<Vec<u8>> {
    let logprobs = Some(TokenLogprobs { logprob: -0.5, top: vec![(1, -0.5)] });
    let call = CallPiece { call: 1, id: "c".into(), name: "f".into(), arguments: "{".into() };
    let token = |logprobs| GenerateEvent::Token {
        choice: 1,
        index: 3,
        token_id: 9,
        text: "the".into(),
        logprobs,
        calls: vec![call.clone()],
    };
    let started = GenerateEvent::Started {
        request_id: RequestId(uuid::Uuid::nil()),
        prompt_token_ids: vec![1, 2],
        seed: 7,
        choices: 2,
        left_out: 3,
    };
    let finished = GenerateEvent::Finished {
        choice: 1,
        reason: FinishReason::Length,
        text: "x".into(),
        calls: Vec::new(),
        usage: Usage::default(),
        timings: Timings::default(),
    };
    let card = ModelCard {
        id: "m".into(),
        created: 1,
        max_model_len: 9,
        vocab: 5,
        weight_bytes: 7,
        hidden: 4,
    };
    let embedded = Embedded { prompt_tokens: 3, vector: vec![0.6, -0.8] };
    let score = PositionScore { top_logits: vec![(1, 2.0)], ..PositionScore::default() };
    encoded([
        Reply::Event(token(None)),
        Reply::Event(token(logprobs)),
        Reply::Event(started),
        Reply::Event(finished),
        Reply::Scores(vec![score; 3]),
        Reply::Embeddings(vec![embedded; 2]),
        Reply::Tokens(vec![1, 2]),
        Reply::Text("a".into()),
        Reply::Models(vec![card]),
        Reply::Status(Box::default()),
        Reply::Status(Box::new(ClusterStatus { detail: "waits".into(), ..Default::default() })),
        Reply::Done,
        Reply::Failed(Status::new(ErrorCode::NotFound, "no")),
    ])
}

pub(in crate::fuzz) fn headers() -> Vec<Vec<u8>> {
    let pair = ("authorization".to_owned(), "Bearer k".to_owned());
    encoded([
        CallHeader { metadata: vec![], deadline_ms: None },
        CallHeader { metadata: vec![pair; 3], deadline_ms: Some(9) },
    ])
}

pub(in crate::fuzz) fn planes() -> Vec<Vec<u8>> {
    let stage = |edge| Plane::Stage { pipeline: PIPELINE, epoch: EPOCH, edge };
    let edges = [Edge::Steps, Edge::Activations, Edge::Results, Edge::Sequences].map(stage);
    let mut found = encoded([Plane::Control, Plane::Blob, Plane::Burst]);
    found.extend(encoded(edges));
    found
}

pub(in crate::fuzz) fn blobs() -> Vec<Vec<u8>> {
    encoded([BlobRequest { hash: [7; 32], offset: 0, len: 4096 }])
}

pub(in crate::fuzz) fn joins() -> Vec<Vec<u8>> {
    encoded(
        [
            JoinProof::Token("secret".into()),
            JoinProof::Renewal(vec![0x30, 1]),
            JoinProof::Seat(vec![0x30, 1], 3),
        ]
        .map(|proof| JoinRequest {
            wire_version: 5,
            proof,
            csr_der: vec![0x30, 0x82, 1, 2],
        }),
    )
}

pub(in crate::fuzz) fn join_answers() -> Vec<Vec<u8>> {
    encoded([
        JoinResponse::Accepted {
            node_id: node_id(),
            certificate_der: vec![0x30; 9],
            ca_der: vec![0x30; 9],
            cluster_port: 1,
        },
        JoinResponse::Refused(Status::new(ErrorCode::PermissionDenied, "no")),
    ])
}
