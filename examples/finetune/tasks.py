"""Recall tasks: sequences that end in questions whose answers stand far before them, at distances that are exact.

A task is a *needle* that holds the answer, text in between, and a *question* that repeats the answer's surroundings and then
the answer. The distance is that from the answer's first token in the needle to its first token in the question. A model
predicts the answer's tokens in the question, each from all tokens before it.

Training and test draw from words, numbers and random numbers that they do not share.
"""

import re
from dataclasses import dataclass

import numpy as np

from data import random_part

PARTS = ("train", "test")
COMMON = 4000


@dataclass(frozen=True)
class Item:
    """The tokens needle[needle_answer : needle_answer + answer_length] are those of the question from question_answer on."""

    task: str
    needle: list[int]
    needle_answer: int
    question: list[int]
    question_answer: int
    answer_length: int


@dataclass(frozen=True)
class Answer:
    """The tokens [begin, end) of a sequence, which stand `distance` tokens before, too."""

    task: str
    distance: int
    begin: int
    end: int


class Writer:
    """What tasks are written with: a tokenizer, and the words of one part."""

    def __init__(self, tokenizer, part: str):
        self.part = PARTS.index(part)
        self.encode = lambda text: tokenizer.encode(text).ids
        vocabulary = tokenizer.get_vocab()
        # Common words have small numbers in a vocabulary of pairs that were merged in the order of their counts.
        words = sorted(number for token, number in vocabulary.items() if re.fullmatch("Ġ[a-z]{4,}", token))[:COMMON]
        self.words = words[self.part :: len(PARTS)]
        self.digits = [vocabulary[str(digit)] for digit in range(10)]

    def draw_words(self, rng, count):
        return [int(word) for word in rng.choice(self.words, count, replace=False)]

    def draw_number(self, rng, length):
        """Digits whose sum is even for training, and odd for the test."""
        while True:
            digits = rng.integers(10, size=length)
            if digits.sum() % 2 == self.part:
                return [self.digits[digit] for digit in digits]


def passkey(writer, rng) -> Item:
    before = [*writer.encode("\nThe pass key of the"), *writer.draw_words(rng, 1), *writer.encode(" is ")]
    number = writer.draw_number(rng, 5)
    needle = [*before, *number, *writer.encode(". Remember it.\n")]
    question = [*before, *number, *writer.encode(".")]
    return Item("passkey", needle, len(before), question, len(before), len(number))


def key_value(writer, rng, pairs=8) -> Item:
    """A table of pairs of words, of which one is asked for."""
    keys, values = writer.draw_words(rng, pairs), writer.draw_words(rng, pairs)
    lines = [[*writer.encode("\nThe"), key, *writer.encode(" is with the"), value, *writer.encode(".")]
             for key, value in zip(keys, values)]  # fmt: skip
    asked = int(rng.integers(pairs))
    place = lines[asked].index(values[asked], 2)
    needle = [token for line in lines for token in line]
    return Item("key-value", needle, sum(map(len, lines[:asked])) + place, lines[asked], place, 1)


def repeated(task, cue, length):
    """Words that are repeated: the first `cue` of them say which ones follow."""

    def make(writer, rng) -> Item:
        words = writer.draw_words(rng, cue + length)
        return Item(task, words, cue, words, cue, length)

    return make


TASKS = {
    "passkey": passkey,
    "key-value": key_value,
    "sentence": repeated("sentence", cue=3, length=9),  # as long as a rare sentence that is said again
    "copy": repeated("copy", cue=4, length=28),
}


def lay_out(items: list[Item], distances: list[int], filler: np.ndarray) -> tuple[np.ndarray, list[Answer]] | None:
    """A sequence as long as the filler: the questions one after the other at its end, each needle at its distance before its
    question, and the filler in order in between. None where a needle finds no place."""
    length = len(filler)
    begin = length - sum(len(item.question) for item in items)
    free, sequence, answers = np.ones(length, bool), np.empty(length, np.int64), []
    free[begin:] = False
    for item, distance in zip(items, distances):
        sequence[begin : begin + len(item.question)] = item.question
        answer = begin + item.question_answer
        answers.append(Answer(item.task, distance, answer, answer + item.answer_length))
        first = answer - distance - item.needle_answer
        last = first + len(item.needle)
        if first < 0 or not free[first:last].all():
            return None
        sequence[first:last], free[first:last] = item.needle, False
        begin += len(item.question)
    sequence[free] = filler[: free.sum()]
    return sequence, answers


def draw(writer, rng, names, distances_of, filler, attempts=1000) -> tuple[np.ndarray, list[Answer]]:
    """A sequence with a task for each of the names, at distances that `distances_of(rng)` draws."""
    for _ in range(attempts):
        made = lay_out([TASKS[name](writer, rng) for name in names], distances_of(rng), filler)
        if made is not None:
            return made
    raise ValueError(f"filler: got {len(filler)} tokens, wants more for {len(names)} tasks")


def recall_sequences(writer, texts, seed, task, distances, length, count):
    """`count` sequences of `length` tokens with one task at all distances, of which the shortest is asked for first."""
    for i in range(count):
        rng = np.random.default_rng([seed, PARTS.index("test"), list(TASKS).index(task), i])
        filler = random_part(texts, length, rng)
        yield draw(writer, rng, [task] * len(distances), lambda _: sorted(distances), filler)


def training_sequence(writer, texts, seed, step, length, questions):
    """A sequence with tasks of all kinds, at distances from 32 to nearly its length."""
    rng = np.random.default_rng([seed, PARTS.index("train"), step])
    names = list(rng.choice(list(TASKS), questions))
    filler = random_part(texts, length, rng)
    return draw(writer, rng, names, lambda rng: rng.integers(32, length - 32, questions).tolist(), filler)
