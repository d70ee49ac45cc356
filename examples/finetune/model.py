"""Models whose attention cca computes, what a token sees in them, and their losses."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import cca.hf
import data  # noqa: F401: makes prepare.py known

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
QUERY_HEADS = {"smollm2": 3, "small": 2}  # per key/value head


def load_tokenizer(folder):
    import prepare
    from gguf import GGUFReader

    return prepare.tokenizer(GGUFReader(folder / "model.gguf"))


def load_model(folder: Path, name: str, seed: int):
    """SmolLM2-135M-Instruct, or a small model with random weights and the same tokens."""
    cca.hf.register()
    if name == "smollm2":
        return LlamaForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="cca"
        )
    torch.manual_seed(seed)
    return LlamaForCausalLM(small_config(vocab_size=49152))


def small_config(vocab_size, hidden_size=128, layers=4):
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="cca",
    )  # fmt: skip


def trained_parameters(model, which: str):
    """The parameters that are trained, by name: "qkvo" are the projections of attention. The others need no gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which == "all" or any(part in name for part in PROJECTIONS))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Seen:
    """What a token sees: attention is "dense", "window" (with sink tokens) or "cca"."""

    attention: str = "dense"
    group_size: int = 16
    window: int = 128
    sink_tokens: int = 4
    core_heads: str = "per_kv_head"
    core_bias: str = "none"
    pool: str = "last_query"

    def settings(self) -> dict:
        if self.attention == "dense":
            return {}
        near = {"window": self.window, "sink_tokens": self.sink_tokens}
        if self.attention == "window":
            return near
        return near | {name: getattr(self, name) for name in ("group_size", "core_heads", "core_bias", "pool")}

    def entries(self, length: int, query_heads: int = 1) -> int:
        """Keys that the last token of so many sees, per key/value head, which has so many query heads: what a cache holds."""
        far = max(0, length - self.sink_tokens - self.window)
        if self.attention == "dense" or far == 0:
            return length
        near = self.sink_tokens + self.window
        if self.attention == "window":
            return near
        copies = query_heads if self.core_heads == "per_query_head" else 1
        return near + copies * (far // self.group_size) + far % self.group_size

    def window_of_equal_bytes(self, length: int, query_heads: int = 1) -> "Seen":
        """The window alone that keeps as many entries as these cores and their window do."""
        window = self.entries(length, query_heads) - self.sink_tokens
        return Seen("window", window=window, sink_tokens=self.sink_tokens)

    def label(self) -> str:
        if self.attention == "dense":
            return "dense"
        near = f"s={self.window} m={self.sink_tokens}"
        if self.attention == "window":
            return f"window {near}"
        more = {"per_query_head": ", per query head"}.get(self.core_heads, "")
        more += {"last_query": ""}.get(self.pool, f", {self.pool}")
        return f"CCA g={self.group_size} {near}" + more + ("" if self.core_bias == "none" else f", {self.core_bias}")


def hidden_states(model, ids: np.ndarray, seen: Seen):
    """The last layer's, [length, hidden size]"""
    with cca.hf.settings(**seen.settings()):
        return model.model(torch.as_tensor(ids)[None], use_cache=False).last_hidden_state[0]


def text_losses(model, ids: np.ndarray, seen: Seen, part=512):
    """Of each token but the first, in nats."""
    hidden, next_ids = hidden_states(model, ids, seen)[:-1], torch.as_tensor(ids)[1:]
    return torch.cat([
        functional.cross_entropy(model.lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(hidden.split(part), next_ids.split(part))
    ])  # fmt: skip


def answer_losses(model, ids: np.ndarray, answers, seen: Seen):
    """For each answer (losses of its tokens, whether each is the likeliest). Only there logits are computed."""
    places = np.concatenate([np.arange(answer.begin, answer.end) for answer in answers])
    logits = model.lm_head(hidden_states(model, ids, seen)[places - 1]).float()
    targets = torch.as_tensor(ids[places])
    losses = functional.cross_entropy(logits, targets, reduction="none")
    right = logits.argmax(-1) == targets
    sizes = [answer.end - answer.begin for answer in answers]
    return list(zip(losses.split(sizes), right.split(sizes)))


def distance_to_dense(model, dense_model, ids: np.ndarray, seen: Seen, part=512):
    """(losses of `text_losses`, the divergence of the dense model's predictions from ours, in nats), of each token"""
    ours, next_ids = hidden_states(model, ids, seen)[:-1], torch.as_tensor(ids)[1:]
    with torch.no_grad():
        theirs = hidden_states(dense_model, ids, Seen())[:-1]
    losses, divergences = [], []
    for mine, dense, targets in zip(ours.split(part), theirs.split(part), next_ids.split(part)):
        log = functional.log_softmax(model.lm_head(mine).float(), -1)
        with torch.no_grad():
            wanted = functional.log_softmax(dense_model.lm_head(dense).float(), -1)
        losses.append(functional.nll_loss(log, targets, reduction="none"))
        divergences.append(functional.kl_div(log, wanted, reduction="none", log_target=True).sum(-1))
    return torch.cat(losses), torch.cat(divergences)
