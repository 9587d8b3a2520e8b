//! What is fed.

use std::path::Path;

use millrace_coordinator::text::ChatTemplate;
use millrace_engine::TensorSource;
use millrace_engine::model::Source;
use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{ModelFiles, SparseForm, TILE_ROWS, TensorEntry, TensorType};
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::control::{BlobRequest, CoordinatorMessage, NodeMessage};
use millrace_shared::wire::data::{
    FrameHeader, HEADER_BYTES, MaskMeta, OpenMeta, ResultMeta, StepMeta,
};
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
    // A list is given at most a mebibyte before its entries are there.
    let memory = (4 << 20, 64);
    Target { name, corpus, read: Box::new(read), words: &[], mend: None, memory }
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

fn result_meta(bytes: &[u8]) -> bool {
    ResultMeta::from_bytes(&aligned(bytes)).is_ok_and(|meta| meta.validate(1 << 16, 2).is_ok())
}

/// Masks as a last stage asks them, whatever the vocabulary that they were made for.
fn mask_meta(bytes: &[u8]) -> bool {
    let Ok(meta) = MaskMeta::from_bytes(&aligned(bytes)) else { return false };
    for allowed in meta.masks.iter().map(|mask| &mask.allowed) {
        for vocab in [1, 300, usize::MAX] {
            assert!(allowed.first(vocab).is_none_or(|id| allowed.allows(id)));
        }
        assert!(!allowed.allows(u32::MAX) || allowed.bytes() >= 1 << 29);
    }
    true
}

fn gguf(bytes: &[u8]) -> bool {
    let Ok(file) = Gguf::read(bytes, bytes.len() as u64) else { return false };
    for t in &file.tensors {
        assert!(t.offset >= file.data_offset && t.offset + t.bytes <= file.file_len);
    }
    let _ = file.config();
    let files = ModelFiles::of_gguf(file, Path::new("damaged.gguf"));
    let _ = files.map(|files| files.check_supported_types());
    true
}

/// The tokenizer and the template of a file.
fn text_model(bytes: &[u8]) -> bool {
    let Ok(file) = Gguf::read(bytes, bytes.len() as u64) else { return false };
    let _ = millrace_coordinator::text::TextModel::from_gguf(&file);
    true
}

/// In memory where there is such a place: on a disk, writing a file anew waits for the disk.
fn folder() -> tempfile::TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).expect("a folder")
}

/// What says where the values of a matrix lie, and these, read to the end.
fn sparse() -> impl Fn(&[u8]) -> bool {
    let path = folder();
    move |bytes| {
        let Some((&kind, rest)) = bytes.split_first() else { return false };
        let form = SparseForm::ALL[usize::from(kind) % SparseForm::ALL.len()];
        let (dtype, shape) = corpus::sparse_shape(form);
        let of = |(dtype, dims): &(TensorType, Vec<u64>)| {
            dtype.bytes_of(dims.iter().product()).unwrap_or(0)
        };
        // Where the last row ends says how many places there are; values are the rest.
        let [_, _, starts] = form.shapes(dtype, shape, (1, 1)).map(|shape| of(&shape));
        let end = rest.get(..starts as usize).and_then(<[u8]>::last_chunk);
        let kept = end.map_or(0, |end| u32::from_le_bytes(*end));
        let kept = u64::from(kept).clamp(1, shape[0] * shape[1]);
        let mut shapes = form.shapes(dtype, shape, (kept, kept * TILE_ROWS));
        let index = of(&shapes[1]);
        let values = (rest.len() as u64).saturating_sub(starts + index);
        let offsets = [starts + index, starts, 0];
        shapes[0].1 = shape.to_vec();
        let at = path.path().join("matrix");
        std::fs::write(&at, rest).expect("written");
        let [places, begins] = form.parts();
        let parts = ["weight", places, begins].into_iter().zip(shapes);
        let sizes = [values, index, starts].into_iter().zip(offsets);
        let sources = parts.zip(sizes).map(|((end, (dtype, dims)), (bytes, offset))| {
            let name = format!("blk.0.ffn_up.{end}");
            let entry = TensorEntry { name, dtype, dims, file: 0, offset, bytes, hash: [0; 32] };
            TensorSource { entry, path: at.clone(), offset }
        });
        let sources: Vec<TensorSource> = sources.collect();
        let Ok(all) = Source::of_tensors(&sources) else { return false };
        let [matrix] = &all[..] else { return false };
        let tiles = matrix.tiles().is_ok();
        let mut out = vec![1; dtype.bytes_of(shape[0] * shape[1]).unwrap_or(0) as usize];
        let read = matrix.open().and_then(|mut reader| reader.read(0, &mut out));
        // Who computes with tiles alone finds what is wrong with them too.
        assert!(tiles || read.is_err(), "tiles that cannot be were read");
        read.is_ok()
    }
}

