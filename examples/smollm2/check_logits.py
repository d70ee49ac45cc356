"""Compares the logits of `smollm2`, with dense attention, with those that transformers computes from the same GGUF.

transformers shares nothing with the C++ program: it reads and dequantises the GGUF by itself, rotates with the other
pairing of RoPE, and tokenises with its own reading of the vocabulary. Both compute in float32, so both are off by
rounding. How much rounding there is, a third computation tells: transformers in float64. The program passes if its
distance from float64 is at most twice that of transformers in float32, for the largest difference over all logits and
for the root of the mean square. A norm with twice its epsilon is a hundred times beyond that.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

ALLOWED = 2.0  # times the float32 rounding of transformers


def program_logits(program: Path, folder: Path, tokens: int) -> np.ndarray:
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([program.resolve(), folder, "--tokens", str(tokens), "--dump-logits", file.name], check=True)
        return np.fromfile(file.name, dtype=np.float32).reshape(tokens, -1)


class ExactRotation(torch.nn.Module):
    """RoPE's cosines and sines, for transformers in float64: its own have float32's angles whatever the model's type."""

    def __init__(self, base: float, head_dim: int) -> None:
        super().__init__()
        self.frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, _: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def transformers_logits(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In float32 and in float64."""
    model = LlamaForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    batch = torch.tensor(tokens, dtype=torch.long)[None]
    with torch.no_grad():
        single = model(batch).logits[0].numpy()
        model.double().model.rotary_emb = ExactRotation(model.config.rope_parameters["rope_theta"], model.config.head_dim)
        return single, model(batch).logits[0].numpy()


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    successors = torch.tensor(tokens[1:], dtype=torch.long)
    return torch.nn.functional.cross_entropy(torch.tensor(logits[:-1], dtype=torch.float64), successors).exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built smollm2")
    parser.add_argument("folder", type=Path, help="what prepare.py has written")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the text, from its start (default 512)")
    arguments = parser.parse_args()

    tokens = load_file(arguments.folder / "text.safetensors")["tokens"]
    text = (arguments.folder / "text.txt").read_text(encoding="utf-8")
    if AutoTokenizer.from_pretrained(arguments.folder, gguf_file="model.gguf").encode(text) != tokens.tolist():
        sys.exit("FAILED: transformers tokenises the text in another way")
    print(f"the {len(tokens)} tokens of the text are the same")

    tokens = tokens[: arguments.tokens]
    ours = program_logits(arguments.program, arguments.folder, len(tokens))
    theirs, exact = transformers_logits(arguments.folder, tokens)
    if ours.shape != theirs.shape:
        sys.exit(f"FAILED: the program's logits are {ours.shape}, those of transformers {theirs.shape}")

    def error(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
        difference = np.abs(logits.astype(np.float64) - reference)
        return np.array([difference.max(), np.sqrt((difference**2).mean())])

    print(f"{exact.size} logits of {len(tokens)} tokens, between {exact.min():.2f} and {exact.max():.2f}")
    print(f"{'':44} largest difference  root mean square")
    pairs = {
        "smollm2 and transformers, both float32": (ours, theirs),
        "smollm2 and transformers in float64": (ours, exact),
        "transformers in float32 and in float64": (theirs, exact),
    }
    errors = {label: error(*pair) for label, pair in pairs.items()}
    for label, (largest, mean) in errors.items():
        print(f"{label:44} {largest:18.2e}  {mean:16.2e}")
    scale = np.sqrt((exact**2).mean())
    relative = errors["smollm2 and transformers, both float32"] / scale
    print(f"{'the first line, relative to the rms logit':44} {relative[0]:18.2e}  {relative[1]:16.2e}")
    print(f"perplexity: smollm2 {perplexity(ours, tokens):.6f}, transformers {perplexity(theirs, tokens):.6f}")

    # Written so that a NaN fails.
    own, allowed = errors["smollm2 and transformers in float64"], ALLOWED * errors["transformers in float32 and in float64"]
    if not (own <= allowed).all():
        sys.exit(f"FAILED: the differences from float64 are {own}, wanted at most {allowed}")
    print(f"passed: within {ALLOWED} times the float32 rounding of transformers")


if __name__ == "__main__":
    main()
