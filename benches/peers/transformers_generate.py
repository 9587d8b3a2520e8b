#!/usr/bin/env python3
"""Speeds of `transformers` on models of random weights: decode steps at several batches, a prefill.

Usage: transformers_generate.py DEVICE SHAPE…   (shapes as `benches/gpu.sh` has them)
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "8b": (32, 4096, 32, 8, 14336, 128256),
    "135m": (30, 576, 9, 3, 1536, 49152),
    "tiny": (2, 256, 4, 2, 512, 1024),
}
CONTEXT = 512


def fastest(work, device, runs=5):
    """Seconds of the fastest run."""
    best = float("inf")
    for turn in range(runs + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - start)
    return best


def main():
    device = torch.device(sys.argv[1])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print("| model | test | tokens/s |\n|---|---|---|")
    for name in sys.argv[2:]:
        layers, hidden, heads, kv_heads, ffn, vocab = SHAPES[name]
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=ffn, vocab_size=vocab,
            max_position_embeddings=8192, tie_word_embeddings=name != "8b",
        )
        torch.set_default_dtype(dtype)
        with torch.device(device), torch.no_grad():
            model = LlamaForCausalLM(config).eval()
            for batch in (1, 8, 64):
                prompt = torch.randint(vocab, (batch, CONTEXT))
                many = 16

                def generate(new):
                    model.generate(prompt, max_new_tokens=new, min_new_tokens=new,
                                   do_sample=False, pad_token_id=0)

                # The prompt's time is taken out.
                one = fastest(lambda: generate(1), device, 2)
                all_ = fastest(lambda: generate(1 + many), device, 2)
                rate = batch * many / (all_ - one)
                print(f"| {name} | decode, batch {batch}, context {CONTEXT} | {rate:.1f} |")
            tokens = 128 if name == "tiny" else 2048
            prompt = torch.randint(vocab, (1, tokens))
            seconds = fastest(lambda: model(prompt, logits_to_keep=1), device)
            print(f"| {name} | prefill {tokens} | {tokens / seconds:.1f} |")
        del model


if __name__ == "__main__":
    main()
