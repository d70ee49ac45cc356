#!/usr/bin/env python3
"""One step of decoding, ours and PyTorch's, one thread, taking turns in one run.

    python bench/compare_decode.py --build build/release

Ours is a step through a CCA cache (append, pool, answer) after `length` tokens, g = 16, s = 1024, and beside it our own
dense step; PyTorch's is `scaled_dot_product_attention` of one query over all keys. 8 heads, D = 128, float. The best turn
of each counts. Both results are checked against double precision before they are timed: ours in `cca_bench`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HEADS, DIM = 8, 128


def turn_of_ours(program, length):
    """Seconds of a step through the cache, and of a dense one."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        case = f"^decode/float/D:{DIM}/H:{HEADS}/L:{length}/g:16/s:1024/iterations"
        output = [f"--benchmark_filter={case}", f"--benchmark_out={file.name}", "--benchmark_out_format=json"]
        subprocess.run([program, *output], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (result,) = json.loads(Path(file.name).read_text())["benchmarks"]
    if result.get("error_occurred"):
        raise SystemExit(f"cca_bench: {result['error_message']}")
    step = 1 / result["token/s"]
    return step, step * result["dense/cca"]


class Torch:
    def __init__(self, length):
        import torch

        torch.set_num_threads(1)
        generator = np.random.default_rng(0)
        draw = lambda count: generator.standard_normal((1, HEADS, count, DIM), np.float32)
        arrays = draw(1), draw(length), draw(length)
        self.version = torch.__version__
        operands = [torch.from_numpy(x) for x in arrays]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        with torch.inference_mode():
            self.call = lambda: sdpa(*operands)
            got = self.call().numpy()[0]
        for h in range(HEADS):
            q, k, v = (x[0, h].astype(np.float64) for x in arrays)
            weights = np.exp(k @ q[0] / math.sqrt(DIM))
            error = np.abs(weights @ v / weights.sum() - got[h, 0]).max()
            # The rounding errors of a sum of `length` terms add up like a random walk.
            if not error <= math.sqrt(length) * np.finfo(np.float32).eps:
                raise SystemExit(f"PyTorch is wrong by {error}")

    def turn(self, calls=5):
        """Seconds of the thread."""
        best = math.inf
        for _ in range(calls):
            start = time.thread_time()
            self.call()
            best = min(best, time.thread_time() - start)
        return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--length", type=int, default=128 * 1024)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    torch = Torch(arguments.length)
    best = {"cca": math.inf, "cca dense": math.inf, f"PyTorch {torch.version}": math.inf}
    for turn in range(arguments.turns):
        times = (*turn_of_ours(arguments.build / "bench/cca_bench", arguments.length), torch.turn())
        best = {name: min(b, t) for (name, b), t in zip(best.items(), times)}
        print(f"turn {turn + 1}: " + ", ".join(f"{t * 1e3:.2f} ms" for t in times), file=sys.stderr, flush=True)
    for name, seconds in best.items():
        print(f"{name:<20} {seconds * 1e3:8.2f} ms per step {seconds / best['cca']:6.1f}")


if __name__ == "__main__":
    main()
