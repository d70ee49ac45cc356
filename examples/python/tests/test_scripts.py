"""The scripts beside the package."""

import importlib
import pathlib
import stat
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")


@pytest.fixture
def beside_cpp(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent)
    return importlib.import_module("beside_cpp")


@pytest.mark.parametrize("first", ["", "print('built', flush=True); input()\n"])
def test_what_a_program_failed_of_is_said(beside_cpp, tmp_path, first):
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{first}import sys\nsys.exit('query: wants 12 bytes')\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(SystemExit, match="program ended with 1: query: wants 12 bytes"):
        beside_cpp.Program(program, tmp_path, 8, 1).seconds()