/// A folder's weights file, in a folder of its own.
fn safetensors() -> impl Fn(&[u8]) -> bool {
    let folder = folder();
    let config = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":2,"vocab_size":64,"max_position_embeddings":128,"rms_norm_eps":1e-5,"rope_theta":10000.0,"torch_dtype":"float32"}"#;
    std::fs::write(folder.path().join("config.json"), config).expect("written");
    move |bytes| {
        std::fs::write(folder.path().join("model.safetensors"), bytes).expect("written");
        // It lacks what a model needs; that is said after the header was read.
        let _ = ModelFiles::open(folder.path());
        true
    }
}

/// The length of a safetensors file's header, and as much data as it may announce.
fn mend_safetensors(bytes: &mut Vec<u8>) {
    let header = bytes.get(8..).unwrap_or_default();
    let end = header.iter().rposition(|&b| b == b'}').map_or(0, |at| at + 1);
    let text = String::from_utf8_lossy(&header[..end]).into_owned();
    *bytes = corpus::safetensors_file(&text, 6276);
}

/// The checksum of a frame, and its lengths where they say less than is there.
fn mend_frame(bytes: &mut [u8]) {
    let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else { return };
    let Ok(mut header) = FrameHeader::decode(head) else { return };
    header.crc = header.checksum(&bytes[HEADER_BYTES..]);
    bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
}

/// A frame and its metadata, as whoever gets it reads it.
fn frame(bytes: &[u8]) -> bool {
    let Ok(frame) = Frame::parse(aligned(bytes)) else { return false };
    let _ = frame.payload_f32().map(|floats| floats.iter().sum::<f32>());
    let _ = frame.payload_u32().map(<[u32]>::len);
    let _ = frame.meta::<ResultMeta>();
    let _ = frame.meta::<OpenMeta>();
    let _ = frame.meta::<MaskMeta>();
    frame.meta::<StepMeta>().is_ok_and(|meta| meta.validate(4096).is_ok())
}

/// A folder's `config.json`.
fn config() -> impl Fn(&[u8]) -> bool {
    let folder = folder();
    let weights = corpus::safetensors().swap_remove(1);
    std::fs::write(folder.path().join("model.safetensors"), weights).expect("written");
    move |bytes| {
        std::fs::write(folder.path().join("config.json"), bytes).expect("written");
        let _ = ModelFiles::open(folder.path());
        true
    }
}

fn template(bytes: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(bytes) else { return false };
    let Ok(template) = ChatTemplate::new(source, "<s>".into(), "</s>".into()) else { return false };
    template.render(&corpus::chat().into(), true).is_ok()
}

/// What model files hold.
fn files() -> Vec<Target> {
    let gguf_memory = (64 << 10, 64);
    vec![
        Target {
            words: corpus::GGUF_WORDS,
            memory: gguf_memory,
            ..target("gguf", corpus::gguf(), gguf)
        },
        Target {
            words: corpus::GGUF_WORDS,
            memory: (4 << 20, 512),
            ..target("text of gguf", corpus::gguf(), text_model)
        },
        target("sparse matrix", corpus::sparse(), sparse()),
        Target {
            words: corpus::JSON_WORDS,
            mend: Some(mend_safetensors),
            memory: (256 << 10, 256),
            ..target("safetensors", corpus::safetensors(), safetensors())
        },
        Target {
            words: corpus::JSON_WORDS,
            memory: (256 << 10, 256),
            ..target("config", corpus::configs(), config())
        },
        Target {
            words: corpus::TEMPLATE_WORDS,
            memory: (64 << 20, 1 << 10),
            ..target("chat template", corpus::templates(), template)
        },
    ]
}

/// Messages of all planes, and frames.
fn messages() -> Vec<Target> {
    use corpus::messages as m;
    vec![
        target("node message", m::of_nodes(), message::<NodeMessage>),
        target("coordinator message", m::of_coordinators(), message::<CoordinatorMessage>),
        target("method", m::methods(), message::<Method>),
        target("call header", m::headers(), message::<CallHeader>),
        target("reply", m::replies(), message::<Reply>),
        target("plane", m::planes(), message::<Plane>),
        target("blob request", m::blobs(), message::<BlobRequest>),
        target("admin", m::admin(), message::<AdminRequest>),
        target("admin reply", m::admin_replies(), message::<AdminReply>),
        target("join", m::joins(), message::<JoinRequest>),
        target("join answer", m::join_answers(), message::<JoinResponse>),
        target("step meta", corpus::step_metas(), step_meta),
        target("result meta", corpus::result_metas(), result_meta),
        target("open meta", corpus::open_metas(), meta::<OpenMeta>),
        target("mask meta", corpus::mask_metas(), mask_meta),
        Target {
            mend: Some(|bytes| mend_frame(bytes)),
            ..target("frame", corpus::frames(), frame)
        },
    ]
}

/// All of them but those that need a cluster.
pub fn targets() -> Vec<Target> {
    let scheduler = target("scheduler", scheduler::corpus(), scheduler::read);
    let mut all = files();
    all.extend(messages());
    all.push(Target { memory: (4 << 20, 1 << 10), ..scheduler });
    all
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
        let words = corpus::JSON_WORDS;
        Self { target: Target { words, ..target("http body", corpus::bodies(), read) } }
    }
}
