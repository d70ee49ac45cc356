#!/usr/bin/env python3
"""Attention of layers of models, by cca and by transformers' eager attention.

    pip install torch numpy transformers
    python tests/tools/transformers_layers.py build/release/tests/gradient_run

Layers of gpt-oss and Gemma 2, made from transformers' own configuration with random weights, run over random hidden
states. What reaches eager attention (query, key, value, mask, sinks) and what it answers is taken down; cca gets the same
query, key and value and options in place of the mask. The truth is eager attention in double; the error (root of the
mean square) may be twice that of eager attention in float, plus float rounding: the rule of the other tests. Gradients
come from autograd, of query, key, value and, where there are any, sink logits. Ends with 1 where something does not agree.
"""

import argparse
import subprocess
import sys

import numpy as np
import torch
from transformers import Gemma2Config, GptOssConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

# What cca is told of a layer beside its shape.
FAMILIES = {
    "gpt-oss": (GptOssConfig(), modeling_gpt_oss, "GptOssAttention", "GptOssRotaryEmbedding", lambda config: {}),
    "Gemma 2": (
        Gemma2Config(),
        modeling_gemma2,
        "Gemma2Attention",
        "Gemma2RotaryEmbedding",
        lambda config: {
            "softcap": config.attn_logit_softcapping,
            "softmax_scale": config.query_pre_attn_scalar**-0.5,
        },
    ),
}
# family, layer, tokens, whether to go backward, which takes several times the memory
CASES = [
    ("gpt-oss", 0, 1000, True),  # sliding_attention
    ("gpt-oss", 1, 1000, True),  # full_attention
    ("Gemma 2", 0, 4200, False),  # more tokens than its window of 4096
    ("Gemma 2", 1, 1000, True),
]


def layer_call(family, index, length):
    """What reaches eager attention in a layer of the family: (module, query, key, value, mask, keyword arguments)."""
    config, modeling, attention, rotary, _ = FAMILIES[family]
    config._attn_implementation = "eager"
    layer = getattr(modeling, attention)(config, index)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1)
    hidden = 2 * torch.randn(1, length, config.hidden_size)
    positions = torch.arange(length)[None]
    make_mask = create_sliding_window_causal_mask if layer.sliding_window else create_causal_mask
    mask = make_mask(config, hidden, None, None, position_ids=positions)
    taken = []
    eager = modeling.eager_attention_forward

    def take(module, query, key, value, attention_mask, **more):
        taken.append((module, query, key, value, attention_mask, more))
        return eager(module, query, key, value, attention_mask, **more)

    modeling.eager_attention_forward = take
    with torch.no_grad():
        layer(hidden, getattr(modeling, rotary)(config)(hidden, positions), mask)
    modeling.eager_attention_forward = eager
    return taken[0], eager


def eager_results(call, eager, grad_out, dtype):
    """Output, and the gradients of query, key, value and sink logits where `grad_out` is given."""
    module, *operands, mask, more = call
    module = module.to(dtype)
    operands = [x.to(dtype).requires_grad_(grad_out is not None) for x in operands]
    out = eager(module, *operands, mask.to(dtype), **more)[0].transpose(1, 2)
    results = [out]
    if grad_out is not None:
        wanted = operands + ([module.sinks] if hasattr(module, "sinks") else [])
        results += torch.autograd.grad(out, wanted, torch.tensor(grad_out, dtype=dtype))
    return [x.detach().double().numpy() for x in results]


def run(program, call, options, grad_out):
    """The same of cca."""
    module, query, key, value, *_ = call
    sizes = {
        "batch": query.shape[0],
        "heads": query.shape[1],
        "kv_heads": key.shape[1],
        "length": query.shape[2],
        "dim": query.shape[3],
        "value_dim": value.shape[3],
        "sinks": int(hasattr(module, "sinks")),
    }
    if module.sliding_window:
        options = options | {"window": module.sliding_window}
    sinks = module.sinks.detach().float().numpy() if sizes["sinks"] else np.zeros(0, np.float32)
    lse = (*query.shape[:3], 1)
    arrays = [*(x.float().numpy() for x in (query, key, value)), sinks, grad_out, np.zeros(lse)]
    answer = subprocess.run(
        [program, *(f"{name}={x}" for name, x in (sizes | options).items())],
        input=b"".join(np.ascontiguousarray(x, np.float32).tobytes() for x in arrays),
        capture_output=True,
        check=True,
    ).stdout
    shapes = [grad_out.shape, lse, query.shape, key.shape, value.shape, sinks.shape]
    parts = np.split(np.frombuffer(answer, np.float32), np.cumsum([np.prod(x, dtype=int) for x in shapes])[:-1])
    out, _, *gradients = (part.reshape(x).astype(np.float64) for part, x in zip(parts, shapes, strict=True))
    return [out, *gradients]


def rms(x):
    return np.sqrt(np.mean(x**2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gradient_run, built beside the tests")
    program = parser.parse_args().program

    torch.manual_seed(1)
    failures = 0
    print(f"{'error over that of eager attention in float':57}  out query   key value sinks")
    for family, index, length, backward in CASES:
        call, eager = layer_call(family, index, length)
        module, query, key = call[:3]
        grad_out = torch.randn(*query.shape[:3], call[3].shape[3]).numpy()
        ours = run(program, call, FAMILIES[family][4](module.config), grad_out)
        naive, truth = (
            eager_results(call, eager, grad_out if backward else None, dtype)
            for dtype in (torch.float32, torch.float64)
        )
        ratios = []
        for exact, textbook, kernel in zip(truth, naive, ours):
            error = rms(kernel - exact)
            failures += not error <= 2 * rms(textbook - exact) + np.finfo(np.float32).eps * rms(exact)  # NaN fails
            ratios.append(error / rms(textbook - exact))
        row = f"{family}, {query.shape[1]}/{key.shape[1]} heads of {query.shape[3]}, {length} tokens"
        row += f", window {module.sliding_window}" if module.sliding_window else ""
        print(f"{row:57}" + "".join(f" {ratio:5.2f}" for ratio in ratios))
    print("agrees" if not failures else f"{failures} results do not agree")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
