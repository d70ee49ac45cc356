#!/usr/bin/env python3
"""Bytes of a cache against tokens, as the library reports them: bench/plots/cache.svg.

    python bench/plot_cache.py --build build/release --output bench/plots
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

# The benchmark's cases, with a colour and a label.
SERIES = {
    "cache/dense/D:128/Hkv:8": ("#2166ac", "dense"),
    "cache/cca/D:128/H:32/Hkv:8/cores_per_query_head": ("#e08214", "CCA, 32 query heads,\na core per query head"),
    "cache/cca/D:128/H:8": ("#c1272d", "CCA, a core per key/value head\n(32 or 8 query heads)"),
}
# Their numbers are the same, which the plot says in words.
SAME = "cache/cca/D:128/H:32/Hkv:8/cores_per_kv_head", "cache/cca/D:128/H:8"


def measure(program):
    """Bytes by series and number of tokens."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        output = ["--benchmark_filter=^cache/", f"--benchmark_out={file.name}", "--benchmark_out_format=json"]
        subprocess.run([program, *output], check=True, stdout=subprocess.DEVNULL)
        cases = json.loads(Path(file.name).read_text())["benchmarks"]
    series = {}
    for case in cases:
        name, tokens = case["name"].split("/iterations:")[0].split("/L:")
        series.setdefault(name, {})[int(tokens)] = case["cache_bytes"]
    return series


def plot(series, output):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True})
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cca"})
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    dense = series["cache/dense/D:128/Hkv:8"]
    for name, (colour, label) in SERIES.items():
        tokens = sorted(series[name])
        values = [series[name][n] / 2**20 for n in tokens]
        axes.plot(tokens, values, color=colour, marker="o", markersize=4, linewidth=1.8)
        share = series[name][tokens[-1]] / dense[tokens[-1]]
        text = label if name == "cache/dense/D:128/Hkv:8" else f"{label}: {share:.0%}"
        axes.annotate(
            text,
            (tokens[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=4)
    axes.set_xticks(tokens, [f"{n // 1024}K" if n >= 1024 else str(n) for n in tokens])
    low, high = axes.get_ylim()
    ticks = [4**i for i in range(-1, 7) if low <= 4**i <= high]
    axes.set_yticks(ticks, [f"{t:g} MiB" if t < 1024 else f"{t // 1024} GiB" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_title("Cache of a layer: 8 key/value heads, D = 128, float, g = 16, s = 1024", loc="left", fontsize=12)
    figure.savefig(output / "cache.svg", bbox_inches="tight", metadata={"Date": None})
    figure.savefig(output / "cache.png", bbox_inches="tight", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    series = measure(arguments.build / "bench/cca_bench")
    if series[SAME[0]] != series[SAME[1]]:
        raise SystemExit("a core per key/value head takes other bytes with 32 query heads than with 8")
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot(series, arguments.output)


if __name__ == "__main__":
    main()
