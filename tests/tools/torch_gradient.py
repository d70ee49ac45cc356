#!/usr/bin/env python3
"""Gradients of CCA attention against PyTorch's autograd of the same mathematics, written naively.

    pip install torch numpy
    python tests/tools/torch_gradient.py build/release/tests/gradient_run

The output, the log-sum-exp and the gradients of query, key and value, for random operands and random gradients of both
results. The truth is autograd in double; the error (root of the mean square) may be twice that of autograd in float,
plus float rounding of the result: the rule of the other tests. Ends with 1 where it is more.
"""

import argparse
import subprocess
import sys

import numpy as np
import torch

POOLINGS = ["last_query", "mean", "max"]
CORE_HEADS = ["per_query_head", "per_kv_head"]
# batch, heads, kv heads, length, dim, value dim, group size, window
SIZES = [
    (2, 4, 4, 70, 16, 16, 4, 11),
    (1, 6, 2, 131, 24, 40, 7, 20),
    (1, 8, 1, 200, 64, 64, 16, 33),
    (1, 2, 2, 90, 8, 5, 1, 10),  # groups of one: dense attention
    (1, 2, 1, 50, 8, 8, 3, 50),  # a window of everything: dense attention
]


def pool(query, key, value, group_size, pooling, cores):
    """[batch, heads, groups, dim] of keys and values, with as many heads as there are cores for."""
    groups = key.shape[2] // group_size
    if pooling == "last_query" and cores == "per_query_head":
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    grouped_key, grouped_value = (
        x[:, :, : groups * group_size].unflatten(2, (groups, group_size)) for x in (key, value)
    )
    if pooling == "mean":
        return grouped_key.mean(3), grouped_value.mean(3)
    if pooling == "max":
        return grouped_key.max(3).values, grouped_value.max(3).values
    last = query[:, :, group_size - 1 :: group_size][:, :, :groups]
    last = last.unflatten(1, (key.shape[1], -1)).mean(2)  # of the query heads that share the cores
    logits = torch.einsum("bhcd,bhcjd->bhcj", last, grouped_key) / key.shape[3] ** 0.5
    weights = logits.softmax(3)
    return (torch.einsum("bhcj,bhcjd->bhcd", weights, x) for x in (grouped_key, grouped_value))


def attention(query, key, value, group_size, window, pooling, cores):
    """Output and log-sum-exp: one softmax over the cores before the window, and the tokens from there on."""
    length = key.shape[2]
    core_key, core_value = pool(query, key, value, group_size, pooling, cores)
    keys, values = (
        torch.cat([x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in parts], 2)
        for parts in ((core_key, key), (core_value, value))
    )
    t = torch.arange(length)[:, None]
    count = ((t + 1 - window) // group_size).clamp(min=0)
    token = torch.arange(length)
    sees = torch.cat([torch.arange(core_key.shape[2]) < count, (token >= count * group_size) & (token <= t)], 1)
    logits = (query @ keys.transpose(2, 3) / key.shape[3] ** 0.5).masked_fill(~sees, -torch.inf)
    return logits.softmax(3) @ values, logits.logsumexp(3, keepdim=True)


def autograd(arrays, dtype, *options):
    query, key, value, grad_out, grad_lse = (torch.tensor(x, dtype=dtype) for x in arrays)
    operands = [x.requires_grad_() for x in (query, key, value)]
    results = attention(*operands, *options)
    gradients = torch.autograd.grad(results, operands, (grad_out, grad_lse))
    return [x.detach().double().numpy() for x in (*results, *gradients)]


def run(program, arrays, sizes, pooling, cores):
    names = ["batch", "heads", "kv_heads", "length", "dim", "value_dim", "group_size", "window"]
    arguments = [f"{name}={size}" for name, size in zip(names, sizes, strict=True)]
    arguments += [f"pool={pooling}", f"core_heads={cores}"]
    answer = subprocess.run(
        [program, *arguments], input=b"".join(x.tobytes() for x in arrays), capture_output=True, check=True
    ).stdout
    query, key, value, grad_out, grad_lse = (x.shape for x in arrays)
    shapes = [grad_out, grad_lse, query, key, value]
    flat = np.frombuffer(answer, np.float32)
    parts = np.split(flat, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape).astype(np.float64) for part, shape in zip(parts, shapes, strict=True)]


def rms(x):
    return np.sqrt(np.mean(x**2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gradient_run, built beside the tests")
    program = parser.parse_args().program

    random = np.random.default_rng(1)
    failures = 0
    print(f"{'error over that of autograd in float':57}  out   lse query   key value")
    for sizes in SIZES:
        batch, heads, kv_heads, length, dim, value_dim, group_size, window = sizes
        for pooling in POOLINGS:
            for cores in CORE_HEADS if pooling == "last_query" else CORE_HEADS[:1]:
                shapes = [
                    (batch, heads, length, dim),
                    (batch, kv_heads, length, dim),
                    (batch, kv_heads, length, value_dim),
                    (batch, heads, length, value_dim),
                    (batch, heads, length, 1),
                ]
                arrays = [random.standard_normal(shape, np.float32) for shape in shapes]
                options = (group_size, window, pooling, cores)
                truth = autograd(arrays, torch.float64, *options)
                naive = autograd(arrays, torch.float32, *options)
                ours = run(program, arrays, sizes, pooling, cores)
                ratios = []
                for exact, textbook, kernel in zip(truth, naive, ours, strict=True):
                    error = rms(kernel - exact)
                    allowed = 2 * rms(textbook - exact) + np.finfo(np.float32).eps * rms(exact)
                    failures += not error <= allowed  # NaN fails
                    ratios.append(error / rms(textbook - exact))
                row = f"{heads}/{kv_heads} heads, {length} tokens, g {group_size}, s {window}: {pooling}"
                row += f" {cores}" if pooling == "last_query" else ""
                print(f"{row:57}" + "".join(f" {ratio:5.2f}" for ratio in ratios))
    print("agrees" if not failures else f"{failures} results do not agree")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
