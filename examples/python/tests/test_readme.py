"""The README's examples run as they stand."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 4


@pytest.mark.heavy
@pytest.mark.parametrize("block", BLOCKS)
def test_block(block):
    for module in re.findall(r"^(?:import|from) (numpy|torch|transformers)", block, re.MULTILINE):
        pytest.importorskip(module)
    exec(compile(block, "README.md", "exec"), {})
