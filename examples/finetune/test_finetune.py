"""What the recall tasks, the data and the trainer promise, with a tokenizer and models of a few hundred weights."""

import json
import re
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

import cca.hf
import data
import finetune
import model as models
import numpy as np
import recall
import tasks

LETTERS = "abcdefghij"


class Tokenizer:
    """The first letter of a word, signs and digits are tokens, and so are a thousand words of the vocabulary."""

    def get_vocab(self):
        words = (f"Ġ{LETTERS[i // 100]}{LETTERS[i // 10 % 10]}{LETTERS[i % 10]}zz" for i in range(1000))
        return {chr(i): i for i in range(128)} | {word: 128 + i for i, word in enumerate(words)}

    def encode(self, text):
        return SimpleNamespace(ids=[ord(letter) for letter in re.sub(r"(?<=[A-Za-z])[a-z]+", "", text)])


VOCABULARY = 1128


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    cca.hf.register()


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return {part: {name: rng.integers(VOCABULARY, size=4000) for name in "ab"} for part in ("train", "validation")}


def small_model(seed=3):
    torch.manual_seed(seed)
    model = models.LlamaForCausalLM(models.small_config(VOCABULARY, hidden_size=32, layers=2))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that predictions are none of all tokens alike
    return model


# Tasks.


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_stand_at_their_distance(task, texts):
    writer, distances = tasks.Writer(Tokenizer(), "test"), [124, 256, 512, 1024, 1792]
    for ids, answers in tasks.recall_sequences(writer, texts["train"], 0, task, distances, 2048, 3):
        assert [answer.distance for answer in answers] == distances
        for answer in answers:
            there = slice(answer.begin - answer.distance, answer.end - answer.distance)
            assert ids[answer.begin : answer.end].tolist() == ids[there].tolist()
            # The token before it, which asks, is there as well.
            assert ids[answer.begin - 1] == ids[there.start - 1]
        assert answers[-1].end <= len(ids) == 2048


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_answer_stands_nowhere_else(task):
    item = tasks.TASKS[task](tasks.Writer(Tokenizer(), "test"), np.random.default_rng(1))
    answer = item.needle[item.needle_answer : item.needle_answer + item.answer_length]
    assert answer == item.question[item.question_answer : item.question_answer + item.answer_length]
    ids, (found,) = tasks.lay_out([item], [600], np.zeros(1000, np.int64))
    starts = [i for i in range(len(ids)) if ids[i : i + len(answer)].tolist() == answer]
    assert starts == [found.begin - 600, found.begin]


def test_the_text_goes_on_around_a_needle():
    item = tasks.TASKS["passkey"](tasks.Writer(Tokenizer(), "test"), np.random.default_rng(1))
    filler = np.arange(10_000, 11_000)
    ids, _ = tasks.lay_out([item], [600], filler)
    rest = ids[ids >= 10_000]
    assert (rest == filler[: len(rest)]).all() and len(rest) == 1000 - len(item.needle) - len(item.question)


def test_needles_do_not_overlap():
    items = [tasks.TASKS["copy"](tasks.Writer(Tokenizer(), "test"), np.random.default_rng(i)) for i in range(2)]
    size = len(items[0].needle)
    filler = np.zeros(1000, np.int64)
    assert tasks.lay_out(items, [600, 600 + 2 * size - 1], filler) is None  # the second begins in the first
    assert tasks.lay_out(items, [600, 600 + 2 * size], filler) is not None
    assert tasks.lay_out(items, [600, 1000], filler) is None  # before the sequence
    assert tasks.lay_out(items, [size - 1, 600], filler) is None  # in the questions


def test_training_and_test_share_no_answer(texts):
    train, test = (tasks.Writer(Tokenizer(), part) for part in tasks.PARTS)
    assert len(train.words) == len(test.words) == 500 and not set(train.words) & set(test.words)
    rng = np.random.default_rng(0)
    numbers = [{tuple(writer.draw_number(rng, 3)) for _ in range(3000)} for writer in (train, test)]
    assert min(map(len, numbers)) > 400 and not numbers[0] & numbers[1]


def test_a_step_says_what_it_trains_on(texts):
    writer = tasks.Writer(Tokenizer(), "train")
    draw = lambda seed, step: tasks.training_sequence(writer, texts["train"], seed, step, 1024, 6)
    (first, answers), (again, same), (other, _), (seeded, _) = draw(1, 7), draw(1, 7), draw(1, 8), draw(2, 7)
    assert (first == again).all() and answers == same and len(answers) == 6
    assert not (first == other).all() and not (first == seeded).all()


