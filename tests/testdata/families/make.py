#!/usr/bin/env python3
"""Makes the expected answers of `node/engine/tests/families.rs`.

For each family a small model with weights that both sides compute from the tensors' names, run by
Hugging Face `transformers` in f32. Needs `pip install torch transformers safetensors`:

    python3 make.py        # writes FAMILY.json beside itself
"""

import json
import pathlib

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
    if len(shape) == 2:
        scale = 1.0 if "embed" in name else 2.0 / np.sqrt(np.float32(shape[1]))
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


def main() -> None:
    for case, (architecture, config_class, more) in CASES.items():
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
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0].double().numpy()
        out = {
            "transformers": transformers.__version__,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "plus_one": plus_one,
            "tensors": shapes,
            "prompt": prompt,
            "answer": tokens[PROMPT:],
            "least_margin": round(min(margins), 5),
            "logits": [[round(float(x), 5) for x in row] for row in logits],
        }
        (HERE / f"{case}.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
        print(f"{case:8} least margin {min(margins):.4f}, logits {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
