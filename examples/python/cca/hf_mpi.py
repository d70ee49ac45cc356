"""Models of Hugging Face's transformers across the ranks of an MPI communicator: each holds some tokens of every sequence.

    cca.hf_mpi.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cca_mpi")
    mine, positions = layout.places_of(ranks.rank), layout.positions_of(ranks.rank)
    with cca.hf_mpi.across(ranks, layout):
        logits = model(ids[:, mine], position_ids=torch.tensor([positions])).logits

Every rank has the same weights and makes the same calls, on its own tokens: a batch of 1, the tokens of its segments one
after the other. Settings are those of `cca.hf`. All but attention is a token's own, so that this is all that is sent; a loss
and the gradients of weights are those of the rank's tokens, and for the caller to add up.

What one rank refuses, all do. There is no cache, and no padding: the layout says which tokens there are.
"""

import contextlib
import contextvars

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from . import hf, mpi

__all__ = ["across", "register"]

_across = contextvars.ContextVar("ranks and layout of cca", default=None)


def register(name: str = "cca_mpi") -> None:
    """Makes `attn_implementation=name` known to transformers: the attention and, beside it, its mask."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


@contextlib.contextmanager
def across(ranks: mpi.Ranks, layout: mpi.Layout):
    """The tokens of models inside of `with` are those that the layout gives this rank. Backward passes that compute a layer
    anew, as gradient checkpointing does, are inside, too."""
    positions = torch.tensor([layout.positions_of(ranks.rank)], dtype=torch.int64)
    token = _across.set((ranks, layout, positions))
    try:
        yield
    finally:
        _across.reset(token)


def _here():
    here = _across.get()
    if here is None:
        raise RuntimeError("cca: attention across ranks: got none, wants `with cca.hf_mpi.across(ranks, layout)` around it")
    return here


def attention_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, attention_mask=None, **_
):
    """The mask of `cca_mpi`: None, since the layout says who sees whom; where layers have a sliding window, what `cca.hf`
    keeps it in."""
    ranks, _, positions = _here()
    with mpi._together(ranks):
        window = hf._understand(mask_function).get("window")
        if int(q_offset) != 0 or kv_length != positions.shape[1]:
            hf._refuse("cache", f"{kv_length} tokens", f"none: the rank's own {positions.shape[1]} tokens alone")
        if attention_mask is not None and not bool(attention_mask.all()):
            hf._refuse("attention_mask", "padding", "none: a layout of the tokens that there are")
        if window is None:
            return None
        ids = torch.ones(batch_size, kv_length, dtype=torch.int64)
        ids.cca_window = window
        return ids


def attention_forward(module, query, key, value, attention_mask, *, position_ids=None, **more):
    """transformers' attention function, as `cca.hf.attention_forward`, of a rank's own tokens."""
    ranks, layout, positions = _here()
    with mpi._together(ranks):
        options, sink_logits = hf._understood(module, query, attention_mask, globals()["attention_mask"], **more)
        options.pop("first_position", None)  # the layout says the positions
        if getattr(key, "cca_layer", None) is not None:
            hf._refuse("cache", "cca.hf.Cache", "none across ranks")
        if position_ids is None or not torch.equal(position_ids.to("cpu", torch.int64), positions):
            hf._refuse("position_ids", "others than the layout's", "[layout.positions_of(ranks.rank)]")
    value = hf._of_one_type(query, value)
    out = mpi.attention(ranks, layout, query, key, value, sink_logits=_kept_once(ranks, sink_logits), **options)
    return out.transpose(1, 2), None


def _kept_once(ranks, sink_logits):
    """Each rank gets the gradient of all of them. One keeps it: the gradients of a model's weights will be added up."""
    if sink_logits is None or not sink_logits.requires_grad or ranks.rank == 0:
        return sink_logits
    sink_logits = sink_logits.view_as(sink_logits)
    sink_logits.register_hook(torch.zeros_like)
    return sink_logits
