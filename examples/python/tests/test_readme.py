"""The README's examples run as they stand."""

import importlib
import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 6


@pytest.mark.heavy
@pytest.mark.parametrize("block", BLOCKS)
def test_block(block):
    for module in re.findall(r"^(?:import|from) (numpy|torch|transformers|mpi4py)", block, re.MULTILINE):
        pytest.importorskip(module)
    if "import cca.mpi" in block:
        try:
            importlib.import_module("cca.mpi")
        except (ImportError, RuntimeError) as error:  # as mpi4py says that there is no MPI
            pytest.skip(str(error))
    exec(compile(block, "README.md", "exec"), {})
