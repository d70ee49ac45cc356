#!/usr/bin/env python3
"""Ours and the peers in one run, one thread, on the same data; JSON and plots.

    python bench/compare.py --build build/release --output results

Every contestant is a process of its own that answers "run" on its input with the time of one call. They take turns, so
that clock and neighbours are the same for all, and the best turn of each counts. Before anything is timed, sampled rows
of every output are compared with NumPy in double precision. Time is that of the calling thread. Memory is the growth of
the process's peak over what it holds with the operands loaded; a mask is part of it, though made once and not timed.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DIM, GROUP, WINDOW = 128, 16, 1024


# The partition of the paper, arXiv 2412.12465: cores [0, core_count(t)), then tokens [core_count(t) * group, t].
def core_count(t):
    return np.maximum(0, (t + 1 - WINDOW) // GROUP)


# --- Peers: each takes query, key, value and returns a function that computes the result ------------------------------


def torch_causal(torch, query, key, value):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(query, key, value, is_causal=True)


def torch_cores(torch, query, key, value):
    """[cores ; keys] and [cores ; values], as one writes it in PyTorch."""
    batch, heads, length, dim = key.shape
    groups = length // GROUP
    k, v = (x[:, :, : groups * GROUP].reshape(batch, heads, groups, GROUP, dim) for x in (key, value))
    last = query[:, :, GROUP - 1 : groups * GROUP : GROUP].unsqueeze(-1)
    weights = torch.softmax(k @ last / math.sqrt(dim), dim=-2).transpose(-1, -2)
    return torch.cat([(weights @ k).squeeze(-2), key], 2), torch.cat([(weights @ v).squeeze(-2), value], 2)


def torch_masked_cca(torch, query, key, value):
    """Scaled dot-product attention with an explicit mask. The mask is made once; pooling is part of every call."""
    length = key.shape[2]
    groups = length // GROUP
    t = torch.arange(length).unsqueeze(1)
    cores = ((t + 1 - WINDOW) // GROUP).clamp(min=0)
    j = torch.arange(length)
    mask = torch.cat([torch.arange(groups) < cores, (j >= cores * GROUP) & (j <= t)], 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(query, *torch_cores(torch, query, key, value), attn_mask=mask)


def torch_flex_cca(torch, query, key, value):
    """FlexAttention, compiled, with a block mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = key.shape[2]
    groups = length // GROUP

    def seen(b, h, t, j):
        cores = torch.clamp((t + 1 - WINDOW) // GROUP, min=0)
        return torch.where(j < groups, j < cores, (j - groups >= cores * GROUP) & (j - groups <= t))

    mask = create_block_mask(seen, None, None, length, groups + length, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, *torch_cores(torch, query, key, value), block_mask=mask)


PEERS = {"torch causal": torch_causal, "torch masked CCA": torch_masked_cca, "torch FlexAttention CCA": torch_flex_cca}


def work(peer, directory, length):
    """The process of a peer."""
    import torch

    torch.set_num_threads(1)
    operands = [
        torch.from_numpy(np.fromfile(directory / name, np.float32)).view(1, 1, length, DIM)
        for name in ("query", "key", "value")
    ]
    call = out = None
    with torch.inference_mode():
        PEERS[peer](torch, *(x[:, :, :256] for x in operands))()  # so that code that is loaded or compiled is no memory
        print(json.dumps({"torch": torch.__version__}), flush=True)
        for command in sys.stdin:
            answer = {}
            if command.strip() == "write":
                out.numpy().tofile(directory / "out")
            else:
                call = call or PEERS[peer](torch, *operands)  # on the first run: what it makes is its memory, too
                out = None
                start, thread_start = time.perf_counter(), time.thread_time()
                out = call()
                answer = {"seconds": time.perf_counter() - start, "thread_seconds": time.thread_time() - thread_start}
            print(json.dumps(answer), flush=True)


def gemm_flops(size=2048, rounds=10):
    """FLOP/s of NumPy's sgemm, a ruler."""
    a = np.random.default_rng(0).random((size, size), np.float32)
    best = math.inf
    for _ in range(rounds):
        start = time.thread_time()
        a @ a
        best = min(best, time.thread_time() - start)
    return 2 * size**3 / best


# --- The contest ------------------------------------------------------------------------------------------------------


def one_thread():
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    environment.pop("OPENBLAS_CORETYPE", None)  # let OpenBLAS choose its kernels for this processor
    return environment


class Contestant:
    def __init__(self, name, command):
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread()
        )
        self.about = self.answer()
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak starts from what is held now
        self.held = self.status("VmRSS")
        self.times, self.peaks = [], []

    def status(self, field):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(field)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self):
        answer = self.ask("run")
        self.times.append(answer["thread_seconds"])
        self.peaks.append(answer.get("peak", 0))

    def output(self, directory):
        self.ask("write")
        out = np.fromfile(directory / "out", np.float32).reshape(-1, DIM)
        (directory / "out").unlink()
        return out

    def close(self):
        memory = self.status("VmHWM") - self.held
        self.process.stdin.close()
        self.process.wait()
        return memory


