#!/usr/bin/env python3
"""The losses of several trainings, from the log that each leaves in its folder: a table, and curves as SVG.

    python plot.py curves.svg dense cca window mean
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cca", "font.size": 9})
import matplotlib.pyplot as plt

SMOOTHING = 0.9  # of the training losses, each of which is of one batch
SPACING = 10  # steps between those that are drawn


def label(settings: dict) -> str:
    """What the context of a token was."""
    groups = f"g={settings['group_size']}, s={settings['window']}"
    names = {"dense": "dense", "cca": f"CCA, {groups}", "window": f"window alone, {groups}"}
    return names.get(settings["attention"], f"CCA with {settings['attention']} pooling, {groups}")


def smoothed(losses: list) -> list:
    mean, means = losses[0], []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean)
    return means


def print_table(runs: list) -> None:
    first_steps, first_loss = runs[0]["log"]["validation"][-1]
    print("| attention | steps | validation loss | than the first | minutes | in attention, minutes |")
    print("|---|---:|---:|---:|---:|---:|")
    for run in runs:
        log = run["log"]
        steps, loss = log["validation"][-1]
        change = f"{100 * (loss / first_loss - 1):+.2f} %" if steps == first_steps else "not as far"
        print(f"| {label(run['settings'])} | {steps} | {loss:.4f} | {change} "
              f"| {log['seconds'] / 60:.1f} | {log['attention_seconds'] / 60:.1f} |")


def draw(runs: list, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for run, colour in zip(runs, matplotlib.color_sequences["tab10"]):
        training = run["log"]["training"]
        steps = range(SPACING, len(training) + 1, SPACING)
        axes.plot(steps, smoothed(training)[SPACING - 1 :: SPACING], color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(*zip(*run["log"]["validation"]), color=colour, marker="o", markersize=3, label=label(run["settings"]))
    last = [run["log"]["validation"][-1][1] for run in runs]
    axes.set_ylim(min(last) - 0.1, 3.3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_title("validation (dots) and training (thin, smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path, help="the file to write")
    parser.add_argument("folders", type=Path, nargs="+", help="of train_lm; the others are compared with the first")
    arguments = parser.parse_args()
    runs = [json.loads((folder / "log.json").read_text()) for folder in arguments.folders]
    if any(not run["log"]["validation"] for run in runs):
        parser.error("a training without a validation has no curve")
    print_table(runs)
    draw(runs, arguments.svg)


if __name__ == "__main__":
    main()
