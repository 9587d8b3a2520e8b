"""Compressed files as llama.cpp's own Python package reads them: the same tensors, of the same values."""

import os
import pathlib
import re
import subprocess
import tempfile

import gguf
import numpy as np
import pytest

MODEL = os.environ.get("MILLRACE_TEST_MODEL") or "smollm2:135m"
FLOATS = "method = 'quantise', type = 'f32', output = 'f32'"
WANDA_TILES = "method = 'wanda', sparsity = 0.5, pattern = 'tile'"
# Each with the steps that make it.
KINDS = {
    "q8_0": ["method = 'quantise', type = 'q8_0'"],
    "q6_k": ["method = 'quantise', type = 'q6_k'"],
    "q4_k with importance": ["method = 'quantise', type = 'q4_k', importance = true"],
    "q4_1": ["method = 'quantise', type = 'q4_1'"],
    "q4_0": ["method = 'quantise', type = 'q4_0'"],
    "q5_0 beside q8_0": ["method = 'quantise', type = 'q5_0', output = 'q8_0'"],
    "int8": ["method = 'int8'"],
    "tiles and back": [WANDA_TILES, "method = 'storage'", "method = 'storage', form = 'dense'"],
    "fewer layers": ["method = 'drop-layers', count = 2"],
    "fewer heads": ["method = 'drop-heads', count = 1"],
    "narrower": ["method = 'width', hidden = 512"],
}


@pytest.fixture
def folder():
    """One that goes with its gigabytes when the test is over, which pytest's own does not."""
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)


def compressed(folder, source, steps):
    """A model made of another by some steps."""
    for i, step in enumerate(steps):
        target = folder / f"{len(list(folder.iterdir()))}.gguf"
        command = [os.environ["MILLRACE_BIN"], "compress", "apply", str(source), str(target), step]
        command += ["--calibration-tokens", "512"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        source = target
    return source


def values(tensor):
    """What a tensor holds, by llama.cpp's rules."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_read_what_was_made(kind, folder):
    made = compressed(folder, MODEL, KINDS[kind])
    reader = gguf.GGUFReader(made)
    ours = {t.name: t for t in gguf.GGUFReader(compressed(folder, made, [FLOATS])).tensors}
    assert {t.name for t in reader.tensors} == set(ours)
    for tensor in reader.tensors:
        same = np.array_equal(values(tensor), values(ours[tensor.name]))
        assert same, f"{tensor.name}, {tensor.tensor_type.name}"
    check_shapes(reader)


def check_shapes(reader):
    """Names and shapes are what llama.cpp expects of the architecture."""
    number = lambda key: int(reader.fields[key].contents())
    layers, hidden = number("llama.block_count"), number("llama.embedding_length")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for tensor in reader.tensors:
        assert known.get_name(tensor.name, try_suffixes=(".weight",)) == tensor.name, tensor.name
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    heads, dim = number("llama.attention.head_count"), hidden // number("llama.attention.head_count")
    if "llama.attention.key_length" in reader.fields:
        dim = number("llama.attention.key_length")
    wanted = {"attn_q": (hidden, heads * dim), "attn_output": (heads * dim, hidden)}
    wanted["attn_k"] = (hidden, number("llama.attention.head_count_kv") * dim)
    wanted["ffn_down"] = (number("llama.feed_forward_length"), hidden)
    for layer in range(layers):
        for name, shape in wanted.items():
            assert shapes[f"blk.{layer}.{name}.weight"] == shape
    last = max(int(m.group(1)) for name in shapes if (m := re.match(r"blk\.(\d+)\.", name)))
    assert last == layers - 1
