#!/usr/bin/env python3
"""Recall by distance: how many tokens of answers a model finds that stand far before the question, and their loss.

    pip install ./examples/python -r examples/finetune/requirements.txt
    python examples/smollm2/prepare.py build/smollm2-data
    python examples/finetune/recall.py build/smollm2-data --log recall.jsonl

Each row is what a token sees: `dense`, `window/S`, or `cca/G/S`, behind which may stand `/select`, `/entropy` or
`/per_query_head`. With --checkpoint the weights are those that finetune.py has trained.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

import data
import model as models
import tasks

ROWS = "dense,window/64,window/123,cca/16/64,cca/8/64,cca/4/64,cca/16/64/select,cca/16/64/per_query_head"


def default_distances(length: int) -> list[int]:
    """From within a window of a sixteenth of the length, where a needle finds room in it, to nearly the length."""
    near = [length // 16 - 4] if length >= 1024 else []
    return near + [length // 8, length // 4, length // 2, length * 7 // 8]


def seen_of(row: str, sink_tokens: int) -> models.Seen:
    kind, *rest = row.split("/")
    numbers, words = [int(x) for x in rest if x.isdigit()], [x for x in rest if not x.isdigit()]
    if kind not in ("dense", "window", "cca") or len(numbers) != {"dense": 0, "window": 1, "cca": 2}.get(kind):
        raise SystemExit(f"recall.py: --rows: got {row}, wants dense, window/S or cca/G/S")
    sizes = dict(zip({"window": ["window"], "cca": ["group_size", "window"]}.get(kind, []), numbers))
    options = {"select": {"pool": "select"}, "entropy": {"core_bias": "entropy"},
               "per_query_head": {"core_heads": "per_query_head"}}  # fmt: skip
    more = {name: x for word in words for name, x in options[word].items()}
    return models.Seen(kind, sink_tokens=sink_tokens, **sizes, **more)


@torch.no_grad()
def recall(model, seen, tokenizer, texts, *, seed=0, distances=None, length=1024, count=8, names=tuple(tasks.TASKS)):
    """[{"task", "distance", "tokens", "accuracy", "loss"}]: means over the answers' tokens of `count` sequences a task."""
    writer, found = tasks.Writer(tokenizer, "test"), []
    distances = distances or default_distances(length)
    for task in names:
        results = {distance: ([], []) for distance in distances}
        for ids, answers in tasks.recall_sequences(writer, texts, seed, task, distances, length, count):
            for answer, (losses, right) in zip(answers, models.answer_losses(model, ids, answers, seen)):
                results[answer.distance][0].append(losses)
                results[answer.distance][1].append(right)
        for distance, (losses, right) in results.items():
            found.append({
                "task": task, "distance": int(distance), "tokens": sum(map(len, right)),
                "accuracy": round(torch.cat(right).double().mean().item(), 4),
                "loss": round(torch.cat(losses).double().mean().item(), 4),
            })  # fmt: skip
    return found


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown: accuracy in percent and loss by distance, a line for each row and task."""
    distances = sorted({x["distance"] for found in rows.values() for x in found})
    lines = ["| attention | task | " + " | ".join(map(str, distances)) + " |", "|---|---|" + "---:|" * len(distances)]
    for label, found in rows.items():
        for task in dict.fromkeys(x["task"] for x in found):
            cells = {x["distance"]: f"{100 * x['accuracy']:.0f} % ({x['loss']:.2f})" for x in found if x["task"] == task}
            lines.append(f"| {label} | {task} | " + " | ".join(cells[distance] for distance in distances) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what ../smollm2/prepare.py has written")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--distances", type=int, nargs="+")
    parser.add_argument("--count", type=int, default=8, help="sequences a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in products of matrices")
    parser.add_argument("--checkpoint", type=Path, help="a folder of finetune.py")
    parser.add_argument("--log", type=Path, help="JSON lines are added to it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer, model = models.load_tokenizer(args.folder), None
    model = models.load_model(args.folder, "smollm2", args.seed).eval()
    if args.checkpoint:
        from finetune import load_trained

        load_trained(model, args.checkpoint)
    texts, rows = data.load_texts(args.folder, tokenizer)["validation"], {}
    for row in tqdm(args.rows.split(",")):
        seen = seen_of(row, args.sink_tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            rows[seen.label()] = recall(model, seen, tokenizer, texts, seed=args.seed, distances=args.distances,
                                        length=args.length, count=args.count)  # fmt: skip
        if args.log:
            with args.log.open("a", encoding="ascii") as log:
                entries = seen.entries(args.length, models.QUERY_HEADS["smollm2"])
                print(json.dumps({"row": row, "label": seen.label(), "entries": entries, "length": args.length,
                                  "seed": args.seed, "recall": rows[seen.label()]}), file=log)  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
