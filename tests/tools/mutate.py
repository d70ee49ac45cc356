#!/usr/bin/env python3
"""Puts each of the bugs of mutations.toml into a copy of the library and shows that a test fails.

    python3 tests/tools/mutate.py [--jobs N] [--arch native] [--only TEXT] [--first N] [--work DIRECTORY]

Takes the tests that a bug names one after the other, until one fails to pass. Ends with the bugs that none caught.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def copy_changed(original, copy):
    """A new date for what has changed: of an older one that comes back, a build that was kept would not know."""
    if not (os.path.exists(copy) and filecmp.cmp(original, copy, shallow=False)):
        shutil.copyfile(original, copy)


def prepare(work, arch):
    """A copy of the sources, configured; what is unchanged since the last time keeps its date, and is not built again."""
    source = work / "source"
    source.mkdir(parents=True, exist_ok=True)
    for name in ("include", "tests", "cmake", "CMakeLists.txt", "README.md", "examples"):
        original, copy = ROOT / name, source / name
        if original.is_dir():
            shutil.copytree(original, copy, copy_function=copy_changed, dirs_exist_ok=True)
        else:
            copy_changed(original, copy)
    configure = ["cmake", "-S", source, "-B", work / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"]
    options = [f"-DCCA_TEST_ARCHS={arch}", "-DCCA_BUILD_TESTS=ON", "-DCCA_BUILD_BENCHMARKS=OFF", "-DCCA_BUILD_EXAMPLES=OFF"]
    # Through the headers: for a test no more is compiled than what it calls.
    options += ["-DCCA_TEST_DISPATCH=OFF", "-DCCA_MPI=AUTO"]
    # Without warnings, which are errors here: what a bug leaves unused is no reason not to build it.
    options += ["-DCMAKE_CXX_FLAGS=-w", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
    subprocess.run([*configure, *options], check=True, stdout=subprocess.DEVNULL)
    return source / "include" / "cca", work / "build"


def passes(build, test, arch, jobs):
    """Whether the test builds and passes. A static_assert is a test, too; what else does not compile ends the program."""
    if test.endswith(".sh"):
        script = build.parent / "source" / "tests" / "tools" / test
        run = subprocess.run([script, "quick", os.environ.get("CXX", "c++")], capture_output=True, text=True)
        if "does not compile" in run.stdout:
            sys.exit(f"{test}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 0
    name, _, variant = test.partition(".")  # vnni_test.avx_vnni is vnni_test with CCA_TEST_AVX_VNNI in its environment
    test = f"{arch}.{name}"
    made = subprocess.run(["ninja", "-C", build, f"-j{jobs}", test], capture_output=True, text=True)
    if made.returncode:
        if "static assertion failed" in made.stdout:
            return False
        sys.exit(f"{test} does not compile:\n{made.stdout[-2000:]}")
    program = [build / "tests" / test, "--gtest_brief=1", "--gtest_fail_fast"]
    environment = os.environ | ({f"CCA_TEST_{variant.upper()}": "1"} if variant else {})
    if (ROOT / "tests" / "mpi" / f"{name}.cpp").exists() and name != "mpi_plan_test":
        # A rank that has failed leaves the others waiting: then the time runs out.
        program = ["mpirun", "--oversubscribe", "-n", "3", "--timeout", "100", *program]
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(program, capture_output=True, timeout=300, env=environment)
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--arch", default="native", help="instruction set, as of CCA_TEST_ARCHS")
    parser.add_argument("--only", default="", help="bugs whose file or invariant holds this text")
    parser.add_argument("--first", type=int, default=1, help="the bug of those to begin with, counted from 1")
    parser.add_argument("--work", type=Path, help="directory to keep the builds in")
    arguments = parser.parse_args()

    with open(ROOT / "tests" / "mutations.toml", "rb") as file:
        mutations = tomllib.load(file)["mutation"]
    mutations = [m for m in mutations if arguments.only in m["file"] + m["invariant"]]
    for m in mutations:
        count = (ROOT / "include" / "cca" / m["file"]).read_text().count(m["find"])
        if count != 1:
            sys.exit(f"{m['file']}: {count} times {m['find']!r}, wants 1")

    with tempfile.TemporaryDirectory() as temporary:
        headers, build = prepare(arguments.work or Path(temporary), arguments.arch)
        for test in sorted({t for m in mutations for t in m["tests"]}):
            if not passes(build, test, arguments.arch, arguments.jobs):
                sys.exit(f"{test} fails without a bug")
        missed = []
        for i, m in list(enumerate(mutations, 1))[arguments.first - 1 :]:
            header = headers / m["file"]
            text = header.read_text()
            start = time.monotonic()
            header.write_text(text.replace(m["find"], m["replace"]))
            caught = next((t for t in m["tests"] if not passes(build, t, arguments.arch, arguments.jobs)), None)
            header.write_text(text)
            if not caught:
                missed.append(m)
            print(f"{i}/{len(mutations)} {m['file']}: {m['invariant']}: {caught or 'NOT CAUGHT'}"
                  f" ({time.monotonic() - start:.0f} s)", flush=True)
    tried = len(mutations) - arguments.first + 1
    print(f"{tried - len(missed)} of {tried} caught")
    for m in missed:
        print(f"not caught: {m['file']}: {m['find']} -> {m['replace']}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
