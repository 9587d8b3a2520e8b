//! A stand-in for the hub: one repository on loopback, with a script of what goes wrong.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use millrace_coordinator::models::Settings;
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::GgufWriter;
use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Content of each file, and whether the hub keeps it by its hash.
pub(crate) type Repo = BTreeMap<String, (Vec<u8>, bool)>;

/// What goes wrong with a request whose path begins so; each once, in order.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// So many bytes of what was asked for, then the connection ends.
    Cut(usize),
    /// Another body.
    Body(Vec<u8>),
    /// A status with further lines of the head.
    Status(u16, &'static str),
}

#[derive(Default)]
pub(crate) struct Script(Vec<(&'static str, Reply)>);

impl Script {
    pub(crate) fn new(steps: Vec<(&'static str, Reply)>) -> Self {
        Self(steps)
    }

    fn take(&mut self, path: &str) -> Option<Reply> {
        let at = self.0.iter().position(|(prefix, _)| path.starts_with(prefix))?;
        Some(self.0.remove(at).1)
    }
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) range: Option<u64>,
    pub(crate) authorised: bool,
}

pub(crate) struct Hub {
    pub(crate) url: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    pub(crate) fn start(repo: Repo, script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (writer, own_url) = (Arc::clone(&log), url.clone());
        std::thread::spawn(move || {
            let mut script = script;
            for stream in listener.incoming() {
                // A client that has seen enough may be gone.
                let _ = serve(stream.unwrap(), &repo, &own_url, &mut script, &writer);
            }
        });
        Self { url, log }
    }

    pub(crate) fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }
}

fn serve(
    mut stream: TcpStream,
    repo: &Repo,
    url: &str,
    script: &mut Script,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap()?;
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let mut request = Request { path: path.clone(), range: None, authorised: false };
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            request.range = range.split('-').next().unwrap().parse().ok().filter(|&n| n > 0);
        }
        request.authorised |= line.starts_with("authorization: bearer ");
    }
    let range = request.range;
    log.lock().unwrap().push(request);
    let reply = script.take(&path);
    if let Some(Reply::Status(status, lines)) = reply {
        let head =
            format!("HTTP/1.1 {status} X\r\n{lines}Content-Length: 0\r\nConnection: close\r\n\r\n");
        return stream.write_all(head.as_bytes());
    }
    let prefix = format!("/{}/resolve/{COMMIT}/", repo_name(repo));
    let body = if path.starts_with("/api/models/") {
        list(repo).into_bytes()
    } else if let Some(name) = path.strip_prefix(&prefix) {
        let Some((bytes, large)) = repo.get(name) else {
            let head = "HTTP/1.1 404 X\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            return stream.write_all(head.as_bytes());
        };
        if *large {
            let sha = sha256(bytes);
            // Another host, as far as a client can tell.
            let elsewhere = url.replace("127.0.0.1", "localhost");
            let head = format!(
                "HTTP/1.1 302 Found\r\nLocation: {elsewhere}/cdn/{sha}\r\nX-Linked-Etag: \"{sha}\"\r\nX-Linked-Size: {}\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                bytes.len()
            );
            return stream.write_all(head.as_bytes());
        }
        bytes.clone()
    } else {
        let sha = path.strip_prefix("/cdn/").unwrap();
        repo.values().find(|(bytes, _)| sha256(bytes) == sha).unwrap().0.clone()
    };
    let body = match &reply {
        Some(Reply::Body(other)) => other.clone(),
        _ => body,
    };
    let from = range.unwrap_or(0) as usize;
    if from >= body.len() && from > 0 {
        let head = "HTTP/1.1 416 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return stream.write_all(head.as_bytes());
    }
    let rest = &body[from..];
    let status = match from {
        0 => "200 OK".to_owned(),
        _ => format!(
            "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}",
            body.len() - 1,
            body.len()
        ),
    };
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", rest.len());
    stream.write_all(head.as_bytes())?;
    match reply {
        Some(Reply::Cut(n)) => stream.write_all(&rest[..n.min(rest.len())]),
        _ => stream.write_all(rest),
    }
}

