#!/usr/bin/env python3
"""What a layer's attention takes from Python, beside the same calls in a C++ program, taking turns on the same numbers.

    pip install ./examples/python torch transformers
    cmake -S . -B build/release -D CMAKE_BUILD_TYPE=Release && cmake --build build/release --target cca_run
    python examples/python/beside_cpp.py build/release/bench/cca_run

The layer is one of SmolLM2-135M: 9 query heads on 3 key/value heads of 64. `prefill` is the attention inside of a layer of
transformers with attn_implementation="cca", `step` is cca.attention and its backward() of tensors that lie in memory as the
program's do, `step-blhd` of those that a layer of PyTorch has, [batch, length, heads, dim] in memory. Before anything is
timed the results are compared. Says the median seconds of the rounds, and the median of their ratios.
"""

import argparse
import functools
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import transformers
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import cca
import cca.hf

HEADS, KV_HEADS, DIM = 9, 3, 64
OPTIONS = {"group_size": 16, "window": 1024}


class Program:
    """cca_run, which answers lines."""

    def __init__(self, path, folder, length, threads, **more):
        sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "length": length, "dim": DIM, "threads": threads}
        sizes |= {"group": OPTIONS["group_size"], "window": OPTIONS["window"], "directory": folder, **more}
        command = [path, *(f"{name}={x}" for name, x in sizes.items())]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.built = self.answer().strip()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            sys.exit(f"{self.process.args[0]} ended with {status}: {self.errors.read().strip()}")
        return line

    def ask(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()

    def seconds(self):
        return float(self.ask("run").split('"seconds": ')[1].split(",")[0])


def of_a_layer(length):
    """(operands of the attention of a layer of transformers, a call that returns its output and seconds)"""
    taken = {}

    def timed(module, query, key, value, mask, **more):
        start = time.perf_counter()
        out = cca.hf.attention_forward(module, query, key, value, mask, **more)
        taken.update(seconds=time.perf_counter() - start, operands=(query, key, value), out=out[0].transpose(1, 2))
        return out

    cca.hf.register()
    AttentionInterface.register("cca", timed)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=length, attn_implementation="cca",
    )  # fmt: skip
    config.cca = OPTIONS
    model = LlamaModel(config).eval()
    hidden = torch.randn(1, length, HEADS * DIM)

    def call():
        with torch.no_grad():
            model(inputs_embeds=hidden, use_cache=False)
        return [taken["out"]], taken["seconds"]

    call()
    return taken["operands"], call


def of_a_step(length, interleaved=False):
    """The same of cca.attention and its backward(), with the gradient that comes in behind the operands."""
    torch.manual_seed(1)

    def make(heads):
        x = torch.randn(1, heads, length, DIM)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if interleaved else x

    query, key, value, grad = (make(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    operands = [x.requires_grad_() for x in (query, key, value)]

    def call():
        start = time.perf_counter()
        gradients = torch.autograd.grad(cca.attention(*operands, **OPTIONS), operands, grad)
        return gradients, time.perf_counter() - start

    return (*operands, grad), call


_GRADIENTS = {"gradient": 1}, ["grad_query", "grad_key", "grad_value"]
CASES = {
    "prefill": (of_a_layer, 8192, {}, ["out"]),
    "step": (of_a_step, 16384, *_GRADIENTS),
    "step-blhd": (functools.partial(of_a_step, interleaved=True), 16384, *_GRADIENTS),
}


def compare(program, case, length, threads, rounds):
    make, usual, more, results = CASES[case]
    length = length or usual
    with tempfile.TemporaryDirectory() as folder:
        operands, call = make(length)
        for name, x in zip(("query", "key", "value", "grad_out"), operands):
            x.detach().contiguous().numpy().tofile(pathlib.Path(folder, name))
        peer = Program(program, folder, length, threads, **more)
        ours, _ = call()
        peer.seconds()
        peer.ask("write")
        for name, x in zip(results, ours):
            theirs = np.fromfile(pathlib.Path(folder, name), np.float32).reshape(x.shape)
            error = np.abs(theirs - x.detach().numpy()).max() / np.abs(theirs).max()
            if not error < 1e-5:
                sys.exit(f"{case}: {name} differs by {error:.1e} of its largest element")
        times = [(call()[1], peer.seconds()) for _ in range(rounds)]
        peer.process.communicate()
    python, cpp = (statistics.median(x) for x in zip(*times))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{case:10} {length:7} {python:12.3f} {cpp:12.3f} {ratio:8.3f}   C++: {peer.built}", flush=True)
    return ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="cca_run, of bench/")
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--length", type=int, help="8192 for prefill, 16384 for a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=float, help="ends with 1 where a ratio is larger")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{HEADS} heads on {KV_HEADS} of {DIM}, {OPTIONS}, {args.threads} threads, medians of {args.rounds} rounds")
    print(f"{cca.architecture()}, Python {platform.python_version()}, PyTorch {torch.__version__}, ", end="")
    print(
        f"transformers {transformers.__version__}\n\n{'':10} {'tokens':>7} {'Python, s':>12} {'C++, s':>12} {'ratio':>8}"
    )
    ratios = [compare(args.program, case, args.length, args.threads, args.rounds) for case in args.case]
    sys.exit(args.most is not None and max(ratios) > args.most)


if __name__ == "__main__":
    main()
