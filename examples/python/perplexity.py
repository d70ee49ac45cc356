#!/usr/bin/env python3
"""The perplexity of a language model over the position in its text, dense and with Core Context Aware attention.

    pip install ./examples/python torch transformers matplotlib
    python examples/python/perplexity.py MODEL TEXT --tokens 8192 --plot perplexity.svg

MODEL is a name or a folder of transformers, TEXT a file of text. Prints a table; --plot draws it. For the model of
../smollm2 (whose prepare.py writes the folder): perplexity.py build/smollm2-data build/smollm2-data/text.txt --gguf model.gguf
"""

import argparse
import math
import time

# %% What is compared: the settings of cca.hf, see cca.Options.
SETTINGS = {
    "dense": {},
    "window": {"window": 1024, "sink_tokens": 4},
    "cca": {"group_size": 16, "window": 1024, "sink_tokens": 4},
    "cca, cores per kv head": {"group_size": 16, "window": 1024, "sink_tokens": 4, "core_heads": "per_kv_head"},
    "cca, selected": {"group_size": 16, "window": 1024, "sink_tokens": 4, "pool": "select"},
}


# %% One model, whose attention is swapped.
def losses(model, ids, options):
    """Nats of each token but the first, and the seconds that the model took."""
    import torch

    import cca.hf

    with torch.no_grad(), cca.hf.settings(**options):
        start = time.perf_counter()
        logits = model(ids, use_cache=False).logits[0, :-1]
        seconds = time.perf_counter() - start
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none"), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bins", type=int, default=8, help="of positions")
    parser.add_argument("--plot", help="a file for matplotlib")
    parser.add_argument("--gguf", help="the file of MODEL that holds it, where it is of this kind")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cca.hf

    cca.hf.register()
    source = {} if args.gguf is None else {"gguf_file": args.gguf}
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="cca", **source).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
    with open(args.text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[:, : args.tokens]

    curves = {}
    for name, options in SETTINGS.items():
        nats, seconds = losses(model, ids, options)
        curves[name] = [math.exp(part.mean()) for part in nats.chunk(args.bins)]
        whole = f"perplexity {math.exp(nats.mean()):7.3f}, {seconds:6.1f} s"
        print(f"{name:24} {whole}   by position: " + " ".join(f"{x:7.2f}" for x in curves[name]))

    if args.plot:
        import matplotlib.pyplot as plt

        places = [(i + 0.5) * ids.shape[1] / args.bins for i in range(args.bins)]
        for name, curve in curves.items():
            plt.plot(places[: len(curve)], curve, label=name)
        plt.xlabel("position")
        plt.ylabel("perplexity")
        plt.legend()
        plt.savefig(args.plot)


if __name__ == "__main__":
    main()
