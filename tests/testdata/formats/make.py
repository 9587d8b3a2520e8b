#!/usr/bin/env python3
"""Makes the checkpoints of `node/engine/tests/formats.rs`, and what they must mean.

One small Llama of one layer in every way that published checkpoints quantise matrices, packed here by
the conventions of the libraries that write them, and run by Hugging Face `transformers` in f32 with
the weights dequantised. Needs `pip install numpy torch transformers safetensors`:

    python3 make.py        # writes NAME/ and NAME.json beside itself
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
CONFIG = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    num_hidden_layers=1,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
GPTQ = dict(quant_method="gptq", bits=4)
FP8 = dict(quant_method="fp8", activation_scheme="dynamic")
COMPRESSED = dict(
    quant_method="compressed-tensors",
    format="float-quantized",
    ignore=["lm_head"],
    config_groups=dict(
        group_0=dict(
            targets=["Linear"],
            weights=dict(num_bits=8, type="float", strategy="channel", symmetric=True),
        )
    ),
)
CASES = {
    "gptq-asym-32": dict(GPTQ, group_size=32, desc_act=False, sym=False),
    "gptq-v2-all": dict(
        GPTQ, group_size=-1, desc_act=False, sym=True, checkpoint_format="gptq_v2"
    ),
    "gptq-act-32": dict(GPTQ, group_size=32, desc_act=True, sym=False),
    "awq-32": dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True),
    "fp8-tensor": FP8,
    "fp8-block": dict(FP8, weight_block_size=[128, 128]),
    "fp8-channel": COMPRESSED,
}
# The output whose quant is in nibble i of a word of AWQ.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def integers(stem: str, weight: np.ndarray, how: dict, rng) -> tuple:
    """Tensors of a matrix [outputs, inputs] in four bits, and what they mean."""
    rows, cols = weight.shape
    size = cols if how["group_size"] == -1 else how["group_size"]
    count = cols // size
    group = np.arange(cols) // size
    if how.get("desc_act"):
        group = rng.permutation(group)
    scales = np.zeros((count, rows), np.float16)
    zeros = np.zeros((count, rows), np.int64)
    quants = np.zeros((rows, cols), np.int64)
    for g in range(count):
        part = weight[:, group == g]
        low, high = part.min(axis=1), part.max(axis=1)
        if how.get("sym"):
            top = np.abs(part).max(axis=1)
            low, high = -top, top
        scales[g] = ((high - low) / 15).astype(np.float16)
        step = scales[g].astype(np.float32)
        first = 1 if how.get("checkpoint_format", "gptq") == "gptq" else 0
        zeros[g] = 8 if how.get("sym") else np.clip(np.round(-low / step), first, 15)
        q = np.round(part / step[:, None]) + zeros[g][:, None]
        quants[:, group == g] = np.clip(q, 0, 15)
    means = scales.astype(np.float32)[group].T * (quants - zeros[group].T).astype(np.float32)
    tensors = {f"{stem}.scales": torch.from_numpy(scales)}
    if how["quant_method"] == "awq":
        words = np.zeros((cols, rows // 8), np.uint64)
        zero_words = np.zeros((count, rows // 8), np.uint64)
        for i, output in enumerate(AWQ_ORDER):
            words |= quants.T[:, output::8].astype(np.uint64) << np.uint64(4 * i)
            zero_words |= zeros[:, output::8].astype(np.uint64) << np.uint64(4 * i)
    else:
        stored = zeros if how.get("checkpoint_format") == "gptq_v2" else zeros - 1
        words = np.zeros((cols // 8, rows), np.uint64)
        zero_words = np.zeros((count, rows // 8), np.uint64)
        for i in range(8):
            words |= quants.T[i::8].astype(np.uint64) << np.uint64(4 * i)
            zero_words |= stored[:, i::8].astype(np.uint64) << np.uint64(4 * i)
        tensors[f"{stem}.g_idx"] = torch.from_numpy(group.astype(np.int32))
        # AutoGPTQ writes them, and they are zeros.
        tensors[f"{stem}.bias"] = torch.zeros(rows, dtype=torch.float16)
    tensors[f"{stem}.qweight"] = int32(words)
    tensors[f"{stem}.qzeros"] = int32(zero_words)
    return tensors, means


def floats(stem: str, weight: np.ndarray, how: dict) -> tuple:
    """Tensors of a matrix in eight-bit floats, and what they mean."""
    rows, cols = weight.shape
    top = torch.finfo(torch.float8_e4m3fn).max
    w = torch.from_numpy(weight)
    name = "weight_scale"
    if how.get("weight_block_size"):
        name = "weight_scale_inv"
        scale = torch.zeros(-(-rows // 128), -(-cols // 128))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                tile = w[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
                scale[i, j] = tile.abs().max() / top
        full = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    elif how is FP8:
        scale = w.abs().max().reshape(()) / top
        full = scale.expand(rows, cols)
    else:
        scale = (w.abs().amax(dim=1, keepdim=True) / top).to(torch.bfloat16)
        full = scale.float().expand(rows, cols)
    quants = (w / full).clamp(-top, top).to(torch.float8_e4m3fn)
    tensors = {f"{stem}.weight": quants, f"{stem}.{name}": scale.contiguous()}
    return tensors, (quants.float() * full).numpy()


def crc32c(data: bytes) -> int:
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def main() -> None:
    for case, how in CASES.items():
        rng = np.random.default_rng(sum(case.encode()))
        config = transformers.LlamaConfig(**CONFIG)
        config.architectures = ["LlamaForCausalLM"]
        config._attn_implementation = "eager"
        model = transformers.LlamaForCausalLM(config).float().eval()
        tensors, sums = {}, {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shape = tuple(parameter.shape)
                if len(shape) == 1:
                    weight = (1 + 0.25 * rng.uniform(-1, 1, shape)).astype(np.float16)
                else:
                    size = 1.0 if "embed" in name else 2.0 / np.sqrt(shape[1])
                    weight = (size * rng.uniform(-1, 1, shape)).astype(np.float16)
                stem = name.removesuffix(".weight")
                if "_proj" not in name:
                    tensors[name] = torch.from_numpy(weight)
                    means = weight.astype(np.float32)
                elif "group_size" in how:
                    more, means = integers(stem, weight.astype(np.float32), how, rng)
                    tensors.update(more)
                else:
                    more, means = floats(stem, weight.astype(np.float32), how)
                    tensors.update(more)
                if "_proj" in name:
                    # As the engine reads them.
                    half = how.get("desc_act") or "group_size" not in how
                    read = means.astype(np.float16).astype(np.float32) if half else means
                    # Minus zero is zero.
                    sums[name] = crc32c((read + np.float32(0)).astype("<f4").tobytes())
                parameter.copy_(torch.from_numpy(means.astype(np.float32)))
        prompt = [int(x) for x in rng.integers(0, 64, 24)]
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0].double().numpy()
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        stated = json.loads(config.to_json_string(use_diff=False))
        (folder / "config.json").write_text(
            json.dumps({**stated, "quantization_config": how}, separators=(",", ":")) + "\n"
        )
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        out = {
            "transformers": transformers.__version__,
            "prompt": prompt,
            "sums": sums,
            "logits": [[round(float(x), 5) for x in row] for row in logits],
        }
        (HERE / f"{case}.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
        print(f"{case:14} logits {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
