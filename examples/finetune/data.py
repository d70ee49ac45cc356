"""Texts of packages as tokens, in parts for training and for validation that share no token, and batches by seed and step."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import transformers
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "smollm2"))  # prepare.py, imported where files are made or read

BOOKS = {"report": "lcet10.txt", "poem": "plrabn12.txt", "play": "asyoulik.txt"}  # of the Canterbury corpus
CODE_FOLDERS = ("generation", "pipelines", "integrations", "utils")  # of transformers; its models copy one another
CODE_CHARACTERS = 2_000_000
HELD_OUT = 0.1  # the end of each text


def book(downloads: Path, name: str) -> str:
    import prepare

    with tarfile.open(prepare.download(prepare.TEXT_PACKAGE, downloads, "--no-binary", "brotli")) as archive:
        (member,) = (path for path in archive.getnames() if path.endswith(f"testdata/{name}"))
        return io.TextIOWrapper(archive.extractfile(member), encoding="latin-1").read()


def code() -> str:
    root = Path(transformers.__file__).parent
    files = sorted(path for folder in CODE_FOLDERS for path in (root / folder).glob("*.py"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files)[:CODE_CHARACTERS]


def split(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The part for training, and the end, which no training sees."""
    edge = int(len(tokens) * (1 - HELD_OUT))
    return {"train": tokens[:edge], "validation": tokens[edge:]}


def load_texts(folder: Path, tokenizer) -> dict[str, dict[str, np.ndarray]]:
    """{"train": {name of the text: its tokens}, "validation": ..}, made at the first call and kept in the folder."""
    file = folder / "finetune.safetensors"
    if not file.exists():
        texts = {name: book(folder / "downloads", member) for name, member in BOOKS.items()} | {"code": code()}
        parts = {name: split(np.array(tokenizer.encode(text).ids, dtype=np.int32)) for name, text in texts.items()}
        save_file({f"{part}.{name}": x.copy() for name, both in parts.items() for part, x in both.items()}, file)
    found = {"train": {}, "validation": {}}
    for key, tokens in sorted(load_file(file).items()):
        part, name = key.split(".")
        found[part][name] = tokens.astype(np.int64)
    return found


def random_part(texts: dict[str, np.ndarray], length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` tokens of one of the texts, each text as likely as the others."""
    tokens = texts[rng.choice(sorted(texts))]
    begin = rng.integers(len(tokens) - length + 1)
    return tokens[begin : begin + length]


def spread_parts(texts: dict[str, np.ndarray], length: int, parts: int) -> dict[str, list[np.ndarray]]:
    """Of each text `parts` parts of `length` tokens, spread evenly over it."""
    return {
        name: [tokens[begin : begin + length] for begin in np.linspace(0, len(tokens) - length, parts).astype(int)]
        for name, tokens in texts.items()
    }
