#!/usr/bin/env python3
"""What a call from Python costs above the same call in C, of 64 tokens and one head.

    pip install ./examples/python torch
    python examples/python/overhead.py

The C function, with its structure filled in beforehand, and a way of calling it take turns call by call, so that neither
finds the caches warmer than the other; says the medians in us. What a call by ctypes costs by itself is counted to Python.
"""

import argparse
import ctypes
import platform
import statistics
import time

import numpy as np
import torch

import cca
from cca import _library

OPTIONS = {"group_size": 4, "window": 16}


class Forward:
    """cca_attention of arrays, with nothing left to do but to call it."""

    function = _library.library.cca_attention

    def __init__(self, read, written):
        self.kept = [read, written, _library.options_of(OPTIONS)]
        self.call = _library.Call(ctypes.sizeof(_library.Call), threads=1, options=ctypes.addressof(self.kept[2]))
        for names, is_written in ((read, False), (written, True)):
            for name, x in names.items():
                tensor = _library.Tensor()
                self.kept += [tensor, _library.export(x, name, is_written, ctypes.addressof(tensor))]
                setattr(self.call, name, ctypes.addressof(tensor))
        self.address = ctypes.addressof(self.call)

    def __call__(self):
        _library.check(self.function(self.address))


class Gradient(Forward):
    function = _library.library.cca_attention_gradient


class Nothing(torch.autograd.Function):
    """What PyTorch takes by itself to make the results of a call and to remember it."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        raise NotImplementedError


def cases(length, heads, dim):
    """{name: (the call, the C call that it is compared with)}"""
    rng = np.random.default_rng(0)
    q, k, v, grad = (rng.normal(size=(1, heads, length, dim)).astype(np.float32) for _ in range(4))
    out, lse = np.empty_like(q), np.empty(q.shape[:3], np.float32)
    inputs = {"query": q, "key": k, "value": v}
    in_c = Forward(inputs, {"out": out})
    in_c()
    with_lse = Forward(inputs, {"out": out, "lse": lse})
    with_lse()
    gradients = {"grad_" + name: np.empty_like(q) for name in inputs}
    back_in_c = Gradient(inputs | {"out": out, "lse": lse, "grad_out": grad}, gradients)
    t = [torch.from_numpy(x) for x in (q, k, v)]
    out_of_torch, grad_of_torch = torch.empty_like(t[0]), torch.from_numpy(grad)
    wanted = [x.clone().requires_grad_() for x in t]
    answer = cca.attention(*wanted, **OPTIONS)

    def without_gradients():
        with torch.no_grad():
            cca.attention(*t, **OPTIONS)

    return {
        "NumPy, out given": (lambda: cca.attention(q, k, v, out=out, **OPTIONS), in_c),
        "NumPy": (lambda: cca.attention(q, k, v, **OPTIONS), in_c),
        "PyTorch, out given": (lambda: cca.attention(*t, out=out_of_torch, **OPTIONS), in_c),
        "PyTorch": (lambda: cca.attention(*t, **OPTIONS), in_c),
        "PyTorch, no_grad() entered for it": (without_gradients, in_c),
        "PyTorch, gradients wanted": (lambda: cca.attention(*wanted, **OPTIONS), with_lse),
        "PyTorch, backward": (
            lambda: torch.autograd.grad(answer, wanted, grad_of_torch, retain_graph=True),
            back_in_c,
        ),
    }


def microseconds(call):
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def turns(call, in_c, count):
    """Medians of a call, of that in C, and of their difference."""
    times = [(microseconds(call), microseconds(in_c)) for _ in range(count)]
    ours, theirs = zip(*times)
    return [statistics.median(x) for x in (ours, theirs, [a - b for a, b in times])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument(
        "--most", type=float, help="ends with 1 where a forward call costs more above C than so many us"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{args.length} tokens, {args.heads} heads of {args.dim}; {cca.architecture()}, Python",
        platform.python_version(),
    )
    print(
        f"cca {cca.__version__}, PyTorch {torch.__version__}, NumPy {np.__version__}; us, medians of {args.calls} calls\n"
    )

    everything = cases(args.length, args.heads, args.dim)
    foreign, nothing, _ = turns(lambda: _library.library.cca_cache_free(None), lambda: None, args.calls)
    foreign -= nothing
    print(f"{'':34} {'call':>7} {'in C':>7} {'above':>7}")
    worst = 0
    wanted = [torch.zeros(1, args.heads, args.length, args.dim).requires_grad_() for _ in range(3)]
    nothing, _, _ = turns(lambda: Nothing.apply(*wanted), everything["PyTorch"][1], args.calls)
    print(f"{'an empty autograd.Function':34} {nothing:7.1f}")
    for name, calls in everything.items():
        turns(*calls, args.calls // 10)
        ours, in_c, above = turns(*calls, args.calls)
        worst = max(worst, above + foreign if "backward" not in name else 0)
        print(f"{name:34} {ours:7.1f} {in_c - foreign:7.1f} {above + foreign:7.1f}")
    raise SystemExit(args.most is not None and worst > args.most)


if __name__ == "__main__":
    main()
