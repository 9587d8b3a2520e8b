#!/usr/bin/env python3
"""How far logits are from exact ones: ours, and those of llama.cpp, on the same quantised file.

Both engines round activations to eight bits before they multiply them with quantised weights, so neither
is exact, and they differ from each other by both errors. With floats nothing is rounded: the same
weights, dequantised to F32, tell what is exact (and both engines agree there).

usage: logits.py MILLRACE FILE.gguf TEXT.txt [LIBRARY]
needs: pip install numpy llama-cpp-py-sync; LIBRARY is another file with llama.cpp in it, about as old as
that module, where the module's own does not load
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

MILLRACE, FILE, TEXT, *LIBRARY = sys.argv[1:]
# Logits that are compared: the best of the exact ones, at every position.
BEST = 10
ffi = get_ffi()
ll = ffi.dlopen(LIBRARY[0]) if LIBRARY else get_lib()


@ffi.callback("ggml_log_callback")
def silent(*_):
    pass


class Peer:
    """llama.cpp with one model: K and V as f16, as ours keeps them."""

    def __init__(self, file):
        self.model = ll.llama_model_load_from_file(str(file).encode(), ll.llama_model_default_params())
        self.vocab = ll.llama_model_get_vocab(self.model)

    def tokens(self, text):
        out = ffi.new("int32_t[4096]")
        raw = text.encode()
        return list(out[0 : ll.llama_tokenize(self.vocab, raw, len(raw), out, 4096, False, True)])

    def logits(self, tokens):
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
        params.flash_attn_type = 0  # off
        context = ll.llama_init_from_model(self.model, params)
        batch = ll.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert ll.llama_decode(context, batch) == 0
        vocab = ll.llama_vocab_n_tokens(self.vocab)
        raw = ffi.buffer(ll.llama_get_logits(context), len(tokens) * vocab * 4)
        out = np.frombuffer(raw, np.float32).reshape(-1, vocab).astype(np.float64)
        ll.llama_free(context)
        return out


def own(file, tokens):
    """Ours: of each position, the 64 largest, by id."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as ids:
        json.dump(tokens, ids)
        ids.flush()
        command = [MILLRACE, "eval", "logits", "--model", str(file), "--token-ids", ids.name, "--top", "64", "-o", "json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [dict(map(tuple, top)) for top in json.loads(done.stdout)["top"]]


def told(name, differences):
    flat = np.concatenate(differences)
    print(f"| {name} | {np.sqrt(np.mean(flat**2)):.4f} | {np.abs(flat).max():.4f} |")


def main():
    ll.llama_log_set(silent, ffi.NULL)
    ll.llama_backend_init()
    peer = Peer(FILE)
    tokens = peer.tokens(pathlib.Path(TEXT).read_text())[:512]
    with tempfile.TemporaryDirectory() as folder:
        floats = pathlib.Path(folder) / "floats.gguf"
        step = "method = 'quantise', type = 'f32', output = 'f32'"
        subprocess.run([MILLRACE, "compress", "apply", FILE, floats, step], check=True, capture_output=True)
        theirs, their_exact = peer.logits(tokens), Peer(floats).logits(tokens)
        ours, our_exact = own(FILE, tokens), own(floats, tokens)
    rows = {"ours - exact": [], "llama.cpp - exact": [], "ours - llama.cpp": [], "exact: ours - llama.cpp": []}
    for i, exact in enumerate(our_exact):
        best = [id for id in sorted(exact, key=exact.get, reverse=True)[:BEST] if id in ours[i]]
        a, e = (np.array([d[i][id] for id in best]) for d in (ours, our_exact))
        b, f = theirs[i][best], their_exact[i][best]
        for name, d in zip(rows, [a - e, b - f, a - b, e - f]):
            rows[name].append(d)
    print(f"{pathlib.Path(FILE).name}: {len(tokens)} positions, the {BEST} best logits of each\n")
    print("| difference | rms | largest |\n|---|---|---|")
    for name, differences in rows.items():
        told(name, differences)


main()
