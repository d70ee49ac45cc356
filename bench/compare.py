#!/usr/bin/env python3
"""Ours and the peers in one run, one thread, on the same data; JSON and plots.

    python bench/compare.py --build build/release --output results --bench AVX-512=build/release/bench/cca_bench
    python bench/compare.py --plot --output bench/plots     # only draws the results.json that is there

Every contestant is a process of its own that answers "run" on its input with the time of one call. They take turns, so
that clock and neighbours are the same for all, and the best turn of each counts. Before anything is timed, sampled rows
of every output are compared with NumPy in double precision. Time is that of the calling thread. Memory is the growth of
the process's peak over what it holds with the operands loaded; a mask is part of it, though made once and not timed.
NumPy's sgemm (OpenBLAS) and the multiply-add peak are rulers in the same run.

ggml takes part where `ggml_run` was built:

    cmake -S ggml -B ggml/build -D CMAKE_BUILD_TYPE=Release -D GGML_OPENMP=OFF -D BUILD_SHARED_LIBS=OFF
    cmake --build ggml/build && cmake --install ggml/build --prefix ggml/install
    cmake --preset release -D CCA_BENCH_GGML=ON -D CMAKE_PREFIX_PATH=$PWD/ggml/install
    cmake --build --preset release --target ggml_run
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DIM, GROUP, WINDOW = 128, 16, 1024


def rounded(x, element):
    """Floats that `element` holds: to nearest, ties to even."""
    if element == "float":
        return x
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


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
    j, group = torch.arange(length), torch.arange(groups)
    mask = torch.zeros(length, groups + length, dtype=query.dtype)  # PyTorch turns one of bools into that in every call
    for t in torch.arange(length).unsqueeze(1).split(1024):  # a copy of it would count as memory
        cores = ((t + 1 - WINDOW) // GROUP).clamp(min=0)
        unseen = torch.cat([group >= cores, (j < cores * GROUP) | (j > t)], 1)
        mask[int(t[0]) : int(t[-1]) + 1].masked_fill_(unseen, -math.inf)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(query, *torch_cores(torch, query, key, value), attn_mask=mask)


def torch_flex_cca(torch, query, key, value):
    """FlexAttention with a block mask made once, both compiled: otherwise the mask's making takes L x L memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = key.shape[2]
    groups = length // GROUP

    def seen(b, h, t, j):
        cores = torch.clamp((t + 1 - WINDOW) // GROUP, min=0)
        return torch.where(j < groups, j < cores, (j - groups >= cores * GROUP) & (j - groups <= t))

    mask = torch.compile(create_block_mask, dynamic=False)(seen, None, None, length, groups + length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, *torch_cores(torch, query, key, value), block_mask=mask)


PEERS = {"torch causal": torch_causal, "torch masked CCA": torch_masked_cca, "torch FlexAttention CCA": torch_flex_cca}


def work(peer, directory, length, element):
    """The process of a peer."""
    import torch

    torch.set_num_threads(1)
    operands = [
        torch.from_numpy(np.fromfile(directory / name, np.float32)).view(1, 1, length, DIM).to(getattr(torch, element))
        for name in ("query", "key", "value")
    ]
    call = out = None
    with torch.inference_mode():
        PEERS[peer](torch, *(x[:, :, :256] for x in operands))()  # so that code that is loaded or compiled is no memory
        print(json.dumps({"torch": torch.__version__}), flush=True)
        for command in sys.stdin:
            answer = {}
            if command.strip() == "write":
                out.float().numpy().tofile(directory / "out")
            else:
                call = call or PEERS[peer](torch, *operands)  # on the first run: what it makes is its memory, too
                out = None
                start, thread_start = time.perf_counter(), time.thread_time()
                out = call()
                answer = {"seconds": time.perf_counter() - start, "thread_seconds": time.thread_time() - thread_start}
            print(json.dumps(answer), flush=True)


def is_dense(name):
    return name != "cca" and "CCA" not in name


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


def tolerance(name, length, exact, value, element):
    """By row: what rounding may do."""
    if name.endswith("f16") or element == "bfloat16":  # weights, cores and results are rounded; errors average as values do
        eps = np.finfo(np.float16).eps if element == "float" else 2**-7
        return eps * np.abs(exact).max(axis=1)
    # The rounding errors of a sum of `length` terms add up like a random walk.
    return np.full(len(exact), math.sqrt(length) * np.finfo(np.float32).eps * np.abs(value).max())


def compare(length, arguments, directory):
    """One row per contestant for sequences of `length` tokens."""
    element = arguments.element
    size = 4 if element == "float" else 2
    generator = np.random.default_rng(length)
    operands = [rounded(generator.standard_normal((length, DIM), np.float32), element) for _ in range(3)]
    for name, x in zip(("query", "key", "value"), operands):
        x.tofile(directory / name)

    ours = [str(arguments.build / "bench/cca_run"), f"directory={directory}", f"length={length}", f"dim={DIM}", f"element={element}"]
    contestants = {
        "cca dense": [*ours, "kind=dense"],
        "cca": [*ours, "kind=cca", f"group={GROUP}", f"window={WINDOW}"],
    }
    for peer in PEERS:
        if peer != "torch masked CCA" or length <= arguments.masked_limit:
            contestants[peer] = [sys.executable, __file__, "--worker", peer, str(directory), str(length), element]
    ggml = arguments.build / "bench/ggml_run"
    for kind in ("f32", "f16") if ggml.exists() and element == "float" else ():
        contestants[f"ggml {kind}"] = [str(ggml), *ours[1:], f"type={kind}"]

    running, failures = [], {}
    rows = sorted({0, 1, WINDOW - 1, WINDOW + GROUP - 1, length // 2, length - 1} & set(range(length)))
    doubles = [x.astype(np.float64) for x in operands]
    exact = {dense: exact_rows(rows, *doubles, dense) for dense in (False, True)}
    errors = {}
    for name, command in contestants.items():
        try:
            contestant = Contestant(name, command)
            contestant.run()  # warms up; never the only one that counts
            expected = exact[is_dense(name)]
            errors[name] = np.abs(contestant.output(directory)[rows] - expected).max(axis=1)
        except (RuntimeError, BrokenPipeError) as failure:
            failures[name] = str(failure)
            print(f"{length:>7} {name}: {failure}", file=sys.stderr)
            continue
        if not (errors[name] <= tolerance(name, length, expected, operands[2], element)).all():
            raise SystemExit(f"{name} is wrong by {errors[name].max()} at length {length}")
        contestant.times.clear()
        running.append(contestant)

    deadline, rounds = time.monotonic() + arguments.seconds, 0
    while rounds < 2 or time.monotonic() < deadline:
        for contestant in running:
            contestant.run()
        rounds += 1

    results = []
    for contestant in running:
        flops = 4 * DIM * scores(length, is_dense(contestant.name))
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
                "error": float(errors[contestant.name].max()),
                # All but PyTorch hold the output from the start.
                "memory": contestant.close() - size * DIM * length * contestant.name.startswith("torch"),
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
    """Counters of `cca_bench` by case, from a run of it or from the JSON of one."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        if program.endswith(".json"):
            report = json.loads(Path(program).read_text())
        else:
            output = [f"--benchmark_out={file.name}", "--benchmark_out_format=json"]
            subprocess.run([program, f"--benchmark_filter={pattern}", *output], check=True, env=one_thread())
            report = json.loads(Path(file.name).read_text())
    about = ("compiler", "instruction_set", "fma_peak_float", "fma_peak_double", "read_memory", "read_last_level_cache")
    cases = {}
    for case in report["benchmarks"]:
        counters = ("flop/s", "peak", "byte/s", "bandwidth", "token/s", "scratch", "per_thread", "speedup", "dense/cca")
        cases[case["name"].split("/iterations:")[0]] = {
            "milliseconds": case.get("real_time"),
            **{name: case[name] for name in counters if name in case},
        }
    return {"context": {name: report["context"][name] for name in about}, "cases": cases}


def machine():
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
    }


# --- Plots ------------------------------------------------------------------------------------------------------------

SERIES = {
    "cca": ("#c1272d", "cca, CCA attention"),
    "cca dense": ("#e08214", "cca, dense"),
    "torch causal": ("#2166ac", "PyTorch, dense"),
    "ggml f32": ("#7f7f7f", "ggml, dense"),
    "torch masked CCA": ("#5aae61", "PyTorch, CCA by mask"),
    "torch FlexAttention CCA": ("#762a83", "FlexAttention, CCA"),
}
# Cases of cca_bench whose share of the peak is drawn: those bound by arithmetic, on one thread.
DRAWN = re.compile(r"(cca|dense|local|eigen_cca)/(?!.*(Lq:|threads:|lse))")


def tokens(length):
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def time_label(exponent):
    return f"{10**exponent} s" if exponent >= 0 else f"{10 ** (exponent + 3)} ms"


def size_label(exponent):
    return f"{2 ** (exponent % 10)} {('', 'Ki', 'Mi', 'Gi')[exponent // 10]}B"


def case_label(name):
    kernel, kind, *sizes = name.split("/")
    size = {key: int(value) for key, value in (part.split(":") for part in sizes)}
    text = {"cca": "CCA", "dense": "dense", "local": "window", "eigen_cca": "CCA, naive Eigen"}[kernel]
    if kind == "double":
        text += ", double"
    text += f", D={size['D']}"
    heads = size.get("B", 1) * size.get("H", 1)
    if heads > 1:
        text += f", {heads} heads" + (f" ({size['Hkv']} KV)" if "Hkv" in size else "")
    if "g" in size:
        text += f", g={size['g']}"
    if "s" in size:
        text += f", s={size['s']}"
    return f"{text}, L={tokens(size['L'])}"


def draw_against_length(axes, comparison, title, value, ticks):
    """Logarithmic lines of `value` of a row, a series for each contestant; `ticks` are values and their labels."""
    ends = []
    for series, (colour, label) in SERIES.items():
        points = sorted((r["length"], value(r)) for r in comparison if r["name"] == series)
        if points:
            axes.plot(*zip(*points), color=colour, marker="o", markersize=4, linewidth=1.8)
            ends.append([points[-1], label, colour])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({r["length"] for r in comparison})
    axes.set_xticks(lengths, [tokens(x) for x in lengths])
    low, high = axes.get_ylim()
    high *= 3  # room for a label above a line
    axes.set_ylim(low, high)
    axes.set_yticks(*zip(*((y, label) for y, label in ticks if low <= y <= high)))
    axes.minorticks_off()
    axes.set_xlabel("sequence length, tokens")
    axes.set_title(title, loc="left", fontsize=12)
    # Labels stand right of the last ends of lines, moved apart where they would meet; above an end before that.
    axes.figure.canvas.draw()
    previous = -math.inf
    for (x, y), label, colour in sorted(ends, key=lambda e: e[0][1]):
        at = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        place = {"xytext": (0, 8), "ha": "right"}
        if x == lengths[-1]:
            previous = max(at, previous + 15)
            place = {"xytext": (8, previous - at), "va": "center"}
        axes.annotate(label, (x, y), textcoords="offset points", color=colour, annotation_clip=False, **place)


def draw_peaks(axes, builds, cases):
    """Bars of the fraction of the peak, a group for each case and a bar for each build."""
    height = 0.8 / len(builds)
    for i, ((build, report), colour) in enumerate(zip(builds.items(), ("#c1272d", "#f4a582", "#92c5de", "#2166ac"))):
        peaks = [report["cases"].get(name, {}).get("peak", math.nan) for name in cases]
        at = np.arange(len(cases)) + (i - (len(builds) - 1) / 2) * height
        axes.barh(at, peaks, height, color=colour, label=build)
        for y, peak in zip(at, peaks):
            if math.isfinite(peak):
                axes.text(peak + 0.005, y, f"{peak:.2f}", va="center", fontsize=8, color="#404040")
    axes.set_yticks(range(len(cases)), [case_label(name) for name in cases], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.set_title("Useful operations, of the multiply-add peak of one core", loc="left", fontsize=12, pad=24)
    if len(builds) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=10, borderpad=0)


def plot(results, output, formats):
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

    def save(name, figsize, draw, *arguments):
        figure, axes = plt.subplots(figsize=figsize)
        draw(axes, *arguments)
        for kind in formats:
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(output / f"{name}.{kind}", bbox_inches="tight", metadata=metadata, dpi=120)
        plt.close(figure)

    comparison, builds = results["comparison"], results["bench"]
    if comparison:
        title, ticks = "Time of one head on one core, D = 128", [(10.0**i, time_label(i)) for i in range(-3, 4)]
        save("time", (7.5, 4.6), draw_against_length, comparison, title, lambda r: r["seconds"], ticks)
        title, ticks = "Memory beside operands and output", [(2.0**i, size_label(i)) for i in range(17, 40, 3)]
        save("memory", (7.5, 4.6), draw_against_length, comparison, title, lambda r: max(r["memory"], 2**17), ticks)
    if builds:
        first = next(iter(builds.values()))["cases"]
        cases = [name for name, case in first.items() if DRAWN.match(name) and "peak" in case]
        save("peak", (7.5, 0.9 + 0.34 * len(cases)), draw_peaks, builds, cases)


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    if sys.argv[1:] == ["--gemm"]:
        return print(gemm_flops())

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="build directory of cca_run")
    parser.add_argument("--output", type=Path, required=True, help="directory of results.json and the plots")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024 * 2**i for i in range(6)])
    parser.add_argument("--long", action="store_true", help="128K tokens, too: a quarter of an hour")
    parser.add_argument("--seconds", type=float, default=10, help="time to take turns for, per length; at least twice")
    parser.add_argument("--masked-limit", type=int, default=32768, help="longest length for an L x L mask")
    parser.add_argument(
        "--bench",
        nargs="*",
        default=[],
        metavar="LABEL=PROGRAM",
        help="builds of cca_bench, or the JSON of their runs, whose fractions of the peak are plotted",
    )
    parser.add_argument(
        "--element", choices=["float", "bfloat16"], default="float", help="bfloat16: by the matrix unit, nothing is drawn"
    )
    parser.add_argument("--filter", default=".", help="cases of cca_bench")
    parser.add_argument("--plot", action="store_true", help="only draw the results.json that is there")
    parser.add_argument("--formats", nargs="+", default=["svg"], help="of the plots: svg, png, pdf")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / ("results.json" if arguments.element == "float" else f"results_{arguments.element}.json")
    if arguments.plot:
        return plot(json.loads(file.read_text()), arguments.output, arguments.formats)
    if arguments.build is None:
        parser.error("--build is required")

    results = {"machine": machine(), "comparison": [], "failures": {}, "bench": {}, "sgemm_flop_per_s": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        for length in arguments.lengths + [131072] * arguments.long:
            command = [sys.executable, __file__, "--gemm"]
            gemm = subprocess.run(command, check=True, capture_output=True, env=one_thread())
            results["sgemm_flop_per_s"] = max(results["sgemm_flop_per_s"], float(gemm.stdout))
            rows, failures = compare(length, arguments, Path(directory))
            results["comparison"] += rows
            results["failures"].update({f"{name} at {length}": why for name, why in failures.items()})
            peak = max(r["peak"] or 0 for r in results["comparison"])
            print(f"sgemm {results['sgemm_flop_per_s'] / 1e9:.1f}, multiply-adds {peak / 1e9:.1f} GFLOP/s")
    for build in arguments.bench:
        label, program = build.split("=", 1)
        results["bench"][label] = bench(program, arguments.filter)
    file.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.element == "float":
        plot(results, arguments.output, arguments.formats)


if __name__ == "__main__":
    main()
