#!/usr/bin/env python3
"""Forward and backward pass, ours beside PyTorch's dense attention, one thread, the same data, taking turns in one run.

    python bench/compare_gradient.py --build build/release [--length 16384] [--rounds 5]

Before anything is timed the gradients are compared: those of dense attention with PyTorch's at the full length, those of
CCA attention with PyTorch's autograd through an explicit mask over concatenated cores and keys at 2048 tokens.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from compare import DIM, GROUP, WINDOW, Contestant, torch_causal, torch_masked_cca

PEERS = {"torch causal": torch_causal, "torch masked CCA": torch_masked_cca}
GRADIENTS = ("grad_query", "grad_key", "grad_value")


def work(peer, directory, length):
    """The process of a peer."""
    import torch

    torch.set_num_threads(1)
    query, key, value, grad_out = (
        torch.from_numpy(np.fromfile(directory / name, np.float32)).view(1, 1, length, DIM)
        for name in ("query", "key", "value", "grad_out")
    )
    operands = [x.requires_grad_() for x in (query, key, value)]
    grads = None
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for command in sys.stdin:
        answer = {}
        if command.strip() == "write":
            for name, grad in zip(GRADIENTS, grads):
                grad.numpy().tofile(directory / name)
        else:
            grads = None
            start, thread_start = time.perf_counter(), time.thread_time()
            grads = torch.autograd.grad(PEERS[peer](torch, *operands)(), operands, grad_out)
            answer = {"seconds": time.perf_counter() - start, "thread_seconds": time.thread_time() - thread_start}
        print(json.dumps(answer), flush=True)


def ours(build, kind, directory, length):
    group = [f"group={GROUP}", f"window={WINDOW}"] if kind == "cca" else []
    command = [f"{build}/bench/cca_run", f"kind={kind}", f"length={length}", f"dim={DIM}", *group, "gradient=1"]
    return Contestant("cca" if kind == "cca" else "cca dense", [*command, f"directory={directory}"])


def peer(name, directory, length):
    return Contestant(name, [sys.executable, __file__, "--worker", name, str(directory), str(length)])


def gradients(contestant, directory):
    contestant.run()
    contestant.ask("write")
    return [np.fromfile(directory / name, np.float32) for name in GRADIENTS]


def require_equal(a, b, directory):
    for name, x, y in zip(GRADIENTS, gradients(a, directory), gradients(b, directory)):
        error = float(np.abs(x - y).max() / np.abs(y).max())
        print(f"{a.name} and {b.name}: {name} differs by at most {error:.1e} of its largest element")
        if not error < 1e-4:
            sys.exit("the gradients differ")


def write_operands(directory, length):
    random = np.random.default_rng(1)
    for name in ("query", "key", "value", "grad_out"):
        random.standard_normal((length, DIM), np.float32).tofile(directory / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/release", help="where cca_run was built")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker[0], Path(arguments.worker[1]), int(arguments.worker[2]))

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_operands(directory, 2048)
        require_equal(ours(arguments.build, "cca", directory, 2048), peer("torch masked CCA", directory, 2048), directory)

        write_operands(directory, arguments.length)
        cca = ours(arguments.build, "cca", directory, arguments.length)
        dense = ours(arguments.build, "dense", directory, arguments.length)
        torch = peer("torch causal", directory, arguments.length)
        require_equal(dense, torch, directory)
        for _ in range(arguments.rounds):
            for contestant in (cca, dense, torch):
                contestant.run()
        for contestant in (cca, dense, torch):
            best = min(contestant.times)
            print(f"{contestant.name}: {best:.3f} s forward and backward, {min(torch.times) / best:.2f} times as fast as PyTorch")


if __name__ == "__main__":
    main()