def test_the_split_shares_nothing():
    parts = data.split(np.arange(1001))
    assert np.concatenate([parts["train"], parts["validation"]]).tolist() == list(range(1001))
    assert len(parts["validation"]) == 101
    spread = data.spread_parts({"a": parts["validation"]}, 20, 3)["a"]
    assert [part[0] for part in spread] == [900, 940, 981] and all(len(part) == 20 for part in spread)


# Losses.


def test_cca_is_dense_where_nothing_is_pooled(texts):
    model, ids = small_model(), texts["train"]["a"][:200]
    dense = models.text_losses(model, ids, models.Seen())
    for group_size, window in ((1, 16), (8, 200)):
        ours = models.text_losses(model, ids, models.Seen("cca", group_size, window, 4))
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    for seen in (models.Seen("cca", 8, 16, 4), models.Seen("window", window=16)):
        assert (models.text_losses(model, ids, seen) - dense).abs().max() > 1e-3


def test_losses_are_those_of_the_next_token(texts):
    model, ids = small_model(), texts["train"]["a"][:100]
    logits = model(torch.tensor(ids)[None]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids)[1:], reduction="none")
    torch.testing.assert_close(models.text_losses(model, ids, models.Seen(), part=7), wanted)
    answers = [tasks.Answer("copy", 9, 40, 43), tasks.Answer("copy", 9, 99, 100)]
    for answer, (losses, right) in zip(answers, models.answer_losses(model, ids, answers, models.Seen())):
        torch.testing.assert_close(losses, wanted[answer.begin - 1 : answer.end - 1])
        assert right.tolist() == [logits[i - 1].argmax() == ids[i] for i in range(answer.begin, answer.end)]


def test_the_distance_to_dense_is_that_of_predictions(texts):
    model, ids, seen = small_model(), texts["train"]["a"][:100], models.Seen("cca", 8, 16, 4)
    losses, same = models.distance_to_dense(model, small_model(), ids, models.Seen(), part=7)
    torch.testing.assert_close(losses, models.text_losses(model, ids, models.Seen()))
    assert same.abs().max() < 1e-5
    _, other = models.distance_to_dense(model, small_model(), ids, seen)
    assert other[:16].abs().max() < 1e-5 and other.mean() > 1e-5 and (other > -1e-6).all()


@pytest.mark.parametrize("core_heads, query_heads", [("per_kv_head", 1), ("per_kv_head", 3), ("per_query_head", 3)])
@pytest.mark.parametrize("length", [20, 84, 85, 1000, 1024])
def test_entries_are_those_that_the_last_token_sees(length, core_heads, query_heads):
    cores = models.Seen("cca", 16, 64, 4, core_heads)
    count = max(0, length - 4 - 64) // 16
    sinks, raw = min(4, length), range(4 + count * 16, length)  # the partition of the paper
    assert cores.entries(length, query_heads) == sinks + len(raw) + count * (3 if core_heads == "per_query_head" else 1)
    assert models.Seen("window", window=64).entries(length) == min(length, 4 + 64)
    assert models.Seen().entries(length) == length
    equal = cores.window_of_equal_bytes(length, query_heads)
    assert equal.entries(length, query_heads) == cores.entries(length, query_heads)


def test_settings_say_what_is_seen():
    assert models.Seen().settings() == {}
    assert models.Seen("window", 16, 64, 4).settings() == {"window": 64, "sink_tokens": 4}
    pooled = {"group_size": 16, "core_heads": "per_kv_head", "core_bias": "none", "pool": "select"}
    assert models.Seen("cca", 16, 64, 4, pool="select").settings() == {"window": 64, "sink_tokens": 4} | pooled


# The trainer.


def trainer_of(texts, *more):
    args = finetune.build_parser().parse_args([
        "none", "none", "--attention", "cca", "--groups", "8", "4", "--windows", "16", "--text-length", "64",
        "--length", "1024", "--questions", "2", "--steps", "4", "--evaluate", "2", "--count", "1", "--float32", *more,
    ])  # fmt: skip
    return finetune.Trainer(args, small_model(), Tokenizer(), texts)