fn repo_name(repo: &Repo) -> &'static str {
    if repo.contains_key("config.json") { "org/tiny" } else { "org/tiny-GGUF" }
}

fn list(repo: &Repo) -> String {
    let file = |(name, (bytes, large)): (&String, &(Vec<u8>, bool))| {
        let mut file = serde_json::json!({ "rfilename": name, "size": bytes.len() });
        if *large {
            file["lfs"] = serde_json::json!({ "sha256": sha256(bytes), "size": bytes.len() });
        }
        file
    };
    let siblings: Vec<_> = repo.iter().map(file).collect();
    serde_json::json!({ "sha": COMMIT, "siblings": siblings, "gated": false }).to_string()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Settings that know this hub alone.
pub(crate) fn settings(cache: &Path, hub_url: &str) -> Settings {
    Settings {
        cache: cache.to_owned(),
        hub_url: hub_url.to_owned(),
        source: None,
        pip: Vec::new(),
        hub_caches: Vec::new(),
        token: None,
        offline: false,
        retry_wait: Duration::from_millis(1),
    }
}

/// A sound file; another number is another content.
pub(crate) fn gguf(number: u32) -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("general.number", number)
        .set("llama.block_count", 1u32)
        .set("llama.embedding_length", 32u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.feed_forward_length", 64u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let data: Vec<u8> = (0..32 * 4096 * 4u32).map(|i| (i % 251) as u8).collect();
    w.tensor("token_embd.weight", TensorType::F32, &[32, 4096], data).unwrap();
    w.to_bytes()
}

pub(crate) fn gguf_repo() -> Repo {
    let large = |name: &str, number| (name.to_owned(), (gguf(number), true));
    let readme = ("README.md".to_owned(), (b"# tiny".to_vec(), false));
    [large("tiny-Q5_0.gguf", 1), large("tiny-Q8_0.gguf", 2), readme].into()
}

/// A llama of one layer in two files, and what such repositories have beside it.
pub(crate) fn folder_repo() -> Repo {
    let config = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let layer = "model.layers.0.";
    let first = [("model.embed_tokens.weight".to_owned(), vec![64, 32])];
    let named = |name: &str, shape: &[usize]| (format!("{layer}{name}.weight"), shape.to_vec());
    let second = [
        ("model.norm.weight".to_owned(), vec![32]),
        named("input_layernorm", &[32]),
        named("post_attention_layernorm", &[32]),
        named("self_attn.q_proj", &[32, 32]),
        named("self_attn.k_proj", &[32, 32]),
        named("self_attn.v_proj", &[32, 32]),
        named("self_attn.o_proj", &[32, 32]),
        named("mlp.gate_proj", &[64, 32]),
        named("mlp.up_proj", &[64, 32]),
        named("mlp.down_proj", &[32, 64]),
    ];
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut map = serde_json::Map::new();
    for (tensors, shard) in [(&first[..], shards[0]), (&second[..], shards[1])] {
        for (name, _) in tensors {
            map.insert(name.clone(), shard.into());
        }
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    let small = |name: &str, text: String| (name.to_owned(), (text.into_bytes(), false));
    let large = |name: &str, bytes: Vec<u8>| (name.to_owned(), (bytes, true));
    [
        small("config.json", config.to_string()),
        small("model.safetensors.index.json", index),
        small("tokenizer.json", "{}".to_owned()),
        large(shards[0], safetensors(&first)),
        large(shards[1], safetensors(&second)),
        large("pytorch_model.bin", vec![1; 5000]),
        large("consolidated.safetensors", vec![2; 5000]),
        large("onnx/model.onnx", vec![3; 5000]),
    ]
    .into()
}

/// A file of zeroes.
fn safetensors(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = offset + 4 * shape.iter().product::<usize>();
        let entry = serde_json::json!({
            "dtype": "F32", "shape": shape, "data_offsets": [offset, end],
        });
        header.insert(name.clone(), entry);
        offset = end;
    }
    let header = serde_json::Value::Object(header).to_string().into_bytes();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + offset, 0);
    bytes
}
