#!/usr/bin/env python3
"""Tunes SmolLM2-135M with Core Context Aware attention in its loss, or with that of a control: dense, or a window.

    pip install ./examples/python -r examples/finetune/requirements.txt
    python examples/smollm2/prepare.py build/smollm2-data
    python examples/finetune/finetune.py build/smollm2-data runs/cca --attention cca --groups 16 --windows 64
    python examples/finetune/finetune.py build/smollm2-data runs/dense --attention dense

A step is one part of a text, for which the loss is that of every token, and one sequence of recall tasks, for which it is
that of the answers' tokens. What a step trains on depends on the seed and its number alone: every attention gets the same,
and a run that goes on where it stopped, with the same command, ends as one that was never stopped. Each line of log.jsonl
is a step, or an evaluation at the target: the first of the groups and the first of the windows.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as models
import tasks
from recall import recall


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what ../smollm2/prepare.py has written")
    parser.add_argument("run", type=Path, help="a folder for checkpoint and log; one that is there goes on")
    parser.add_argument("--model", choices=["smollm2", "small"], default="smollm2", help="small: random weights")
    parser.add_argument("--attention", choices=["cca", "dense", "window"], default="cca")
    parser.add_argument("--groups", type=int, nargs="+", default=[16], help="of which each step draws one")
    parser.add_argument("--windows", type=int, nargs="+", default=[64], help="the same; a window alone gets equal bytes")
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--core-heads", choices=["per_kv_head", "per_query_head"], default="per_kv_head")
    parser.add_argument("--core-bias", choices=["none", "entropy"], default="none")
    parser.add_argument("--pool", choices=["last_query", "mean", "max", "select"], default="last_query")
    parser.add_argument("--train", choices=["qkvo", "all"], default="qkvo", help="which weights")
    parser.add_argument("--steps", type=int, default=60, help="until the learning rate has come down")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warm-up", type=int, default=5, help="steps")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--length", type=int, default=1024, help="of recall sequences and of all that is evaluated")
    parser.add_argument("--questions", type=int, default=6, help="in a recall sequence of training")
    parser.add_argument("--distill", type=float, default=0, help="weight of the distance to the dense model's predictions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluate", type=int, default=20, help="steps from one evaluation to the next")
    parser.add_argument("--count", type=int, default=4, help="recall sequences a task, and parts a text, of an evaluation")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in products of matrices")
    parser.add_argument("--until", type=int, help="stop at this step; the same command without it goes on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


# What may differ between the pieces of a run.
PIECE = ("folder", "run", "until", "minutes", "threads")


def target(args) -> models.Seen:
    """What a token sees in an evaluation."""
    seen = models.Seen("cca", args.groups[0], args.windows[0], args.sink_tokens, args.core_heads, args.core_bias, args.pool)
    equal = seen.window_of_equal_bytes(args.length, models.QUERY_HEADS[args.model])
    return {"cca": seen, "dense": models.Seen(), "window": equal}[args.attention]


def seen_at(args, step) -> models.Seen:
    """What a token sees in a step of the training."""
    seen = target(args)
    if args.attention != "cca":
        return seen
    rng = np.random.default_rng([args.seed, 3, step])
    drawn = {"group_size": int(rng.choice(args.groups)), "window": int(rng.choice(args.windows))}
    return models.Seen(**{**vars(seen), **drawn})


def learning_rate(args, step) -> float:
    """Rises in the warm-up, and then comes down to a tenth on a cosine."""
    if step < args.warm_up:
        return args.lr * (step + 1) / args.warm_up
    done = min(1, (step - args.warm_up) / max(1, args.steps - args.warm_up))
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * done))


class Trainer:
    def __init__(self, args, model, tokenizer, texts, dense_model=None):
        self.args, self.model, self.dense_model = args, model, dense_model
        self.tokenizer, self.texts = tokenizer, texts
        self.writer = tasks.Writer(tokenizer, "train")
        self.trained = models.trained_parameters(model, args.train)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
        self.step = 0

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32)

    def backward_text(self, seen) -> dict[str, float]:
        rng = np.random.default_rng([self.args.seed, 2, self.step])
        ids = data.random_part(self.texts["train"], self.args.text_length, rng)
        with self.autocast():
            if self.dense_model is None:
                loss = total = models.text_losses(self.model, ids, seen).mean()
            else:
                losses, divergences = models.distance_to_dense(self.model, self.dense_model, ids, seen)
                loss, distance = losses.mean(), divergences.mean()
                total = loss + self.args.distill * distance
        total.backward()
        return {"text": loss.item()} | ({} if self.dense_model is None else {"distance": distance.item()})

    def backward_recall(self, seen) -> dict[str, float]:
        args = self.args
        ids, answers = tasks.training_sequence(
            self.writer, self.texts["train"], args.seed, self.step, args.length, args.questions
        )
        with self.autocast():
            found = models.answer_losses(self.model, ids, answers, seen)
            # Each answer weighs the same: that of a copy has 28 tokens, that of a pair of words one.
            loss = torch.stack([losses.mean() for losses, _ in found]).mean()
        loss.backward()
        return {"recall": loss.item(), "right": torch.cat([right for _, right in found]).double().mean().item()}

    def train_step(self) -> dict:
        start, seen = time.perf_counter(), seen_at(self.args, self.step)
        self.model.train()
        self.optimizer.zero_grad()
        entry = {"step": self.step + 1, "g": seen.group_size, "s": seen.window}
        entry |= self.backward_text(seen) | (self.backward_recall(seen) if self.args.questions else {})
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        rate = learning_rate(self.args, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        rounded = {name: round(x, 4) for name, x in entry.items()}
        return rounded | {"norm": round(norm.item(), 3), "lr": rate, "seconds": round(time.perf_counter() - start, 2)}

    @torch.no_grad()
    def evaluate(self) -> dict:
        args, seen, texts = self.args, target(self.args), self.texts["validation"]
        self.model.eval()
        with self.autocast():
            losses = {
                name: round(torch.cat([models.text_losses(self.model, ids, seen) for ids in parts]).double().mean().item(), 4)
                for name, parts in data.spread_parts(texts, args.length, args.count).items()
            }
            found = []
            if args.questions:
                found = recall(
                    self.model, seen, self.tokenizer, texts, seed=0, length=args.length, count=args.count
                )
        mean = round(sum(losses.values()) / len(losses), 4)
        return {"step": self.step, "validation": mean, "by_text": losses, "label": seen.label(), "recall": found}

    def save(self, folder: Path):
        state = {"step": self.step, "settings": settings(self.args), "optimizer": self.optimizer.state_dict(),
                 "weights": {name: parameter.detach() for name, parameter in self.trained.items()}}  # fmt: skip
        torch.save(state, folder / "checkpoint.new")
        (folder / "checkpoint.new").replace(folder / "checkpoint.pt")

    def resume(self, folder: Path):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        if state["settings"] != settings(self.args):
            changed = {k for k, v in settings(self.args).items() if state["settings"].get(k) != v}
            raise SystemExit(f"finetune.py: run: got a checkpoint of other settings: {', '.join(sorted(changed))}")
        load_weights(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def settings(args) -> dict:
    """What a checkpoint is of."""
    return {name: value for name, value in vars(args).items() if name not in PIECE}


@torch.no_grad()
def load_weights(model, weights):
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def load_trained(model, run: Path):
    """Puts the weights that a run has trained into a model."""
    load_weights(model, torch.load(run / "checkpoint.pt", weights_only=True)["weights"])


def forget_after(log: Path, step: int):
    """Takes out of a log what came behind the checkpoint, in a piece that did not come to its end."""
    lines = log.read_text(encoding="ascii").splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step), encoding="ascii")


def run(trainer: Trainer, folder: Path):
    """Trains until the last step, or the end of this piece."""
    args, start = trainer.args, time.monotonic()
    last = min(args.steps, args.until or args.steps)
    with (folder / "log.jsonl").open("a", encoding="ascii") as log:

        def write(entry):
            print(json.dumps(entry), file=log, flush=True)

        def evaluate():
            entry = trainer.evaluate()
            write(entry)
            accuracy = [x["accuracy"] for x in entry["recall"]]
            tqdm.write(f"step {entry['step']}: validation {entry['validation']}"
                       + (f", recall {100 * sum(accuracy) / len(accuracy):.0f} %" if accuracy else ""))  # fmt: skip

        if trainer.step == 0:
            entries = target(args).entries(args.length, models.QUERY_HEADS[args.model])
            write({"settings": settings(args), "target": target(args).label(), "entries": entries})
            evaluate()
        with tqdm(total=last, initial=trainer.step) as bar:
            while trainer.step < last and time.monotonic() - start < 60 * args.minutes:
                entry = trainer.train_step()
                write(entry)
                bar.set_postfix(text=entry["text"], recall=entry.get("recall"))
                bar.update()
                if trainer.step % args.evaluate == 0 or trainer.step == args.steps:
                    evaluate()
                    trainer.save(folder)
    trainer.save(folder)


def main():
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer = models.load_tokenizer(args.folder)
    model = models.load_model(args.folder, args.model, args.seed)
    dense = models.load_model(args.folder, args.model, args.seed).eval() if args.distill else None
    trainer = Trainer(args, model, tokenizer, data.load_texts(args.folder, tokenizer), dense)
    if (args.run / "checkpoint.pt").exists():
        trainer.resume(args.run)
        forget_after(args.run / "log.jsonl", trainer.step)
    run(trainer, args.run)


if __name__ == "__main__":
    main()
