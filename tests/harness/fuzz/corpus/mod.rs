//! Sound inputs: at least one of every shape that a reader tells apart, for damage finds no way from
//! one to another.

use millrace_shared::id::SequenceId;
use millrace_shared::model::gguf::GgufWriter;
use millrace_shared::model::{Places, SparseForm, TensorType};
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::{SamplingParams, TokenMask};
use millrace_shared::wire::data::{
    ChosenToken, Failure, MaskMeta, OpenMeta, ResultMeta, Row, RowMask, RowOutcome, SequenceOpen,
    StageTime, StepMeta, TableUpdate, Want,
};
use millrace_shared::wire::frame::FrameMeta;
use millrace_shared::wire::rpc::{
    ChatMessage, Conversation, PositionScore, TokenLogprobs, ToolCall, ToolChoice,
};

pub(super) mod messages;

/// GGUF files: of a model with a vocabulary and a template, of one with every type of value, and of
/// nothing.
pub(super) fn gguf() -> Vec<Vec<u8>> {
    let text = |n: u32| (0..n).map(|i| format!("t{i}")).collect::<Vec<_>>();
    let mut model = GgufWriter::new();
    model
        .set("general.architecture", "llama")
        .set("llama.block_count", 2u32)
        .set("llama.embedding_length", 32u32)
        .set("llama.attention.head_count", 2u64)
        .set("llama.feed_forward_length", 64u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("some.flags", vec![true, false])
        .set("some.numbers", vec![1i64, -1])
        .set("tokenizer.ggml.tokens", text(32));
    model.tensor("token_embd.weight", TensorType::Q4_0, &[32, 32], vec![1; 576]).expect("a tensor");
    model.tensor("output_norm.weight", TensorType::F32, &[32], vec![2; 128]).expect("a tensor");
    let mut other = GgufWriter::new();
    other
        .set("general.architecture", "qwen3")
        .set("general.alignment", 64u32)
        .set("qwen3.block_count", 1u32)
        .set("qwen3.embedding_length", 64u32)
        .set("qwen3.attention.head_count", 4u32)
        .set("qwen3.attention.head_count_kv", 2u32)
        .set("qwen3.attention.key_length", 16u32)
        .set("qwen3.feed_forward_length", 64u32)
        .set("qwen3.context_length", 64u32)
        .set("qwen3.rope.freq_base", 1e6f32)
        .set("qwen3.rope.scaling.type", "yarn")
        .set("qwen3.rope.scaling.factor", 4f32)
        .set("qwen3.attention.layer_norm_rms_epsilon", 1e-6f32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "qwen2")
        .set("tokenizer.ggml.tokens", text(300))
        .set("tokenizer.ggml.token_type", vec![1i32; 300])
        .set("tokenizer.ggml.merges", vec!["t 1".to_owned(), "t 2".to_owned()])
        .set("tokenizer.ggml.eos_token_id", 2u32)
        .set("tokenizer.ggml.add_bos_token", false)
        .set("tokenizer.chat_template", "{{ messages[0].content }}");
    for kind in [TensorType::F16, TensorType::Q8_0, TensorType::Q4_K] {
        let bytes = kind.bytes_of(256).unwrap_or(0) as usize;
        let name = format!("blk.0.{kind:?}.weight");
        other.tensor(&name, kind, &[256], vec![3; bytes]).expect("a tensor");
    }
    vec![model.to_bytes(), other.to_bytes(), GgufWriter::new().to_bytes()]
}

/// Shape and type of the matrices of [`sparse`].
pub(super) fn sparse_shape(form: SparseForm) -> (TensorType, [u64; 2]) {
    match form {
        SparseForm::Tiles => (TensorType::Q8_0, [64, 40]),
        SparseForm::Csr | SparseForm::Bitmask => (TensorType::F16, [64, 20]),
    }
}

/// Matrices without their zeros: the number of the form, where rows begin, where values lie, values.
pub(super) fn sparse() -> Vec<Vec<u8>> {
    let one = |(kind, form): (u8, SparseForm)| {
        let (dtype, shape) = sparse_shape(form);
        let unit = dtype.bytes_of(form.width(dtype)).unwrap_or(1) as usize;
        let bytes = dtype.bytes_of(shape[0] * shape[1]).unwrap_or(0) as usize;
        let part = |i: usize| u8::from((i / unit * 7 + i / 500).is_multiple_of(3));
        let dense: Vec<u8> = (0..bytes).map(part).collect();
        let zero = |line: &[u8]| line.iter().all(|byte| *byte == 0);
        let places = Places::find(form, dtype, shape, &dense, zero).expect("a matrix");
        let [values, index, starts] = places.encode(&dense).expect("few values");
        [vec![kind], starts, index, values].concat()
    };
    (0..).zip(SparseForm::ALL).map(one).collect()
}

/// A safetensors file: the length of its header, the header, and what it announces.
pub(super) fn safetensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

pub(super) fn safetensors() -> Vec<Vec<u8>> {
    let few = r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}}"#;
    let model = r#"{"model.embed_tokens.weight":{"dtype":"F16","shape":[64,32],"data_offsets":[0,4096]},"model.layers.0.self_attn.q_proj.weight":{"dtype":"F8_E4M3","shape":[32,32],"data_offsets":[4096,5120]},"model.layers.0.self_attn.q_proj.weight_scale":{"dtype":"F32","shape":[],"data_offsets":[5120,5124]},"model.layers.0.mlp.up_proj.qweight":{"dtype":"I32","shape":[4,64],"data_offsets":[5124,6148]},"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":[6148,6276]}}"#;
    vec![safetensors_file(few, 24), safetensors_file(model, 6276), safetensors_file("{}", 0)]
}