def exact_rows(rows, query, key, value, dense):
    """Rows of the result in double precision."""
    groups = len(key) // GROUP
    scale = 1 / math.sqrt(DIM)

    def attend(q, keys, values):
        logits = scale * (keys @ q)
        weights = np.exp(logits - logits.max())
        return (weights / weights.sum()) @ values

    if not dense:
        grouped = [x[: groups * GROUP].reshape(groups, GROUP, DIM) for x in (key, value)]
        last = query[GROUP - 1 : groups * GROUP : GROUP]
        cores = [np.stack([attend(q, k, x) for q, k, x in zip(last, grouped[0], part)]) for part in grouped]
    result = []
    for t in rows:
        c = 0 if dense else int(core_count(t))
        context = [x[c * GROUP : t + 1] for x in (key, value)]
        if c:
            context = [np.concatenate([far[:c], near]) for far, near in zip(cores, context)]
        result.append(attend(query[t], *context))
    return np.stack(result)


def scores(length, dense):
    t = np.arange(length)
    cores = 0 * t if dense else core_count(t)
    return int((cores + t + 1 - cores * GROUP).sum())


def compare(length, arguments, directory):
    """One row per contestant for sequences of `length` tokens."""
    generator = np.random.default_rng(length)
    operands = [generator.standard_normal((length, DIM), np.float32) for _ in range(3)]
    for name, x in zip(("query", "key", "value"), operands):
        x.tofile(directory / name)

    ours = [str(arguments.build / "bench/cca_run"), f"directory={directory}", f"length={length}", f"dim={DIM}"]
    contestants = {
        "cca dense": [*ours, "kind=dense"],
        "cca": [*ours, "kind=cca", f"group={GROUP}", f"window={WINDOW}"],
    }
    for peer in PEERS:
        if "CCA" not in peer or length <= arguments.masked_limit:
            contestants[peer] = [sys.executable, __file__, "--worker", peer, str(directory), str(length)]

    running, failures = [], {}
    rows = sorted({0, 1, WINDOW - 1, WINDOW + GROUP - 1, length // 2, length - 1} & set(range(length)))
    doubles = [x.astype(np.float64) for x in operands]
    exact = {dense: exact_rows(rows, *doubles, dense) for dense in (False, True)}
    errors = {}
    for name, command in contestants.items():
        try:
            contestant = Contestant(name, command)
            contestant.run()  # warms up; never the only one that counts
            error = np.abs(contestant.output(directory)[rows] - exact["CCA" not in name and name != "cca"]).max()
        except (RuntimeError, BrokenPipeError) as failure:
            failures[name] = str(failure)
            print(f"{length:>7} {name}: {failure}", file=sys.stderr)
            continue
        # The rounding errors of a sum of `length` terms add up like a random walk.
        if not error <= math.sqrt(length) * np.finfo(np.float32).eps * np.abs(operands[2]).max():
            raise SystemExit(f"{name} is wrong by {error} at length {length}")
        errors[name] = float(error)
        contestant.times.clear()
        running.append(contestant)

    deadline = time.monotonic() + arguments.seconds
    while True:
        for contestant in running:
            contestant.run()
        if time.monotonic() > deadline:
            break

    results = []
    for contestant in running:
        dense = contestant.name in ("cca dense", "torch causal")
        flops = 4 * DIM * scores(length, dense)
        results.append(
            {
                "name": contestant.name,
                "length": length,
                "seconds": min(contestant.times),
                "rounds": len(contestant.times),
                "build": contestant.about,
                "useful_flops": flops,
                "flop_per_s": flops / min(contestant.times),
                "peak": max(contestant.peaks) or None,
                "error": errors[contestant.name],
                # Ours holds the output from the start.
                "memory": contestant.close() - (0 if contestant.name.startswith("cca") else 4 * DIM * length),
            }
        )
        r = results[-1]
        print(
            f"{length:>7} {r['name']:<24} {r['seconds'] * 1e3:>10.2f} ms {r['flop_per_s'] / 1e9:>7.1f} GFLOP/s "
            f"error {r['error']:.1e} memory {r['memory'] / 2**20:>8.1f} MiB",
            flush=True,
        )
    return results, failures


def bench(program, pattern):
    """Counters of `cca_bench` by case."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        output = [f"--benchmark_out={file.name}", "--benchmark_out_format=json"]
        subprocess.run([program, f"--benchmark_filter={pattern}", *output], check=True, env=one_thread())
        report = json.loads(Path(file.name).read_text())
    for case in report["benchmarks"]:
        case["name"] = case["name"].split("/iterations:")[0]
    return report


def machine():
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform()}


# --- Plots ------------------------------------------------------------------------------------------------------------

COLOURS = {
    "cca": "#c1272d",
    "cca dense": "#e08214",
    "torch causal": "#2166ac",
    "torch masked CCA": "#5aae61",
    "torch FlexAttention CCA": "#762a83",
}
LABELS = {
    "cca": "cca, CCA attention",
    "cca dense": "cca, dense",
    "torch causal": "PyTorch, dense",
    "torch masked CCA": "PyTorch, CCA by mask",
    "torch FlexAttention CCA": "FlexAttention, CCA",
}


def plot(results, output):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "svg.fonttype": "none",
            "svg.hashsalt": "cca",
        }
    )

    def tokens(length, _=None):
        return f"{length // 1024:g}K"

    def save(figure, name):
        figure.savefig(output / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        figure.savefig(output / f"{name}.png", bbox_inches="tight", dpi=120)
        plt.close(figure)

    def against_length(name, title, value, ticks):
        figure, axes = plt.subplots(figsize=(7.5, 4.6))
        ends = []
        for series, colour in COLOURS.items():
            points = sorted((r["length"], value(r)) for r in results["comparison"] if r["name"] == series)
            if points:
                axes.plot(*zip(*points), color=colour, marker="o", markersize=4, linewidth=1.8)
                ends.append([points[-1], series, colour])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({r["length"] for r in results["comparison"]})
        axes.set_xticks(lengths, [tokens(x) for x in lengths])
        low, high = axes.get_ylim()
        axes.set_yticks(*zip(*((y, label) for y, label in ticks if low <= y <= high)))
        axes.minorticks_off()
        axes.set_xlabel("sequence length, tokens")
        axes.set_title(title, loc="left", fontsize=12)
        # Labels stand right of the lines' ends, moved apart where they would meet.
        figure.canvas.draw()
        height, previous = 15, -math.inf
        for (x, y), series, colour in sorted(ends, key=lambda e: e[0][1]):
            at = axes.transData.transform((x, y))[1] * 72 / figure.dpi
            previous = max(at, previous + height)
            axes.annotate(
                LABELS[series],
                (x, y),
                xytext=(8, previous - at),
                textcoords="offset points",
                va="center",
                color=colour,
                annotation_clip=False,
            )
        save(figure, name)

    seconds = [(10.0**i, f"{10**i} s" if i >= 0 else f"{10 ** (i + 3)} ms") for i in range(-3, 4)]
    bytes_ = [(10.0**i * 2**20, f"{10**i:g} MiB") for i in range(-1, 6)]
    against_length("time", "Time of one head on one core, D = 128", lambda r: r["seconds"], seconds)
    against_length("memory", "Memory beside operands and output", lambda r: max(r["memory"], 2**16), bytes_)

    if not results["bench"]:
        return
    builds = list(results["bench"])
    cases = [
        case["name"]
        for case in results["bench"][builds[0]]["benchmarks"]
        if "peak" in case and "bandwidth" not in case and not case["name"].startswith("eigen_gemm")
    ]
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.27 * len(cases)))
    for build, colour in zip(builds, ("#c1272d", "#2166ac", "#5aae61", "#e08214")):
        peaks = {case["name"]: case.get("peak") for case in results["bench"][build]["benchmarks"]}
        axes.plot([peaks.get(c) for c in cases], range(len(cases)), "o", color=colour, markersize=6, label=build)
    axes.set_yticks(range(len(cases)), [c.replace("/", "  ") for c in cases], fontsize=9)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.arange(0, 1.01, 0.1))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_title("Useful operations as a share of the multiply-add peak of one core", loc="left", fontsize=12)
    if len(builds) > 1:
        axes.legend(loc="upper left", frameon=False)
    save(figure, "peak")


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    if sys.argv[1:] == ["--gemm"]:
        return print(gemm_flops())

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="build directory of cca_run")
    parser.add_argument("--output", type=Path, required=True, help="directory of results.json and the plots")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 * 2**i for i in range(6)])
    parser.add_argument("--long", action="store_true", help="128K tokens, too: minutes")
    parser.add_argument("--seconds", type=float, default=10, help="time to take turns for, per length")
    parser.add_argument("--masked-limit", type=int, default=32768, help="longest length for the peers with L x L masks")
    parser.add_argument(
        "--bench",
        nargs="*",
        default=[],
        metavar="LABEL=PROGRAM",
        help="builds of cca_bench whose fractions of the peak are plotted",
    )
    parser.add_argument("--filter", default=".", help="cases of cca_bench")
    parser.add_argument("--plot", action="store_true", help="only draw the results.json that is there")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.json"
    if arguments.plot:
        return plot(json.loads(file.read_text()), arguments.output)
    if arguments.build is None:
        parser.error("--build is required")

    results = {"command": " ".join(sys.argv), "machine": machine(), "python": platform.python_version()}
    results["numpy"] = np.__version__
    gemm = subprocess.run([sys.executable, __file__, "--gemm"], check=True, capture_output=True, env=one_thread())
    results["numpy_sgemm_flop_per_s"] = float(gemm.stdout)
    print(f"NumPy sgemm {results['numpy_sgemm_flop_per_s'] / 1e9:.1f} GFLOP/s")
    results["comparison"], results["failures"] = [], {}
    with tempfile.TemporaryDirectory() as directory:
        for length in arguments.lengths + [131072] * arguments.long:
            rows, failures = compare(length, arguments, Path(directory))
            results["comparison"] += rows
            results["failures"].update({f"{name} at {length}": why for name, why in failures.items()})
    results["bench"] = {}
    for build in arguments.bench:
        label, program = build.split("=", 1)
        results["bench"][label] = bench(program, arguments.filter)
    file.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output)


if __name__ == "__main__":
    main()
