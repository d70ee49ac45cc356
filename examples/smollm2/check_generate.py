"""Checks `smollm2_generate` from outside: what it writes with one set of options against what it writes with others.

With a window beyond the length CCA sees what dense attention sees, so the text is exactly that of dense attention, for
the likeliest tokens and for drawn ones; with a smaller window it is another, or this check could not fail. The same
seed gives the same text on any number of threads, another seed another; the text ends before a string to stop at and
with the model's own mark; and whenever a piece of it comes, it is whole characters.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file

from prepare import tokenizer

CHAT = "<|im_start|>user\nSay hello in one short sentence.<|im_end|>\n<|im_start|>assistant\n"
FRUITS = "🍎 apple 🍌 banana 🍇 grapes 🍓 strawberry 🍒 cherries\n" * 8  # the model says them again


class Check:
    def __init__(self, program: Path, prompt_tokens: int, new_tokens: int) -> None:
        self.program = program.resolve()
        self.prompt = ["--prompt-tokens", str(prompt_tokens)]
        self.new_tokens = ["--new-tokens", str(new_tokens)]
        self.failures = 0

    def pieces(self, folder: Path, *options: str) -> tuple[list[bytes], str]:
        """The text as it comes, in the pieces that the pipe gives; and what the program says about it."""
        with tempfile.TemporaryFile() as messages:
            command = [self.program, folder, *self.new_tokens, *options]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process:
                pieces = list(iter(lambda: os.read(process.stdout.fileno(), 1 << 16), b""))
            messages.seek(0)
            report = messages.read().decode()
        if process.returncode != 0:
            sys.exit(f"FAILED: {' '.join(map(str, command))}\n{report}")
        return pieces, report

    def text(self, folder: Path, *options: str) -> str:
        pieces, _ = self.pieces(folder, *self.prompt, *options)
        return b"".join(pieces).decode().removesuffix("\n")

    def expect(self, holds: bool, what: str) -> None:
        print(f"{'passed' if holds else 'FAILED'}: {what}", flush=True)
        self.failures += not holds


def with_prompt(folder: Path, target: Path, tokens: list[int]) -> Path:
    """The same model with another text."""
    target.mkdir()
    for name in ("model.safetensors", "vocabulary.safetensors"):
        (target / name).symlink_to((folder / name).resolve())
    save_file({"tokens": np.array(tokens, dtype=np.int32)}, target / "text.safetensors")
    return target


def whole_characters(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built smollm2_generate")
    parser.add_argument("folder", type=Path, help="what prepare.py has written")
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--window", default="1000000", help="the window beyond the length; one within it fails")
    arguments = parser.parse_args()
    check = Check(arguments.program, arguments.prompt_tokens, arguments.new_tokens)
    folder = arguments.folder
    wide, narrow = ["--attention", f"16/{arguments.window}/sinks=0"], ["--attention", "16/64/sinks=0"]

    dense = check.text(folder, "--attention", "dense")
    print(f"dense: {dense!r}")
    check.expect(check.text(folder, *wide) == dense, f"CCA with a window of {arguments.window} writes the dense text")
    check.expect(check.text(folder, *wide[:1], wide[1] + "/shared/select") == dense, "and with shared cores, selected")
    check.expect(check.text(folder, *narrow) != dense, "CCA with a window of 64 writes another")

    drawn = ["--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed"]
    seed_1 = check.text(folder, "--attention", "dense", *drawn, "1")
    print(f"drawn: {seed_1!r}")
    check.expect(seed_1 != dense, "drawn tokens write another text")
    check.expect(check.text(folder, *wide, *drawn, "1") == seed_1, "CCA with the wide window draws the dense text")
    check.expect(check.text(folder, "--attention", "dense", *drawn, "1", "--threads", "1") == seed_1, "so does a single thread")
    check.expect(check.text(folder, "--attention", "dense", *drawn, "2") != seed_1, "another seed writes another text")

    middle = len(dense) // 2
    stop = dense[middle : middle + 12]
    stopped = check.text(folder, "--attention", "dense", "--stop", stop, "--stop", "no such words")
    check.expect(stopped == dense[: dense.index(stop)], f"the text ends before {stop!r}")

    with tempfile.TemporaryDirectory() as temporary:
        encode = tokenizer(GGUFReader(folder / "model.gguf")).encode
        chat = with_prompt(folder, Path(temporary) / "chat", encode(CHAT).ids)
        pieces, report = check.pieces(chat, "--attention", "dense")
        check.expect("the model ended it with <|im_end|>" in report, f"{b''.join(pieces).decode()!r} ends by itself")

        prompt = encode(FRUITS).ids
        pieces, report = check.pieces(with_prompt(folder, Path(temporary) / "fruits", prompt), "--attention", "dense")
        text = b"".join(pieces).decode()
        tokens = int(re.search(r"\[(\d+) tokens", report).group(1))
        check.expect(not text.isascii() and len(pieces) > tokens // 2, f"{text!r} comes in {len(pieces)} pieces")
        check.expect(all(map(whole_characters, pieces)), "each of them is whole characters")
    sys.exit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
