#!/usr/bin/env python3
"""ratios.py OLD.json NEW.json [--counter NAME] [--filter RE]: two runs of cca_bench, case by case.

Both files are of `--benchmark_out`. Prints OLD / NEW of a counter, the best time unless another is named: above 1 NEW is
faster; the slowest first, then the geometric mean, and the cases that are in one file alone. Of two runs, one after the
other, the machine has changed in between: an A/B takes turns.
"""
import argparse
import json
import math
import re


def values(file, counter, pattern):
    """The counter by case, and the names of cases that failed or lack it."""
    with open(file, encoding="utf-8") as text:
        cases = [c for c in json.load(text)["benchmarks"] if re.search(pattern, c["name"])]
    names = [c["name"] for c in cases]
    found = {c["name"]: c[counter] for c in cases if counter in c and not c.get("error_occurred")}
    return found, [name for name in names if name not in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--counter", default="best_ms", help="best_ms, median_ms, or another where less is better")
    parser.add_argument("--filter", default=".", metavar="RE", help="names of cases")
    arguments = parser.parse_args()
    sides = [values(file, arguments.counter, arguments.filter) for file in (arguments.old, arguments.new)]
    (old, _), (new, _) = sides
    ratios = {name: old[name] / new[name] for name in old.keys() & new.keys()}
    if not ratios:
        raise SystemExit(f"no case of both files has the counter {arguments.counter}")
    for name, ratio in sorted(ratios.items(), key=lambda item: item[1]):
        print(f"{ratio:6.3f}  {old[name]:10.4g} {new[name]:10.4g}  {name}")
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    print(f"{mean:6.3f}  geometric mean of {len(ratios)} cases")
    for file, (found, failed), other in ((arguments.old, sides[0], new), (arguments.new, sides[1], old)):
        for name in sorted(failed):
            print(f"no {arguments.counter} in {file}: {name}")
        for name in sorted(found.keys() - other.keys()):
            print(f"in {file} alone: {name}")


main()