/// `config.json` of the families, without names and shapes of their tensors.
pub(super) fn configs() -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/families");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the families").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".json") && !name.ends_with(".gguf.json") {
            let text = std::fs::read_to_string(entry.path()).expect("a family");
            let family: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            found.push((name, family["config"].to_string().into_bytes()));
        }
    }
    // The order of a folder is nobody's, and runs are the same each time.
    found.sort();
    found.into_iter().map(|(_, bytes)| bytes).collect()
}

/// The same with a tool that was called.
pub(super) fn conversation() -> Conversation {
    let call = ToolCall { id: "c".into(), name: "f".into(), arguments: "{}".into() };
    let mut messages = chat();
    messages[2].tool_calls = vec![call];
    messages[3].tool_call_id = Some("c".into());
    Conversation {
        messages,
        tools: vec![r#"{"name": "f"}"#.into()],
        tool_choice: ToolChoice::Named("f".into()),
        single_call: true,
    }
}

pub(super) fn chat() -> Vec<ChatMessage> {
    [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Yes."), ("user", "Why?")]
        .map(|(role, content)| ChatMessage::new(role, content))
        .into()
}

fn row(want: Want, count: u32) -> Row {
    Row { sequence: SequenceId(5), sequence_epoch: 1, position: 40, count, want }
}

fn bytes<M: FrameMeta>(metas: impl IntoIterator<Item = M>) -> Vec<Vec<u8>> {
    metas.into_iter().map(|m| m.to_bytes().expect("bytes").to_vec()).collect()
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
    let failed = StepMeta { failed: Some(Failure::of_stage(1, "NaN".into())), ..meta.clone() };
    let scored = StepMeta {
        rows: vec![row(Want::Score { top_k: 5 }, 64), row(Want::Follow, 2)],
        drafts: vec![1, 2],
        tables: (0..20)
            .map(|i| TableUpdate { sequence: SequenceId(i), first: 0, blocks: vec![1; 9] })
            .collect(),
        times: vec![StageTime::default(); 8],
        ..StepMeta::default()
    };
    bytes([meta, failed, scored, StepMeta::default()])
}

pub(super) fn result_metas() -> Vec<Vec<u8>> {
    let logprobs = Some(TokenLogprobs { logprob: -1.5, top: vec![(3, -0.5), (9, -2.0)] });
    let rows = vec![
        row(Want::Sample, 1).result(RowOutcome::Token { token: 7, logprobs: None }),
        row(Want::Sample, 1).result(RowOutcome::Token { token: 7, logprobs: logprobs.clone() }),
        row(Want::None, 4).result(RowOutcome::Failed("no".into())),
        row(Want::None, 4).result(RowOutcome::Done),
        row(Want::Verify, 4)
            .result(RowOutcome::Tokens(vec![ChosenToken { token: 1, logprobs }; 3])),
        row(Want::Score { top_k: 2 }, 4).result(RowOutcome::Scores(vec![
            PositionScore {
                top_logits: vec![(1, 2.0), (2, 1.0)],
                ..PositionScore::default()
            };
            4
        ])),
    ];
    let embed = Want::Embed { pooling: Pooling::Mean };
    let mut rows = rows;
    rows.push(row(Want::Sum, 4).result(RowOutcome::Done));
    rows.push(row(embed, 4).result(RowOutcome::Embedding(vec![0.6, -0.8])));
    let times = vec![StageTime::default(); 2];
    let each = rows.iter().map(|r| ResultMeta { rows: vec![r.clone()], times: times.clone() });
    let mut found = bytes(each);
    found.extend(bytes([ResultMeta { rows, times }]));
    found
}

pub(super) fn open_metas() -> Vec<Vec<u8>> {
    let open = |stops: usize, tokens: u32| SequenceOpen {
        sequence: SequenceId(5),
        tokens: (0..tokens).collect(),
        prompt_len: tokens.min(3),
        params: SamplingParams { stop: vec!["x".into(); stops], ..SamplingParams::greedy() },
        seed: 3,
        constrained: stops == 0,
    };
    let one = OpenMeta { opens: vec![open(1, 3)] };
    bytes([one, OpenMeta { opens: vec![open(0, 300), open(4, 9)] }, OpenMeta { opens: vec![] }])
}

pub(super) fn mask_metas() -> Vec<Vec<u8>> {
    let mask = |sequence: u64, allowed: TokenMask| RowMask {
        sequence: SequenceId(sequence),
        position: 40,
        allowed,
    };
    let wide = mask(6, TokenMask::from_words(vec![u32::MAX; 40]));
    let one = mask(5, TokenMask::of([3, 70]));
    // Of a request that ended: nothing is allowed.
    let none = mask(7, TokenMask::default());
    bytes([
        MaskMeta { masks: vec![one.clone()] },
        MaskMeta { masks: vec![one, wide, none] },
        MaskMeta::default(),
    ])
}

pub(super) fn frames() -> Vec<Vec<u8>> {
    [1, 3].map(|rows| crate::frames::activations(rows, 4).as_bytes().to_vec()).into()
}

pub(super) fn templates() -> Vec<Vec<u8>> {
    [
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}{{ s }}{% endif %}{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content | upper | replace('A', 'b') }}{% endfor %}{{ bos_token }}",
        "{% macro say(m) %}{{ m.role ~ ': ' ~ m.content }}{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ say(m) }}{% endfor %}{{ range(ns.n) | list }}{{ messages | tojson }}",
        "{%- set ns = namespace(system='', first=true) -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{%- set ns.system = ns.system ~ '\n' ~ m['content'] -%}{%- elif ns.first -%}{{- bos_token + '[INST] ' + ns.system + m.content.strip() -}}{%- set ns.first = false -%}{%- else -%}{{- m.content.split('</think>')[-1].lstrip('\n').replace('a', 'b') -}}{%- endif -%}{%- endfor -%}",
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% set content = m['content'] if loop.last else m['content'][:4] %}{{ content * 2 }}{{ [1, 2] + [3] }}{{ {'a': content}.items() | list }}{{ '%s' | format(content) | indent(2) }}{% endfor %}{% set x %}{{ messages | map(attribute='role') | join(',') }}{% endset %}{{ x[::-1] }}{{ strftime_now('%Y') }}",
    ]
    .map(|t| t.as_bytes().to_vec())
    .into()
}