def log_of(folder):
    """Without what a clock says."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def test_a_run_that_goes_on_is_one_that_never_stopped(texts, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir(), pieces.mkdir()
    never_stopped = trainer_of(texts)
    finetune.run(never_stopped, whole)
    finetune.run(trainer_of(texts, "--until", "3"), pieces)

    with (pieces / "log.jsonl").open("a") as log:
        print(json.dumps({"step": 4, "text": 0}), file=log)  # of a piece that was lost
    second = trainer_of(texts)
    second.resume(pieces)
    finetune.forget_after(pieces / "log.jsonl", second.step)
    finetune.run(second, pieces)
    for name, weight in never_stopped.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
    assert log_of(pieces) == log_of(whole) and len(log_of(whole)) == 1 + 1 + 4 + 2

    loaded = small_model(seed=4)
    finetune.load_trained(loaded, pieces)
    trained = models.trained_parameters(loaded, "qkvo")
    assert len(trained) == 8 and all(torch.equal(x, second.trained[name]) for name, x in trained.items())
    with pytest.raises(SystemExit, match="lr"):
        trainer_of(texts, "--lr", "1").resume(pieces)


def test_only_what_is_said_is_trained(texts):
    for which, moves in (("qkvo", lambda name: "self_attn" in name), ("all", lambda name: True)):
        trainer, before = trainer_of(texts, "--train", which), small_model().state_dict()
        trainer.train_step()
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, before[name]) != moves(name), name


def test_groups_are_drawn_anew_and_the_target_stays(texts):
    trainer = trainer_of(texts)
    drawn = [finetune.seen_at(trainer.args, step).group_size for step in range(40)]
    assert set(drawn) == {4, 8} and drawn == [finetune.seen_at(trainer.args, step).group_size for step in range(40)]
    assert finetune.target(trainer.args).group_size == 8
    assert trainer_of(texts, "--attention", "window").evaluate()["label"] == f"window s={16 + 1004 // 8 + 1004 % 8} m=4"


def test_the_learning_rate_rises_and_comes_down(texts):
    args = trainer_of(texts, "--lr", "1", "--warm-up", "4", "--steps", "24").args
    rates = [finetune.learning_rate(args, step) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1] and rates[4] == 1
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(0.1)


def test_distilling_pulls_towards_dense(texts):
    trainer = trainer_of(texts, "--distill", "1", "--questions", "0", "--lr", "0.003")
    trainer.dense_model = small_model()
    first = trainer.train_step()
    trainer.step = 0
    assert trainer.train_step()["distance"] < first["distance"]


# The table and the charts.


class Copier:
    """A model that knows what comes next if it stands within its reach before: a stand-in for `recall`."""

    def __init__(self, reach):
        self.reach = reach
        self.model = self

    def __call__(self, ids, use_cache):
        ids = ids[0].tolist()
        states = torch.zeros(1, len(ids), VOCABULARY)
        for i, token in enumerate(ids):
            before = [j for j in range(max(1, i - self.reach), i) if ids[j - 1 : j + 1] == ids[i - 1 : i + 1]]
            if before:
                states[0, i, ids[before[-1] + 1]] = 100
        return SimpleNamespace(last_hidden_state=states)

    def lm_head(self, states):
        return states


def test_recall_is_counted_by_distance(texts):
    found = recall.recall(Copier(reach=300), models.Seen(), Tokenizer(), texts["train"], count=2, names=("sentence",))
    assert [x["distance"] for x in found] == [60, 128, 256, 512, 896] and all(x["tokens"] == 18 for x in found)
    assert [x["accuracy"] for x in found] == [1, 1, 1, 0, 0]
    assert [x["loss"] < 0.01 for x in found] == [True, True, True, False, False]
    assert "| dense | sentence | 100 % (0.00) |" in recall.table({"dense": found})


def test_rows_of_the_table_say_what_is_seen():
    assert recall.seen_of("dense", 4) == models.Seen()
    assert recall.seen_of("window/9", 4) == models.Seen("window", window=9)
    seen = recall.seen_of("cca/8/32/select/entropy", 2)
    assert seen == models.Seen("cca", 8, 32, 2, core_bias="entropy", pool="select")
    assert seen.label() == "CCA g=8 s=32 m=2, select, entropy"
    for row in ("cca/8", "window", "dense/3", "banana/3"):
        with pytest.raises(SystemExit, match="wants"):
            recall.seen_of(row, 4)


def test_charts_take_the_last_evaluation_of_a_training():
    plot = pytest.importorskip("plot", reason="matplotlib", exc_type=ImportError)
    labels = [label for label, *_ in plot.ROW.findall(plot.TABLE.read_text(encoding="utf-8"))]
    assert len(labels) == len(set(labels)) > 1  # of one table
    found = [{"task": task, "distance": 64, "accuracy": accuracy} for task, accuracy in (("copy", 0.5), ("passkey", 1))]
    first, last = ({"step": step, "label": "dense", "recall": found} for step in (0, 20))
    assert plot.rows_of([{"settings": {}, "target": "dense"}, first, {"step": 1, "recall": 0.3}, last]) == [last]
    assert plot.rows_of([first, last]) == [first, last]
    assert plot.mean_by_distance(found) == ([64], [75])
    drawn = [(1, 16, 4), (50, 4, 3), (50, 16, 2), (51, 16, 1)]
    steps = [{"step": step, "g": g, "recall": loss} for step, g, loss in drawn]
    assert plot.means_by_group(steps) == {4: ([50], [3]), 16: ([50, 100], [3, 1])}
