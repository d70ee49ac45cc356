#!/usr/bin/env python3
"""Draws what "Choosing g, s and m" shows: perplexity against bytes, recall against distance, and against steps the loss on
text and, by group size, the loss of answers.

    python examples/finetune/plot.py cmake/docs perplexity
    python examples/finetune/plot.py cmake/docs recall examples/finetune/logs/recall.jsonl
    python examples/finetune/plot.py cmake/docs loss examples/finetune/logs/{dense,cca,window}.jsonl
    python examples/finetune/plot.py cmake/docs answers examples/finetune/logs/{dense,cca,window}.jsonl
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cca", "font.size": 9})
import matplotlib.pyplot as plt

TABLE = Path(__file__).parent.parent / "smollm2" / "README.md"
# A row of its first table: | attention | perplexity | KV entries, % of dense |. Those at equal bytes have more columns.
ROW = re.compile(r"^\| ([^|]+) \| (\d+\.\d+) \| (\d+\.\d) \|$", re.MULTILINE)


def family(label: str) -> str | None:
    """Which curve a row of the table is on; None: of those without sink tokens, which are off the chart."""
    if label == "dense":
        return label
    if "m=4" not in label:
        return None
    kind = "window and sink tokens" if label.startswith("window") else "CCA, " + (
        "cores per kv head" if "shared" in label else "cores per query head")  # fmt: skip
    more = label.rsplit(", ", 1)[-1] if label.count(",") > 1 else ""
    return kind + (f", {more}" if more and more != "shared cores" else "")


def draw_perplexity(axes, _):
    curves = {}
    for label, perplexity, percent in ROW.findall(TABLE.read_text(encoding="utf-8")):
        if (name := family(label.strip())) is not None:
            curves.setdefault(name, []).append((float(percent), float(perplexity)))
    dense = curves.pop("dense")[0][1]
    axes.axhline(dense, color="black", linewidth=0.8, label="dense")
    for name, points in curves.items():
        line = "-" if name.startswith("window") else ""
        axes.plot(*zip(*sorted(points)), linestyle=line, marker="o", markersize=4, label=name)
    axes.set_xlabel("entries of the cache, % of dense")
    axes.set_ylabel("perplexity, 8192 tokens of a book")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def mean_by_distance(found: list[dict]) -> tuple[list, list]:
    """(distances, accuracies in percent): the mean over the tasks."""
    distances = sorted({x["distance"] for x in found})
    of = lambda distance: [100 * x["accuracy"] for x in found if x["distance"] == distance]
    return distances, [sum(of(distance)) / len(of(distance)) for distance in distances]


def rows_of(entries: list[dict]) -> list[dict]:
    """Those of recall.py, or the last evaluation of a training."""
    rows = [x for x in entries if "label" in x]  # a step has none
    return rows[-1:] if "settings" in entries[0] else rows


def draw_recall(axes, logs):
    for row in (row for log in logs for row in rows_of(read(log))):
        axes.plot(*mean_by_distance(row["recall"]), marker="o", markersize=4, label=row["label"])
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distance of the answer, tokens")
    axes.set_ylabel("tokens of answers that are right, %")


def draw_loss(axes, logs):
    for log, colour in zip(logs, matplotlib.color_sequences["tab10"]):
        head, *entries = read(log)
        steps = [(x["step"], x["text"]) for x in entries if "text" in x]
        validation = [(x["step"], x["validation"]) for x in entries if "validation" in x]
        if steps:
            axes.plot(*zip(*steps), color=colour, linewidth=0.6, alpha=0.4)
        axes.plot(*zip(*validation), color=colour, marker="o", markersize=4, label=head["target"])
    axes.set_xlabel("step")
    axes.set_ylabel("loss on text, nats a token: validation (dots), training (thin)")


def means_by_group(steps: list[dict], part=50) -> dict[int, tuple[list, list]]:
    """For each group size that steps drew, ([the last step of each part], [the mean loss of answers in it])."""
    losses = {}
    for entry in steps:
        end = -(-entry["step"] // part) * part
        losses.setdefault(entry["g"], {}).setdefault(end, []).append(entry["recall"])
    return {g: (list(parts), [sum(x) / len(x) for x in parts.values()]) for g, parts in sorted(losses.items())}


def draw_answers(axes, logs):
    for log in logs:
        head, *entries = read(log)
        for g, points in means_by_group([x for x in entries if "text" in x]).items():
            label = f"CCA g={g}" if head["settings"]["attention"] == "cca" else head["target"]
            axes.plot(*points, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of answers in training, nats a token, mean of 50 steps")


CHARTS = {"perplexity": draw_perplexity, "recall": draw_recall, "loss": draw_loss, "answers": draw_answers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where choosing_CHART.svg goes")
    parser.add_argument("chart", choices=CHARTS)
    parser.add_argument("logs", type=Path, nargs="*")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    CHARTS[args.chart](axes, args.logs)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(args.folder / f"choosing_{args.chart}.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