pub(super) fn bodies() -> Vec<Vec<u8>> {
    [
        r#"{"model":"mocked","prompt":"abc","max_tokens":3,"temperature":0.5,"stop":["x","yy"],"seed":7}"#,
        r#"{"model":"mocked","messages":[{"role":"user","content":"hi"}],"max_tokens":2,"stream":true,"stream_options":{"include_usage":true}}"#,
        r#"{"model":"mocked","prompt":[33,34,35],"max_tokens":2,"logprobs":3,"logit_bias":{"5":-1.5},"top_p":0.9,"top_k":5}"#,
        r#"{"model":"mocked","prompt":["abc","d"],"max_tokens":1,"n":2,"best_of":2,"echo":true,"suffix":null,"user":"u"}"#,
        r#"{"model":"mocked","messages":[{"role":"system","content":"a"},{"role":"assistant","content":null,"tool_calls":[]},{"role":"tool","content":"x","tool_call_id":"1"}],"max_tokens":1,"response_format":{"type":"text"},"tools":[],"logprobs":true,"top_logprobs":2,"temperature":2,"min_p":0.1,"repetition_penalty":1.2,"frequency_penalty":-0.5,"ignore_eos":true}"#,
        r#"{"model":"mocked","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"max_completion_tokens":1,"presence_penalty":0.5}"#,
    ]
    .map(|t| t.as_bytes().to_vec())
    .into()
}

