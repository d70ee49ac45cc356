#!/usr/bin/env python3
"""Cliffs: sizes that take longer than larger ones do, of short sequences, windows and few queries.

    cmake --preset release && cmake --build --preset release --target cca_bench
    python bench/cliffs.py build/release/bench/cca_bench

Each sweep changes one size of a shape alone. Two rules hold within --slack, of the best times of --rounds turns:

 1. A call never takes longer than one of a larger size: more queries, tokens or window are more work.
 2. Useful FLOP/s never fall from a size to a larger one, where both fill whole tiles (multiples of 64): more of the same
    work is done no slower. Between such sizes they fall where a vector more is begun: its lanes are empty but for one.

Together they say what "no cliff" means: time per query may fall while lanes fill, and grows by no more than the work does.
Prints a table of each sweep, and what breaks a rule; the exit code is 1 then.
"""
import argparse

from regimes import run_bench

LENGTHS = [*range(1, 17), 20, 24, 31, 32, 33, 40, 48, 49, 63, 64, 65, 80, 96, 112, 127, 128, 129, 160, 192, 224]
LENGTHS += [255, 256, 257, 320, 384, 448, 511, 512, 513, 576, 640, 768, 896, 1023, 1024]
WINDOWS = [16, 24, 32, 48, 63, 64, 65, 80, 96, 127, 128, 129, 160, 192, 255, 256, 257, 320, 384, 512, 640, 768]
WINDOWS += [1024, 1536, 2048]
QUERIES = [*range(1, 34), 40, 47, 48, 49, 56, 63, 64, 65, 80, 96, 112, 128, 192, 256]
SWEEPS = {
    "64 heads of n tokens": ("dense:H=64,L={}", LENGTHS),
    "a window of n, 16K tokens": ("local:L=16384,s={}", WINDOWS),
    "n queries after 4K keys": ("dense:Lq={},L=4096", QUERIES),
}
TILE = 64  # lanes of the largest tile


def broken_rules(cases, slack):
    """Lines on what breaks a rule. `cases` are (size, milliseconds, FLOP/s), the sizes rising."""
    for i, (size, ms, speed) in enumerate(cases):
        larger = cases[i + 1 :]
        less = min(larger, key=lambda case: case[1], default=None)
        if less and ms > slack * less[1]:
            yield f"{size} takes {ms:.4g} ms, {ms / less[1]:.2f} times as long as {less[0]}"
        slower = min((case for case in larger if case[0] % TILE == 0), key=lambda case: case[2], default=None)
        if slower and size % TILE == 0 and speed > slack * slower[2]:
            yield f"{slower[0]} has {slower[2] / speed:.2f} of the FLOP/s of {size}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", metavar="cca_bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slack", type=float, default=1.05)
    parser.add_argument("--only", default="", metavar="TEXT", help="sweeps whose name has it")
    arguments = parser.parse_args()
    sweeps = {name: sweep for name, sweep in SWEEPS.items() if arguments.only in name}
    rows = [(name, shape.format(size), None) for name, (shape, sizes) in sweeps.items() for size in sizes]
    rounds = [run_bench(arguments.bench, rows) for _ in range(arguments.rounds)]
    best = [min(turn, key=lambda case: case["best_ms"]) for turn in zip(*rounds)]
    failed = False
    for name, (_, sizes) in sweeps.items():
        of = [case for (label, _, _), case in zip(rows, best) if label == name]
        cases = [(size, case["best_ms"], case["flop/s"]) for size, case in zip(sizes, of)]
        print(f"| {name} | ms | GFLOP/s | of the peak |\n|---|---:|---:|---:|")
        for (size, ms, speed), case in zip(cases, of):
            print(f"| {size} | {ms:.4g} | {speed * 1e-9:.3g} | {case['peak']:.2f} |")
        broken = list(broken_rules(cases, arguments.slack))
        print("\n" + ("\n".join(broken) or "No cliff.") + "\n")
        failed = failed or bool(broken)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
