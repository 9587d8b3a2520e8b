//! Sound inputs.

use millrace_shared::id::{Epoch, PipelineId, RequestId, SequenceId};
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::GgufWriter;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::AdminRequest;
use millrace_shared::wire::codec::encode;
use millrace_shared::wire::control::{CoordinatorMessage, Heartbeat, NodeMessage, VoidRows};
use millrace_shared::wire::data::{
    OpenMeta, ResultMeta, Row, RowOutcome, SequenceOpen, StageTime, StepMeta, TableUpdate, Want,
};
use millrace_shared::wire::frame::FrameMeta;
use millrace_shared::wire::rpc::{
    ChatMessage, GenerateEvent, GenerateRequest, Method, Prompt, Reply,
};
use millrace_shared::wire::{Edge, Plane};

pub(super) fn gguf() -> Vec<Vec<u8>> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("llama.block_count", 2u32)
        .set("llama.embedding_length", 32u32)
        .set("llama.attention.head_count", 2u64)
        .set("llama.feed_forward_length", 64u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("some.flags", vec![true, false])
        .set("some.numbers", vec![1i64, -1])
        .set("tokenizer.ggml.tokens", (0..32).map(|i| format!("t{i}")).collect::<Vec<_>>());
    w.tensor("token_embd.weight", TensorType::Q4_0, &[32, 32], vec![1u8; 576]).expect("a tensor");
    w.tensor("output_norm.weight", TensorType::F32, &[32], vec![2u8; 128]).expect("a tensor");
    vec![w.to_bytes()]
}

/// A safetensors file with a few small tensors.
pub(super) fn safetensors() -> Vec<Vec<u8>> {
    let header = br#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend_from_slice(&[0; 24]);
    vec![bytes]
}

pub(super) fn chat() -> Vec<ChatMessage> {
    [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Yes."), ("user", "Why?")]
        .map(|(role, content)| ChatMessage { role: role.to_owned(), content: content.to_owned() })
        .into()
}

pub(super) fn node_messages() -> Vec<Vec<u8>> {
    let (pipeline, epoch) = (PipelineId(1), Epoch(3));
    let message = String::from("out of memory");
    [
        NodeMessage::Heartbeat(Heartbeat::default()),
        NodeMessage::Started { pipeline, epoch },
        NodeMessage::LoadFailed { pipeline, epoch, message: message.clone() },
        NodeMessage::EdgeLost { pipeline, epoch, message },
        NodeMessage::Leaving,
    ]
    .map(|m| encode(&m))
    .into()
}

pub(super) fn coordinator_messages() -> Vec<Vec<u8>> {
    let (pipeline, epoch) = (PipelineId(1), Epoch(3));
    let rows = vec![VoidRows { sequence: SequenceId(7), epoch: 2 }; 3];
    [
        CoordinatorMessage::Refused { message: "no".into() },
        CoordinatorMessage::Start { pipeline, epoch },
        CoordinatorMessage::Void { pipeline, epoch, rows },
        CoordinatorMessage::Ping(9),
    ]
    .map(|m| encode(&m))
    .into()
}

pub(super) fn methods() -> Vec<Vec<u8>> {
    let request = |prompt| GenerateRequest {
        model: "m".into(),
        prompt,
        params: SamplingParams { stop: vec!["end".into()], ..SamplingParams::greedy() },
    };
    [
        Method::Generate(request(Prompt::Chat(chat()))),
        Method::Generate(request(Prompt::Tokens(vec![1, 2, 300]))),
        Method::Admin(AdminRequest::Cordon { node: "a".into() }),
        Method::Status,
    ]
    .map(|m| encode(&m))
    .into()
}

pub(super) fn replies() -> Vec<Vec<u8>> {
    let token = GenerateEvent::Token { index: 3, token_id: 9, text: "the".into(), logprobs: None };
    let started = GenerateEvent::Started {
        request_id: RequestId(uuid::Uuid::nil()),
        prompt_token_ids: vec![1, 2],
        seed: 7,
    };
    [Reply::Event(token), Reply::Event(started)].map(|m| encode(&m)).into()
}

pub(super) fn planes() -> Vec<Vec<u8>> {
    let stage = Plane::Stage { pipeline: PipelineId(1), epoch: Epoch(2), edge: Edge::Results };
    [Plane::Control, stage, Plane::Blob].map(|m| encode(&m)).into()
}

fn row(want: Want, count: u32) -> Row {
    Row { sequence: SequenceId(5), sequence_epoch: 1, position: 40, count, want }
}

pub(super) fn step_metas() -> Vec<Vec<u8>> {
    let meta = StepMeta {
        rows: vec![row(Want::Sample, 1), row(Want::None, 9), row(Want::Verify, 3)],
        tables: vec![TableUpdate { sequence: SequenceId(5), first: 1, blocks: vec![4, 9] }],
        released: vec![SequenceId(2)],
        drafts: vec![7, 8],
        times: vec![StageTime::default()],
        ..StepMeta::default()
    };
    let failed = StepMeta { failed: Some("stage 1: NaN".into()), ..meta.clone() };
    [meta, failed].map(|m| m.to_bytes().expect("bytes").to_vec()).into()
}

pub(super) fn result_metas() -> Vec<Vec<u8>> {
    let rows = vec![
        row(Want::Sample, 1).result(RowOutcome::Token { token: 7, logprobs: None }),
        row(Want::None, 4).result(RowOutcome::Failed("no".into())),
    ];
    let meta = ResultMeta { rows, times: vec![StageTime::default(); 2] };
    vec![meta.to_bytes().expect("bytes").to_vec()]
}

pub(super) fn open_metas() -> Vec<Vec<u8>> {
    let open = SequenceOpen {
        sequence: SequenceId(5),
        tokens: vec![1, 2, 3],
        prompt_len: 3,
        params: SamplingParams { stop: vec!["x".into()], ..SamplingParams::greedy() },
        seed: 3,
    };
    let meta = OpenMeta { opens: vec![open] };
    vec![meta.to_bytes().expect("bytes").to_vec()]
}

pub(super) fn frames() -> Vec<Vec<u8>> {
    vec![crate::frames::activations(1, 4).as_bytes().to_vec()]
}

pub(super) fn templates() -> Vec<Vec<u8>> {
    [
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}{{ s }}{% endif %}{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content | upper | replace('A', 'b') }}{% endfor %}{{ bos_token }}",
        "{% macro say(m) %}{{ m.role ~ ': ' ~ m.content }}{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ say(m) }}{% endfor %}{{ range(ns.n) | list }}{{ messages | tojson }}",
    ]
    .map(|t| t.as_bytes().to_vec())
    .into()
}

pub(super) fn bodies() -> Vec<Vec<u8>> {
    [
        r#"{"model":"mocked","prompt":"abc","max_tokens":3,"temperature":0.5,"stop":["x","yy"],"seed":7}"#,
        r#"{"model":"mocked","messages":[{"role":"user","content":"hi"}],"max_tokens":2,"stream":true,"stream_options":{"include_usage":true}}"#,
        r#"{"model":"mocked","prompt":[33,34,35],"max_tokens":2,"logprobs":3,"logit_bias":{"5":-1.5},"top_p":0.9,"top_k":5}"#,
        r#"{"model":"mocked","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"max_completion_tokens":1,"presence_penalty":0.5}"#,
    ]
    .map(|t| t.as_bytes().to_vec())
    .into()
}