/// What is put into texts beside single bytes: pieces that their readers know.
pub(super) const TEMPLATE_WORDS: &[&str] = &[
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    " %}",
    "{% endif %}",
    "{{ ",
    " }}",
    "{% set x = ",
    "{% set ns = namespace(a=[]) %}",
    "{% set ns.a = ",
    "{% macro f(x) %}",
    "{% endmacro %}",
    "{{ f(x) }}",
    "{% set x %}",
    "{% endset %}",
    "{% call f() %}",
    "{% endcall %}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{% block b %}",
    "{% endblock %}",
    "{% raw %}",
    "{% endraw %}",
    "{% include 'chat' %}",
    "{% extends 'chat' %}",
    "{% break %}",
    "range(9)",
    "messages",
    "loop.index",
    "[-1]",
    "[::-1]",
    "[1:]",
    " ~ ",
    " + ",
    " * 3",
    " ** 9",
    " // 0",
    " % 0",
    " in ",
    " is defined",
    " is not none",
    " if x else ",
    "[x, x]",
    "{'a': x}",
    " | tojson",
    " | tojson(indent=2)",
    " | join(x)",
    " | replace('', x)",
    " | list",
    " | length",
    " | map(attribute='role')",
    " | selectattr('role', 'eq', 'user')",
    " | groupby('role')",
    " | batch(2)",
    " | slice(3)",
    " | indent(9)",
    " | format(x)",
    " | sort",
    " | unique",
    " | first",
    " | items",
    " | default('')",
    ".split('')",
    ".replace('a', x)",
    ".format(x)",
    ".join(x)",
    ".strip()",
    ".get('a')",
    ".items()",
    "raise_exception(x)",
    "strftime_now('%c%Q')",
    "-9223372036854775808",
    "1e308",
    "0.1",
    "'\u{e9}\u{1f600}'",
    "(",
    ")",
    "[",
    "]",
    "'",
];

pub(super) const JSON_WORDS: &[&str] = &[
    "null",
    "true",
    "false",
    "-1",
    "0",
    "1e999",
    "0.5",
    "18446744073709551616",
    "[]",
    "{}",
    "\"\"",
    "[[",
    "]]",
    "\"\\u0000\"",
    "\"\\ud800\"",
    ",",
    ":",
    "\"stream\":true",
    "\"max_tokens\":",
    "\"messages\":",
    "\"prompt\":",
    "\"stop\":",
    "\"n\":",
    "\"logit_bias\":{\"0\":100}",
    "\"seed\":-1",
    "\"role\":\"user\"",
    "\"content\":",
    "\"dtype\":\"F32\"",
    "\"shape\":[",
    "\"data_offsets\":[0,",
    "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":0}",
    "\"num_attention_heads\":0",
    "\"hidden_size\":4294967295",
];

pub(super) const GGUF_WORDS: &[&str] = &[
    "general.architecture",
    "general.alignment",
    "llama.block_count",
    "tokenizer.ggml.tokens",
    "tokenizer.chat_template",
    "tokenizer.ggml.merges",
    "token_embd.weight",
    "GGUF",
    "qwen3",
    "gemma3",
    "\u{4}\u{0}\u{0}\u{0}",
    "\u{9}\u{0}\u{0}\u{0}",
];
