#!/usr/bin/env python3
"""Makes the expected answers of `node/engine/tests/families.rs`.

For each family a small model with weights that both sides compute from the tensors' names, run by
Hugging Face `transformers` in f32: FAMILY.json. Then llama.cpp's own converter makes a GGUF file of it,
which llama.cpp runs with an f32 cache: FAMILY.gguf.json keeps the head of that file, its hash and the
logits; the test puts the weights behind the head. Needs `pip install torch transformers safetensors
blake3 llama-cpp-python` and llama.cpp's sources, which come with the package's (0.3.36 was used):

    python3 make.py LLAMA_CPP [FAMILY ...]        # writes beside itself
"""

import base64
import json
import logging
import pathlib
import sys
import tempfile

import blake3
import numpy as np
import torch
import transformers

PROMPT = 40
ANSWER = 16
HERE = pathlib.Path(__file__).parent
DIMS = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    num_hidden_layers=3,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=1000.0,
    factor=4.0,
    original_max_position_embeddings=32,
)


def long_rope(original: int) -> dict:
    return dict(
        rope_type="longrope",
        rope_theta=10000.0,
        short_factor=[1.0 + 0.05 * i for i in range(8)],
        long_factor=[1.0 + 0.5 * i for i in range(8)],
        original_max_position_embeddings=original,
    )


MOE = dict(
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    decoder_sparse_step=1,
    tie_word_embeddings=False,
)
CASES = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "llama3": (
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "mistral": ("MistralForCausalLM", transformers.MistralConfig, dict(sliding_window=12)),
    "qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", transformers.Qwen3Config, dict(tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2ForCausalLM",
        transformers.Gemma2Config,
        dict(
            sliding_window=12,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        transformers.Gemma3TextConfig,
        dict(num_hidden_layers=7, sliding_window=12, query_pre_attn_scalar=16),
    ),
    "phi4": (
        "Phi3ForCausalLM",
        transformers.Phi3Config,
        dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5
            ),
            tie_word_embeddings=True,
        ),
    ),
    "phi3": ("Phi3ForCausalLM", transformers.Phi3Config, dict(sliding_window=12)),
    # Sequences above and below the first context.
    "phi3_long": (
        "Phi3ForCausalLM",
        transformers.Phi3Config,
        dict(rope_parameters=long_rope(32), original_max_position_embeddings=32),
    ),
    "phi3_short": (
        "Phi3ForCausalLM",
        transformers.Phi3Config,
        dict(
            # llama.cpp rounds contexts up to 256.
            rope_parameters=long_rope(256),
            original_max_position_embeddings=256,
            max_position_embeddings=512,
        ),
    ),
    "qwen2_yarn": (
        "Qwen2ForCausalLM",
        transformers.Qwen2Config,
        dict(rope_parameters=YARN, tie_word_embeddings=True),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        transformers.MixtralConfig,
        dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        transformers.Qwen2MoeConfig,
        dict(MOE, shared_expert_intermediate_size=64, norm_topk_prob=False),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig,
        dict(MOE, norm_topk_prob=True),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config,
        dict(n_embd=64, n_head=4, n_layer=3, n_positions=128, n_ctx=128),
    ),
}
# What GGUF has no words for, or llama.cpp leaves out.
IN_GGUF = {
    "mistral": dict(sliding_window=None),
    "phi3": dict(sliding_window=None),
    "gemma2": dict(query_pre_attn_scalar=16),
}


def uniform(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1): SplitMix64 of the FNV-1a hash of the name plus an index."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def weights(name: str, shape: tuple, plus_one: bool) -> np.ndarray:
    x = uniform(name, int(np.prod(shape)))
    if len(shape) > 1:
        scale = 1.0 if "embed" in name else 2.0 / np.sqrt(np.float32(shape[-1]))
        x = x * np.float32(scale)
    elif name.endswith("bias"):
        x = x * np.float32(0.5)
    else:
        x = x * np.float32(0.25) + np.float32(0.0 if plus_one else 1.0)
    return x.reshape(shape).astype(np.float32)


def answer(model, prompt: list) -> tuple:
    """The greedy answer, and by how much each token was ahead of the next best."""
    tokens, margins = list(prompt), []
    with torch.no_grad():
        for _ in range(ANSWER):
            last = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            best = torch.topk(last, 2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    return tokens, margins


def logits_of(model, prompt: list) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].double().numpy()


