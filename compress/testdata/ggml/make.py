#!/usr/bin/env python3
"""Writes the files of this folder: fixed weights, and the blocks that ggml's own quantisers make of them.

usage: make.py LIBGGML_BASE.so     (of a llama.cpp built with benches/peers/llama_cpp.sh); needs numpy
"""

import ctypes
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
COLUMNS = 512
TYPES = {"q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q8_0": (8, 32, 34),
         "q4_k": (12, 256, 144), "q6_k": (14, 256, 210)}


def weights(random):
    """Rows of several kinds, as they are in models: normal, with heavy tails, with some large columns,
    to one side, nearly empty, on a grid."""
    shape = (2, COLUMNS)
    normal = random.standard_normal(shape) * 0.03
    tails = random.standard_t(3, shape) * 0.02
    columns = random.standard_normal(shape) * 0.03 * np.where(np.arange(COLUMNS) % 61 == 7, 12, 1)
    aside = random.standard_normal(shape) * 0.02 + 0.05
    empty = np.where(random.random(shape) < 0.8, 0, random.standard_normal(shape) * 0.1)
    grid = np.round(random.standard_normal(shape) * 4) * 0.0123
    return np.concatenate([normal, tails, columns, aside, empty, grid]).astype("<f4")


def main():
    base = ctypes.CDLL(sys.argv[1])
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    random = np.random.default_rng(20260117)
    rows = weights(random)
    importance = np.exp(random.standard_normal(COLUMNS) * 1.5).astype("<f4")
    (HERE / "weights.f32").write_bytes(rows.tobytes())
    (HERE / "importance.f32").write_bytes(importance.tobytes())
    for name, (number, block, size) in TYPES.items():
        for suffix, given in [("", None), (".importance", importance.ctypes.data)]:
            if given is not None and name == "q8_0":
                continue  # It takes no notice.
            out = np.zeros(rows.size // block * size, np.uint8)
            done = base.ggml_quantize_chunk(number, rows.ctypes.data, out.ctypes.data, 0, len(rows), COLUMNS, given)
            assert done == out.size, (name, done, out.size)
            (HERE / f"{name}{suffix}.bin").write_bytes(out.tobytes())


main()
