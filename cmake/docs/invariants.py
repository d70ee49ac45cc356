#!/usr/bin/env python3
"""invariants.py MUTATIONS ROOT [PAGE]: writes the page of the documentation that leads from each invariant to its tests.

MUTATIONS is tests/mutations.toml, the list of planted bugs; ROOT is the project; without PAGE it is printed. Ends with an
error for a bug without an invariant or tests, for a header or test that is not there, and where the code that a bug changes
is not there exactly once: the page would promise what nobody shows.
"""

import sys
import tomllib
from pathlib import Path

INTRODUCTION = """# From invariant to test {{#invariants}}

The tests hold {invariants} invariants, and {bugs} small bugs are known that each break one. `tests/tools/mutate.py` plants one bug
after the other, and shows that a test fails. A row names the headers that hold the bugs, and the tests that are asked in
turn until one fails.

| invariant | bugs | headers | tests |
|---|---:|---|---|"""


def code_list(names):
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def page(bugs, headers, programs):
    """The page. `headers` are the texts of those of include/cca by their names, `programs` the names of the tests."""
    invariants = {}
    for bug in bugs:
        invariant, file, tests = bug.get("invariant"), bug.get("file"), bug.get("tests")
        if not invariant or not tests:
            raise ValueError(f"a bug in {file} breaks {invariant!r}, and is for {tests}")
        if file not in headers:
            raise ValueError(f"{invariant!r} is of {file}, which is no header")
        if headers[file].count(bug["find"]) != 1:
            raise ValueError(f"{invariant!r}: {file} has not once {bug['find']!r}")
        for test in tests:
            if not {test, test.partition(".")[0]} & programs:  # vnni_test.avx_vnni is vnni_test run in another way
                raise ValueError(f"{invariant!r} is for {test}, which is no test")
        invariants.setdefault(invariant, []).append(bug)
    rows = [INTRODUCTION.format(invariants=len(invariants), bugs=len(bugs))]
    for invariant, broken in invariants.items():
        files = code_list(bug["file"] for bug in broken)
        tests = code_list(test for bug in broken for test in bug["tests"])
        rows.append("| " + " | ".join([invariant.replace("|", "\\|"), str(len(broken)), files, tests]) + " |")
    return "\n".join(rows) + "\n"


def main():
    mutations, root = Path(sys.argv[1]), Path(sys.argv[2])
    include = root / "include" / "cca"
    try:
        text = page(tomllib.loads(mutations.read_text(encoding="utf-8"))["mutation"],
                    {str(path.relative_to(include)): path.read_text(encoding="utf-8") for path in include.rglob("*.hpp")},
                    {path.stem for path in (root / "tests").rglob("*_test.cpp")} |
                    {path.name for path in (root / "tests").rglob("*.sh")})
    except ValueError as error:
        sys.exit(f"{mutations}: {error}")
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