def rounded(logits: np.ndarray) -> list:
    return [[round(float(x), 5) for x in row] for row in logits]


def write(name: str, out: dict) -> None:
    (HERE / name).write_text(json.dumps(out, separators=(",", ":")) + "\n")


def convert(folder: pathlib.Path) -> pathlib.Path:
    """A GGUF file, by llama.cpp's converter, without a vocabulary."""
    import conversion
    import gguf
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(folder, False)
    of = conversion.get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    def set_vocab(self):
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(hparams.get("vocab_size"))

    of.set_vocab = set_vocab

    file = folder / "model.gguf"
    with torch.inference_mode():
        kind = gguf.LlamaFileType.ALL_F32
        of(folder, kind, file, eager=True, model_name="tiny").write()
    return file


def by_llama_cpp(file: pathlib.Path, prompt: list, vocab: int) -> np.ndarray:
    import llama_cpp.llama_cpp as ll

    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    params.use_mmap = False
    model = ll.llama_model_load_from_file(str(file).encode(), params)
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 128, 64, 64
    params.type_k = params.type_v = 0  # f32
    params.flash_attn_type = 0
    context = ll.llama_init_from_model(model, params)
    batch = ll.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for i, token in enumerate(prompt):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert ll.llama_decode(context, batch) == 0
    out = np.ctypeslib.as_array(ll.llama_get_logits(context), (len(prompt), vocab)).copy()
    ll.llama_free(context)
    ll.llama_model_free(model)
    return out.astype(np.float64)


def as_gguf(case: str, model, prompt: list) -> None:
    """What llama.cpp makes of the model."""
    import gguf

    for key, value in IN_GGUF.get(case, {}).items():
        setattr(model.config, key, value)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if case == "gpt2":
            config["n_ctx"] = config["n_positions"]
        (folder / "config.json").write_text(json.dumps(config))
        # The converter counts these, for some families.
        vocabulary = {"model": {"vocab": {str(i): i for i in range(config["vocab_size"])}}}
        (folder / "tokenizer.json").write_text(json.dumps({**vocabulary, "added_tokens": []}))
        file = convert(folder)
        data = file.read_bytes()
        reader = gguf.GGUFReader(file)
        logits = by_llama_cpp(file, prompt, config["vocab_size"])
    computed = {t.name: t.data.tolist() for t in reader.tensors if t.name.startswith("rope_")}
    head = data[: reader.data_offset]
    write(
        f"{case}.gguf.json",
        {
            "head": base64.b64encode(head).decode(),
            "bytes": len(data),
            "blake3": blake3.blake3(data).hexdigest(),
            "computed": computed,
            "logits": rounded(logits),
        },
    )


def main() -> None:
    sources, *wanted = sys.argv[1:]
    sys.path[:0] = [sources, sources + "/gguf-py"]
    logging.disable(logging.INFO)
    for case, (architecture, config_class, more) in CASES.items():
        if wanted and case not in wanted:
            continue
        config = config_class(**{**DIMS, **more})
        config.architectures = [architecture]
        config._attn_implementation = "eager"
        model = getattr(transformers, architecture)(config).float().eval()
        plus_one = case.startswith("gemma")
        shapes = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shapes[name] = list(parameter.shape)
                parameter.copy_(torch.from_numpy(weights(name, tuple(parameter.shape), plus_one)))
        # A prompt whose answer leaves no doubt at any token.
        for salt in range(1000):
            prompt = [int(abs(x) * 63) for x in uniform(f"{case} {salt}", PROMPT)]
            tokens, margins = answer(model, prompt)
            if min(margins) > 0.02:
                break
        logits = logits_of(model, prompt)
        out = {
            "transformers": transformers.__version__,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "plus_one": plus_one,
            "tensors": shapes,
            "prompt": prompt,
            "answer": tokens[PROMPT:],
            "least_margin": round(min(margins), 5),
            "logits": rounded(logits),
        }
        write(f"{case}.json", out)
        print(f"{case:10} least margin {min(margins):.4f}, logits {np.abs(logits).max():.2f}")
        as_gguf(case, model, prompt)


if __name__ == "__main__":
    main()
