#!/usr/bin/env python3
"""The regimes that models live in, as a table: of what the machine can do, and beside PyTorch, one thread each.

    cmake --preset release && cmake --build --preset release --target cca_bench
    cmake --preset release -B build/avx2 -D CCA_ARCH=avx2 && cmake --build build/avx2 --target cca_bench
    python bench/regimes.py AVX-512=build/release/bench/cca_bench AVX2=build/avx2/bench/cca_bench --torch

Builds of cca_bench and PyTorch take turns, --rounds times, each for all rows, and the median of a side's best times
counts; the peak and the bandwidth are those that cca_bench measures around each case. PyTorch is
`scaled_dot_product_attention`, beside the first build; few queries have no mask there, which is less to do than ours.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

# Label, the shape for `cca_bench --shape`, and what of it PyTorch is given, if anything.
ROWS = [
    *(
        (f"{n} {'query' if n == 1 else 'queries'} after 32K keys", f"dense:Lq={n},L=32768", "full")
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    ),
    ("32 heads on 8, one token after 8K", "dense:H=32,Hkv=8,Lq=1,L=8192", "full"),
    ("32 heads on 8, one token after 32K", "dense:H=32,Hkv=8,Lq=1,L=32768", "full"),
    ("32 heads on 8, a draft of 4 after 8K", "dense:H=32,Hkv=8,Lq=4,L=8192", "full"),
    ("32 heads on 8, a draft of 8 after 8K", "dense:H=32,Hkv=8,Lq=8,L=8192", "full"),
    ("128 heads on 1, one token after 8K", "dense:H=128,Hkv=1,Lq=1,L=8192", "full"),
    ("64 heads on 8, D=64, one token, window of 128 of 32K", "local:H=64,Hkv=8,Lq=1,L=32768,D=64,s=128", None),
    ("decode, 32 on 8, cores per kv head, 32K", "decode:H=32,Hkv=8,L=32768,g=16,s=1024,cores=kv_head", None),
    ("decode, 32 on 8, cores per query head, 32K", "decode:H=32,Hkv=8,L=32768,g=16,s=1024", None),
    *((f"window of {s}, 32K", f"local:L=32768,s={s}", None) for s in (64, 128, 256)),
    ("window of 128, 4K", "local:L=4096,s=128", "mask"),
    *((f"64 heads of {n}", f"dense:H=64,L={n}", "causal") for n in (64, 128, 512)),
    *(
        (f"prefill of 1K, 32 heads on 8, {layout}", f"dense:H=32,Hkv=8,L=1024,layout={layout}", given)
        for layout, given in (("bhsd", "causal"), ("bshd", None))
    ),
    ("dense, 4K", "dense:L=4096", "causal"),
    ("dense, 4K, bfloat16, matrix_unit::best", "dense:L=4096,dtype=bf16,unit=best", "causal"),
    ("CCA, g=16, s=1024, 32K", "cca:L=32768,g=16,s=1024", None),
    ("CCA, the same, bfloat16, matrix_unit::best", "cca:L=32768,g=16,s=1024,dtype=bf16,unit=best", None),
    ("dense, 32K", "dense:L=32768", None),
    *((f"gradient of CCA, D={d}, 16K", f"gradient/cca:L=16384,g=16,s=1024,D={d}", None) for d in (64, 128, 256)),
]


def run_bench(program, rows):
    """The counters of each row by a build of cca_bench."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        shapes = [argument for _, shape, _ in rows for argument in ("--shape", shape)]
        command = [program, *shapes, f"--benchmark_out={file.name}", "--benchmark_out_format=json"]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise SystemExit(f"{program}: {run.stdout[-1000:]}")
        cases = json.load(open(file.name, encoding="utf-8"))["benchmarks"]
    for case in cases:
        if case.get("error_occurred"):
            raise SystemExit(f"{program}: {case['name']}: {case['error_message']}")
    if len(cases) != len(rows):
        raise SystemExit(f"{program}: got {len(cases)} cases, wants {len(rows)}")
    return cases


def run_torch():
    """In a process of its own: milliseconds of each row that PyTorch is given, as JSON."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found = {"version": torch.__version__}
    for label, shape, given in ROWS:
        if given is None:
            continue
        keys = dict(part.split("=") for part in shape.split(":")[1].split(","))
        heads, length = int(keys.get("H", 1)), int(keys["L"])
        element = torch.bfloat16 if keys.get("dtype") == "bf16" else torch.float32
        query = torch.randn(1, heads, int(keys.get("Lq", length)), 128).to(element)
        key, value = torch.randn(2, 1, int(keys.get("Hkv", heads)), length, 128).to(element)
        options = {"enable_gqa": key.shape[1] != heads, "is_causal": given == "causal"}
        if given == "mask":
            distance = torch.arange(length)[:, None] - torch.arange(length)
            seen = (distance >= 0) & (distance < int(keys["s"]))
            options["attn_mask"] = torch.zeros(length, length).masked_fill(~seen, float("-inf"))
        times = []
        with torch.inference_mode():
            begin = time.perf_counter()
            while len(times) < 3 or time.perf_counter() - begin < 0.3:
                start = time.thread_time()
                sdpa(query, key, value, **options)
                times.append(time.thread_time() - start)
        found[label] = 1e3 * min(times)
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="*", metavar="NAME=cca_bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="PyTorch takes part")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose label has it")
    parser.add_argument("--torch-alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_alone:
        return run_torch()
    rows = [row for row in ROWS if arguments.only in row[0]]
    builds = dict(build.split("=", 1) for build in arguments.builds)
    ours = {name: [] for name in builds}
    theirs = []
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    for _ in range(arguments.rounds):
        for name, program in builds.items():
            ours[name].append(run_bench(program, rows))
        if arguments.torch:
            command = [sys.executable, __file__, "--torch-alone"]
            theirs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout))
    columns = [f"{name}: ms | of the peak | of the bandwidth" for name in builds]
    if theirs:
        columns.append(f"PyTorch {theirs[0]['version'].split('+')[0]}: ms | times as long as {next(iter(builds))}")
    print(f"| regime | {' | '.join(columns)} |")
    print("|---|" + "---:|" * sum(1 + column.count("|") for column in columns))
    for i, (label, _, given) in enumerate(rows):
        cells = []
        for runs in ours.values():
            for counter, form in (("best_ms", "{:.3g}"), ("peak", "{:.2f}"), ("bandwidth", "{:.2f}")):
                values = [run[i][counter] for run in runs if counter in run[i]]
                cells.append(form.format(statistics.median(values)) if values else "")
        if theirs:
            first = statistics.median(run[i]["best_ms"] for run in next(iter(ours.values())))
            peer = statistics.median(found[label] for found in theirs) if given else 0
            cells += [f"{peer:.3g}", f"{peer / first:.2f}"] if given else ["", ""]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
