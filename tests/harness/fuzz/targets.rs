//! What is fed.

use millrace_coordinator::text::ChatTemplate;
use millrace_shared::model::gguf::Gguf;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::control::{CoordinatorMessage, NodeMessage};
use millrace_shared::wire::data::{OpenMeta, ResultMeta, StepMeta};
use millrace_shared::wire::frame::{Frame, FrameBuffer, FrameMeta};
use millrace_shared::wire::join::{JoinRequest, JoinResponse};
use millrace_shared::wire::rpc::{CallHeader, Method, Reply};
use millrace_shared::wire::{Plane, codec};
use serde::de::DeserializeOwned;

use super::{Target, corpus, scheduler};
use crate::http;
use crate::mocked::{Mocked, Shape};

fn target(
    name: &'static str,
    corpus: Vec<Vec<u8>>,
    read: impl Fn(&[u8]) -> bool + 'static,
) -> Target {
    Target { name, corpus, read: Box::new(read) }
}

/// A message of the control and client planes; what decodes must encode again.
fn message<T: DeserializeOwned + serde::Serialize>(bytes: &[u8]) -> bool {
    let decoded = codec::decode::<T>(bytes);
    if let Ok(message) = &decoded {
        assert!(codec::decode::<T>(&codec::encode(message)).is_ok(), "it does not come back");
    }
    decoded.is_ok()
}

fn aligned(bytes: &[u8]) -> FrameBuffer {
    let mut buffer = FrameBuffer::new();
    buffer.extend_from_slice(bytes);
    buffer
}

fn meta<M: FrameMeta>(bytes: &[u8]) -> bool {
    M::from_bytes(&aligned(bytes)).is_ok()
}

fn step_meta(bytes: &[u8]) -> bool {
    let Ok(meta) = StepMeta::from_bytes(&aligned(bytes)) else { return false };
    let sound = meta.validate(4096).is_ok();
    (0..meta.rows.len()).for_each(|i| assert!(meta.drafts_of(i).len() <= meta.drafts.len()));
    sound
}

fn gguf(bytes: &[u8]) -> bool {
    let Ok(file) = Gguf::read(bytes, bytes.len() as u64) else { return false };
    let _ = file.config();
    let _ = millrace_coordinator::text::TextModel::from_gguf(&file);
    true
}

/// A folder's weights file, in a folder of its own.
fn safetensors() -> impl Fn(&[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a folder");
    let config = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":2,"vocab_size":64,"max_position_embeddings":128,"rms_norm_eps":1e-5,"rope_theta":10000.0,"torch_dtype":"float32"}"#;
    std::fs::write(folder.path().join("config.json"), config).expect("written");
    move |bytes| {
        std::fs::write(folder.path().join("model.safetensors"), bytes).expect("written");
        // It lacks what a model needs; that is said after the header was read.
        let _ = millrace_shared::model::ModelFiles::open(folder.path());
        true
    }
}

fn template(bytes: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(bytes) else { return false };
    let Ok(template) = ChatTemplate::new(source, "<s>".into(), "</s>".into()) else { return false };
    template.render(&corpus::chat(), true).is_ok()
}

/// All of them but those that need a cluster.
pub fn targets() -> Vec<Target> {
    vec![
        target("gguf", corpus::gguf(), gguf),
        target("safetensors", corpus::safetensors(), safetensors()),
        target("node message", corpus::node_messages(), message::<NodeMessage>),
        target(
            "coordinator message",
            corpus::coordinator_messages(),
            message::<CoordinatorMessage>,
        ),
        target("method", corpus::methods(), message::<Method>),
        target("call header", Vec::from([vec![]]), |bytes| {
            let _ = message::<CallHeader>(bytes);
            true
        }),
        target("reply", corpus::replies(), message::<Reply>),
        target("plane", corpus::planes(), message::<Plane>),
        target("admin", Vec::from([vec![0], vec![1, 1, 97]]), |bytes| {
            let _ = message::<AdminRequest>(bytes) || message::<AdminReply>(bytes);
            true
        }),
        target("join", Vec::from([vec![0, 3, 97, 98, 99]]), |bytes| {
            let _ = message::<JoinRequest>(bytes) || message::<JoinResponse>(bytes);
            true
        }),
        target("step meta", corpus::step_metas(), step_meta),
        target("result meta", corpus::result_metas(), meta::<ResultMeta>),
        target("open meta", corpus::open_metas(), meta::<OpenMeta>),
        target("frame", corpus::frames(), |bytes| Frame::parse(aligned(bytes)).is_ok()),
        target("chat template", corpus::templates(), template),
        target("scheduler", scheduler::corpus(), scheduler::read),
    ]
}

/// The HTTP API of a cluster of mocks, and the target that asks it.
#[derive(Debug)]
pub struct Http {
    /// Bodies for both kinds of continuation.
    pub target: Target,
}

impl Http {
    /// Starts a cluster; it ends with the target.
    pub fn start() -> Self {
        let cluster = Mocked::start(&Shape::of_layers([std::time::Duration::ZERO], 2));
        let (addr, key) = (cluster.http(), cluster.client().api_key.clone());
        let read = move |bytes: &[u8]| {
            let path = match bytes.windows(8).any(|w| w == b"messages") {
                true => "/v1/chat/completions",
                false => "/v1/completions",
            };
            let _ = &cluster;
            let answer = http::post(addr, path, &key, bytes);
            assert!(answer.status < 500, "{}: {}", answer.status, answer.text());
            true
        };
        Self { target: target("http body", corpus::bodies(), read) }
    }
}
